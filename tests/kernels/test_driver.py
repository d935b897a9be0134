"""A launch as the driver sees it: the layout of cuda.h, errors by name, threads without a context."""

from __future__ import annotations

import struct
import threading
from typing import Any

import pytest
import torch

from onegpu.errors import KernelError
from tests.fake_driver import FakeDriver, on_gpu
from tests.nvrtc_tools import SCALE, scale_kernel


def test_arguments_and_configuration_arrive(fake: FakeDriver, compiled: list[Any]) -> None:
    x, y = on_gpu(torch.zeros(4)), on_gpu(torch.zeros(4))
    fake.streams[0] = 0xABC
    scale_kernel()((5, 2), 96, 1000, x, y, 1 << 40, 0.5, pdl=True, cooperative=True, cluster=(2, 1, 1))
    (seen,) = fake.launches
    assert (seen.grid, seen.block, seen.shared, seen.stream) == ((5, 2, 1), (96, 1, 1), 1000, 0xABC)
    assert seen.arguments == [
        struct.pack("<Q", x.data_ptr()), struct.pack("<Q", y.data_ptr()), struct.pack("<q", 1 << 40),
        struct.pack("<f", 0.5),
    ]  # fmt: skip
    assert seen.attributes == {6: (1, 0, 0), 2: (1, 0, 0), 4: (2, 1, 1)}
    assert compiled == [(SCALE, "scale<3>", "sm_90a", {"SHARED": False}, ())]


def test_none_is_a_null_pointer_and_an_empty_grid_no_launch(fake: FakeDriver, compiled: list[Any]) -> None:
    kernel, x = scale_kernel(), on_gpu(torch.zeros(4))
    kernel((0,), 32, 0, x, None, 0, 1.0)
    assert not fake.launches
    kernel((1,), 32, 0, x, None, 0, 1.0)
    assert fake.launches[0].arguments[1] == bytes(8)


def test_wrong_arguments_are_errors(fake: FakeDriver, compiled: list[Any]) -> None:
    kernel, x = scale_kernel(), on_gpu(torch.zeros(4))
    with pytest.raises(KernelError, match="takes 4 arguments, got 3"):
        kernel((1,), 32, 0, x, x, 3)
    with pytest.raises(KernelError, match="do not fit"):
        kernel((1,), 32, 0, x, x, 1 << 70, 1.0)
    fake.fails["cuLaunchKernelEx"] = [700]
    with pytest.raises(KernelError, match=r"scale: launching mangled, grid \(1, 1, 1\).*code 700 .*so and so"):
        kernel((1,), 32, 0, x, x, 1, 1.0)
    fake.sizes = [8, 8, 4, 4]
    with pytest.raises(KernelError, match=r"parameters of \[8, 8, 4, 4\] bytes, its launcher passes \[8, 8, 8, 4\]"):
        scale_kernel()((1,), 32, 0, x, x, 1, 1.0)


def test_a_thread_without_a_context_gets_one(fake: FakeDriver, compiled: list[Any]) -> None:
    kernel, x = scale_kernel(), on_gpu(torch.zeros(4), 1)
    fake.fails = {"cuKernelGetFunction": [201], "cuLaunchKernelEx": [201]}
    kernel((1,), 32, 0, x, x, 1, 1.0)
    assert fake.contexts == [1, 1] and len(fake.launches) == 1


@pytest.mark.gpu
def test_gpu_from_a_new_thread() -> None:
    kernel = scale_kernel()
    x, y = torch.randn(1000, device="cuda"), torch.zeros(1000, device="cuda")
    kernel((4,), 256, 0, x, y, 1000, 0.5)
    torch.cuda.synchronize()
    thread = threading.Thread(target=kernel, args=((4,), 256, 0, x, y, 1000, 2.0))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(y, x * 2.0 * 3)
