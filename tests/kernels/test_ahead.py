"""What is compiled ahead is compiled once, in another thread, and launched by whoever comes for it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from onegpu.errors import KernelError
from onegpu.kernels import ahead, nvrtc
from onegpu.kernels.launch import triton_bind, triton_launch
from onegpu.kernels.triton_kernel import TritonKernel
from tests.fake_driver import FakeDriver, on_gpu
from tests.nvrtc_tools import scale_kernel
from tests.triton_tools import needs_triton


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads in which Triton compiled."""
    seen: list[str] = []
    cached = TritonKernel._cached

    def counted(self: TritonKernel, *args: Any) -> Any:
        seen.append(threading.current_thread().name)
        return cached(self, *args)

    monkeypatch.setattr(TritonKernel, "_cached", counted)
    return seen


@needs_triton
def test_triton_kernels(fake: FakeDriver, cpu_compiled: Any, compilations: list[str]) -> None:
    x, fake.sizes = on_gpu(torch.zeros(4)), [8, 8, 4, 4, 8, 8]

    def launches() -> None:
        for n in (4, 5):
            triton_launch(cpu_compiled.scale, (1,), x, x, None, n, 2.0, 1, BIAS=False)
        triton_bind(cpu_compiled.scale, (1,), x, x, None, 4, 2.0, 3, BIAS=False)(x, x)

    with ahead.collecting() as jobs:
        assert ahead.active()
        launches()
    assert not ahead.active() and not fake.launches and not compilations and len(jobs) == 3
    begun = ahead.start(jobs)
    assert len(begun) == 2  # one form serves two lengths
    for done in begun:
        done.result()
    assert len(compilations) == 2 and all(name.startswith("onegpu-compile") for name in compilations)
    before = ahead.waited()
    launches()
    assert len(fake.launches) == 3 and len(compilations) == 2
    assert ahead.waited() > before
    with ahead.collecting() as jobs:
        launches()  # all there: launched
    assert not jobs and len(fake.launches) == 6


def test_kernels_in_cuda(fake: FakeDriver, compiled: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: "13.0")
    kernel, x = scale_kernel(), on_gpu(torch.zeros(4))
    with ahead.collecting() as jobs:
        for _ in range(2):
            kernel((4,), 256, 0, x, x, 1000, 0.5)
    assert not compiled and not fake.launches
    (begun,) = ahead.start(jobs)
    begun.result()
    for _ in range(2):
        kernel((4,), 256, 0, x, x, 1000, 0.5)
    assert len(compiled) == 1 and len(fake.launches) == 2 and ahead.start(jobs) == []


def test_an_error_meets_the_one_that_launches(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> nvrtc.Cubin:
        raise KernelError("no such instruction")

    monkeypatch.setattr(nvrtc, "compiler_version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "cached_cubin", refused)
    kernel, x = scale_kernel(), on_gpu(torch.zeros(4))
    with ahead.collecting() as jobs:
        kernel((4,), 256, 0, x, x, 1000, 0.5)
    ahead.start(jobs)
    with pytest.raises(KernelError, match="no such instruction"):
        kernel((4,), 256, 0, x, x, 1000, 0.5)


def test_only_the_collecting_thread_collects() -> None:
    seen: list[bool] = []
    with ahead.collecting():
        thread = threading.Thread(target=lambda: seen.append(ahead.active()))
        thread.start()
        thread.join()
    assert seen == [False]
