"""TMA descriptors made on the host, rule (e) of DESIGN.md, "Launching"."""

from __future__ import annotations

from typing import Any

import torch

from onegpu.kernels import tensor_map
from onegpu.kernels.launch import triton_launch
from tests.fake_driver import FakeDriver, on_gpu
from tests.triton_tools import needs_triton


@needs_triton
def test_e_host_descriptors_are_kept_and_passed_by_value(fake: FakeDriver, cpu_compiled: Any) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    tensor_map.encode.cache_clear()
    x = on_gpu(torch.zeros(16, 64))
    fake.sizes = [128, 4, 4, 8, 8, 8, 8, 8]
    for _ in range(3):
        descriptor = TensorDescriptor.from_tensor(x, [16, 64])
        triton_launch(cpu_compiled.through_descriptor, (1,), descriptor, x, ROWS=16, COLUMNS=64)
    assert len(fake.encoded) == 1 and len(fake.launches) == 3
    kind, rank, address, shape, strides, box = fake.encoded[0][:6]
    assert (kind, rank, address.value) == (7, 2, x.data_ptr())
    assert (list(shape), strides[0], list(box)[1]) == ([64, 16], 256, 16)
    arguments = fake.launches[2].arguments
    assert arguments[0][:8] == b"\x5a" * 8 and arguments[0][16:] == b"\x5a" * 112  # the small tensor's bit is cleared
    assert [int.from_bytes(a, "little") for a in arguments[1:5]] == [16, 64, 64, 1]
    made = tensor_map.tensor_map(x, (8, 32), swizzle=128)
    assert len(made) == 128 and fake.encoded[1][5][:] == [32, 8] and fake.encoded[1][8] == 3
    assert tensor_map.encode.cache_info().maxsize is not None
    for _ in range(2):
        tensor_map.byte_map(x.data_ptr(), 32, 128, (8, 64), swizzle=64)  # 4096 bytes, whatever they are
    kind, rank, address, shape, strides, box = fake.encoded[2][:6]
    assert (kind, rank, address.value, list(shape), strides[0]) == (0, 2, x.data_ptr(), [128, 32], 128)
    assert (list(box), fake.encoded[2][8], len(fake.encoded)) == ([64, 8], 2, 3)
    tensor_map.words_map(x.data_ptr(), 16, 128, (8, 64), swizzle=128)
    kind, rank, address, shape, strides, box = fake.encoded[3][:6]
    assert (kind, rank, address.value, list(shape), strides[0]) == (1, 2, x.data_ptr(), [128, 16], 256)
    assert (list(box), fake.encoded[3][8]) == ([64, 8], 3)
