"""Triton kernels launched without Triton's launcher: rules (a), (c), (d) and (f) of DESIGN.md, "Launching"."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest
import torch

from onegpu.errors import KernelError
from onegpu.kernels import launch, triton_compile, triton_kernel
from onegpu.kernels.driver import KINDS
from onegpu.kernels.launch import triton_bind, triton_launch
from tests.fake_driver import FakeDriver, on_gpu
from tests.nvrtc_tools import scale_kernel
from tests.triton_tools import needs_triton, ptx_parameter_bytes


@needs_triton
def test_a_of_triton_kernels_too(fake: FakeDriver, cpu_compiled: Any) -> None:
    there, here = on_gpu(torch.zeros(4), 1), on_gpu(torch.zeros(4))
    fake.sizes = [8, 8, 4, 4, 8, 8]
    triton_launch(cpu_compiled.scale, (1,), there, there, None, 4, 2.0, 1, BIAS=False)
    assert (fake.launches[0].device, fake.current) == (1, 0)
    with pytest.raises(KernelError, match="the first one on cuda:1"):
        triton_launch(cpu_compiled.scale, (1,), there, here, None, 4, 2.0, 1, BIAS=False)


@needs_triton
def test_c_of_triton_kernels_too(fake: FakeDriver, cpu_compiled: Any) -> None:
    x = on_gpu(torch.zeros(4))
    fake.capturing = True
    with pytest.raises(KernelError, match=r"^scale would compile"):
        triton_launch(cpu_compiled.scale, (1,), x, x, None, 4, 2.0, 1, BIAS=False)


@needs_triton
def test_d_scratch_is_allocated_for_each_call(
    fake: FakeDriver, cpu_compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: sizes.append(n) or empty(n, dtype=dtype))
    x = on_gpu(torch.zeros(16, 64))
    fake.sizes = [8, 8, 4, 8, 8]
    for grid in ((1,), (3, 2)):
        triton_launch(cpu_compiled.device_descriptor, grid, x, x, 16, ROWS=16, COLUMNS=64)
    assert sizes[0] > 0 and sizes[1] == 6 * sizes[0]
    assert fake.launches[0].arguments[3] != bytes(8)


@needs_triton
def test_f_lengths_compile_nothing(fake: FakeDriver, cpu_compiled: Any) -> None:
    x = on_gpu(torch.zeros(4))
    fake.sizes = [8, 8, 4, 4, 8, 8]
    for n in [1, 16, 17, *(random.Random(0).randrange(1, 1 << 31) for _ in range(300))]:
        triton_launch(cpu_compiled.scale, (1,), x, x, None, n, float(n), 1, BIAS=False)
    assert len(fake.loaded) == 1 and len(fake.launches) == 303
    assert fake.launches[-1].arguments[2] == struct.pack("<i", n)
    fake.sizes = [8, 8, 8, 4, 4, 8, 8]
    for stride in (2, 16, 32, 3):  # not in do_not_specialize: one code for multiples of 16, one for the others
        triton_launch(cpu_compiled.scale, (1,), x, x, None, 5, 1.0, stride, BIAS=False)
    assert len(fake.loaded) == 3


@needs_triton
def test_f_numbers_beyond_32_bits_and_unaligned_pointers_have_code_of_their_own(
    fake: FakeDriver, cpu_compiled: Any
) -> None:
    x = on_gpu(torch.zeros(8))
    fake.sizes = [8, 8, 8, 4, 8, 8]
    triton_launch(cpu_compiled.scale, (1,), x, x, None, 1 << 33, 1.0, 1, BIAS=False)
    assert fake.launches[0].arguments[2] == struct.pack("<q", 1 << 33)
    fake.sizes = [8, 8, 4, 4, 8, 8]
    for start in (0, 1, 4, 3):
        triton_launch(cpu_compiled.scale, (1,), on_gpu(x[start:]), x, None, 4, 1.0, 1, BIAS=False)
    assert len(fake.loaded) == 3


@needs_triton
def test_a_launch_that_is_settled_takes_its_tensors_alone(fake: FakeDriver, cpu_compiled: Any) -> None:
    x, y, z = (on_gpu(torch.zeros(4)) for _ in range(3))
    fake.sizes = [8, 8, 4, 4, 8, 8]
    bound = triton_bind(cpu_compiled.scale, (6,), x, y, None, 4, 2.0, 1, cluster=3, shared=60000, BIAS=False)
    assert not fake.launches
    bound(z, x)
    bound(y, y)
    assert [launch.arguments[:2] for launch in fake.launches] == [
        [struct.pack("<Q", tensor.data_ptr()) for tensor in pair] for pair in ((z, x), (y, y))
    ]
    assert fake.launches[0].arguments[2:4] == [struct.pack("<i", 4), struct.pack("<f", 2.0)]
    assert fake.launches[0].grid == (6, 1, 1) and fake.launches[0].attributes[4] == (3, 1, 1)
    assert fake.launches[0].shared == 60000
    with pytest.raises(KernelError, match="the first one on cuda:0"):
        bound(z, on_gpu(torch.zeros(4), 1))
    with pytest.raises(ValueError, match="zip"):
        bound(z)
    fake.capturing = True  # what was compiled for other sizes needs nothing that a capture forbids
    triton_bind(cpu_compiled.scale, (7,), x, y, None, 5, 2.0, 1, BIAS=False)(x, y)
    assert fake.launches[-1].arguments[2] == struct.pack("<i", 5) and len(fake.loaded) == 1
    there = [on_gpu(torch.zeros(4), 1) for _ in range(2)]
    fake.capturing = False
    triton_bind(cpu_compiled.scale, (1,), *there, None, 4, 2.0, 1, BIAS=False)(*there)
    assert (fake.launches[-1].device, fake.current) == (1, 0)


@needs_triton
def test_a_settled_launch_makes_descriptors_of_other_tensors(
    fake: FakeDriver, cpu_compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from onegpu.kernels import triton_kernel

    made = []
    monkeypatch.setattr(
        triton_kernel, "encode", lambda at, *rest: made.append((at, rest)) or at.to_bytes(128, "little")
    )
    x, y = on_gpu(torch.zeros(16, 64)), on_gpu(torch.zeros(16, 64))
    fake.sizes = [128, 4, 4, 8, 8, 8, 8, 8]
    descriptor = TensorDescriptor.from_tensor(x, [16, 64])
    bound = triton_bind(cpu_compiled.through_descriptor, (1,), descriptor, x, ROWS=16, COLUMNS=64)
    for tensor in (y, x, y):
        bound(tensor, x)
        assert fake.launches[-1].arguments[0] == tensor.data_ptr().to_bytes(128, "little")
    assert fake.launches[-1].arguments[5] == struct.pack("<Q", x.data_ptr())
    assert [at for at, _ in made[1:]] == [y.data_ptr(), x.data_ptr()]  # each once
    assert len({rest for _, rest in made}) == 1
    triton_bind(cpu_compiled.through_descriptor, (0,), descriptor, x, ROWS=16, COLUMNS=64)(x, x)
    assert len(fake.launches) == 3


@needs_triton
def test_what_is_written_is_what_the_compiled_kernel_takes(fake: FakeDriver, cpu_compiled: Any) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, block = on_gpu(torch.zeros(16, 64)), {"ROWS": 16, "COLUMNS": 64}
    for kernel, args, constants in (
        (cpu_compiled.scale, (x, x, x, 1 << 40, 2.0, 3), {"BIAS": True}),
        (cpu_compiled.scale, (x, x, None, 5, 2.0, 1), {"BIAS": False}),
        (cpu_compiled.through_descriptor, (TensorDescriptor.from_tensor(x, [16, 64]), x), block),
        (cpu_compiled.device_descriptor, (x, x, 16), block),
    ):
        triton_launch(kernel, (0,), *args, **constants)  # makes it, launches nothing
        (made,) = list(launch._TRITON[id(kernel)]._made.values())[-1:]
        written = [KINDS[kind][1] for kind in made.packer.kinds]
        compiled, _ = launch._triton(kernel).compile(90, args, constants)
        assert written == ptx_parameter_bytes(compiled.asm["ptx"]), made.packer.kinds
    assert not fake.launches


@needs_triton
def test_the_front_end_has_a_turn_and_the_rest_runs_beside_others(
    fake: FakeDriver, cpu_compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import ASTSource

    held: dict[str, bool] = {}

    def note(where: Any, name: str) -> None:
        old = getattr(where, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            held[name] = triton_kernel._TURN.locked()
            return old(*args, **kwargs)

        monkeypatch.setattr(where, name, noted)

    note(triton_compile, "_key")
    note(ASTSource, "make_ir")
    note(CUDABackend, "make_llir")
    x = on_gpu(torch.zeros(4))

    def compiles(**constants: Any) -> None:  # as a thread of the pool does; the program's own waits for no turn
        launch._triton(cpu_compiled.scale)._cached(90, (x, x, None, 4, 1.0, 1), constants, triton_kernel._TURN)

    compiles(BIAS=False)
    assert held == {"_key": True, "make_ir": True, "make_llir": False}
    assert not triton_kernel._TURN.locked()
    launch._TRITON.clear()
    held.clear()
    compiles(BIAS=False)  # from disk
    assert held == {"_key": True} and not triton_kernel._TURN.locked()
    for wrong in ({"num_warp": 4}, {"BLOCK": 100}):  # of no option, and refused by the front end
        with pytest.raises(Exception, match=r"num_warp|power of 2"):
            compiles(BIAS=False, **wrong)
        assert not triton_kernel._TURN.locked()


@needs_triton
def test_wrong_constants_of_a_triton_kernel_are_errors(fake: FakeDriver, cpu_compiled: Any) -> None:
    x = on_gpu(torch.zeros(4))
    with pytest.raises(KernelError, match="the constant BIAS is missing"):
        triton_launch(cpu_compiled.scale, (1,), x, x, None, 4, 1.0, 1)
    with pytest.raises(KernelError, match=r"has no constant or option num_warp\b"):
        triton_launch(cpu_compiled.scale, (1,), x, x, None, 4, 1.0, 1, BIAS=False, num_warp=4)
    with pytest.raises(KernelError, match="takes 6 run-time arguments"):
        triton_launch(cpu_compiled.scale, (1,), x, x, None, 4, 1.0, BIAS=False)
    with pytest.raises(KernelError, match="not on a CUDA device"):
        triton_launch(cpu_compiled.scale, (1,), torch.zeros(4), torch.zeros(4), None, 4, 1.0, 1, BIAS=False)
    with pytest.raises(KernelError, match="not on a CUDA device"):
        scale_kernel()((1,), 32, 0, torch.zeros(4), x, 1, 1.0)


@pytest.mark.gpu
def test_gpu_triton_kernel_and_descriptors() -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from tests.kernels import launch_kernels as kernels

    x, bias = torch.randn(3000, device="cuda"), torch.randn(1000, device="cuda")
    for stride, start in ((1, 0), (3, 0), (1, 1), (2, 3)):
        y = torch.full((900,), float("nan"), device="cuda")
        triton_launch(kernels.scale, (8,), x[start:], y, bias, 900, 2.0, stride, BIAS=True)
        assert torch.equal(y, x[start:][: 900 * stride : stride] * 2.0 + bias[:900])
    if torch.cuda.get_device_capability() >= (9, 0):
        x, y = torch.randn(16, 64, device="cuda"), torch.empty(16, 64, device="cuda")
        descriptor = TensorDescriptor.from_tensor(x, [16, 64])
        triton_launch(kernels.through_descriptor, (1,), descriptor, y, ROWS=16, COLUMNS=64)
        assert torch.equal(x, y)
        triton_launch(kernels.device_descriptor, (2,), y.mul_(2), x, 16, ROWS=16, COLUMNS=64)
        assert torch.equal(x, y)
