"""Fixtures of the launcher's tests: a driver that records, and kernels to launch on it."""

from __future__ import annotations

from typing import Any

import pytest

from onegpu.kernels import launch, nvrtc
from tests.fake_driver import FakeDriver, fake

__all__ = ["fake"]


@pytest.fixture
def compiled(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What CUDA C++ was compiled, without compiling it."""
    seen: list[tuple[Any, ...]] = []

    def cubin(source: str, name: str, arch: str, constants: Any, options: Any, op: str) -> nvrtc.Cubin:
        seen.append((source, name, arch, dict(constants), options))
        return nvrtc.Cubin(b"code", "mangled")

    monkeypatch.setattr(nvrtc, "cached_cubin", cubin)
    fake.sizes = [8, 8, 8, 4]
    return seen


@pytest.fixture
def cpu_compiled(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Triton's kernels, compiled for Hopper without a GPU; fresh for each test."""
    monkeypatch.setattr(launch, "_TRITON", {})
    from tests.kernels import launch_kernels

    return launch_kernels
