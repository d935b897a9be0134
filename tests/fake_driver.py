"""A CUDA driver in Python: takes what launches pass, reads it as cuda.h lays it out, and says what it got."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from onegpu.kernels import disk_cache, driver, guard, launch, triton_kernel


class Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [
        *[(name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")],
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("n_attributes", ctypes.c_uint),
    ]


class Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h; the value is a union of 64 bytes, of which three ints are looked at."""

    _fields_ = [
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int * 3),
        ("rest", ctypes.c_char * 52),
    ]


@dataclass
class Launch:
    """One launch as the driver saw it. arguments: bytes of each parameter."""

    kernel: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    attributes: dict[int, tuple[int, ...]]
    arguments: list[bytes]
    device: int


@dataclass
class FakeDriver:
    """Stands for libcuda. sizes: bytes of the parameters of every kernel. fails: function name -> code to return."""

    sizes: list[int] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    on_device: list[int] = field(default_factory=list)
    shared: list[tuple[int, int]] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)
    fails: dict[str, list[int]] = field(default_factory=dict)
    current: int = 0
    streams: dict[int, int] = field(default_factory=dict)
    capturing: bool = False
    encoded: list[tuple[Any, ...]] = field(default_factory=list)

    def _code(self, name: str) -> int:
        return self.fails[name].pop(0) if self.fails.get(name) else 0

    def cuGetErrorName(self, code: int, out: Any) -> int:
        out._obj.value = b"CUDA_ERROR_SO_AND_SO"
        return 0

    def cuGetErrorString(self, code: int, out: Any) -> int:
        out._obj.value = b"so and so"
        return 0

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = 13000
        return 0

    def cuLibraryLoadData(self, out: Any, *_: Any) -> int:
        out._obj.value = 7
        return self._code("cuLibraryLoadData")

    def cuLibraryGetKernel(self, out: Any, library: Any, name: bytes) -> int:
        self.loaded.append(name.decode())
        out._obj.value = 100 + len(self.loaded)
        return 0

    def cuKernelGetFunction(self, out: Any, kernel: Any) -> int:
        return self._code("cuKernelGetFunction")

    def cuFuncLoad(self, function: Any) -> int:
        self.on_device.append(self.current)
        return 0

    def cuKernelSetAttribute(self, attribute: int, value: int, kernel: Any, device: int) -> int:
        self.shared.append((value, device))
        return self._code("cuKernelSetAttribute")

    def cuKernelGetParamInfo(self, kernel: Any, index: int, offset: Any, size: Any) -> int:
        if index >= len(self.sizes):
            return 1
        size._obj.value = self.sizes[index]
        return 0

    def cuDevicePrimaryCtxRetain(self, out: Any, device: int) -> int:
        self.contexts.append(device)
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        return 0

    def cuTensorMapEncodeTiled(self, place: Any, *args: Any) -> int:
        ctypes.memset(place.value, 0x5A, 128)
        self.encoded.append(args)
        return self._code("cuTensorMapEncodeTiled")

    def cuLaunchKernelEx(self, base: int, kernel: Any, pointers: Any, extra: Any) -> int:
        if code := self._code("cuLaunchKernelEx"):
            return code
        config = Config.from_address(base)
        attributes = {}
        for index in range(config.n_attributes):
            one = Attribute.from_address(config.attributes + index * ctypes.sizeof(Attribute))
            attributes[one.id] = tuple(one.value)
        arguments = [ctypes.string_at(pointers[i], size) for i, size in enumerate(self.sizes)]
        grid, block = (config.gx, config.gy, config.gz), (config.bx, config.by, config.bz)
        seen = (config.shared, config.stream or 0, attributes, arguments, self.current)
        self.launches.append(Launch(kernel.value, grid, block, *seen))
        return 0


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU, as far as a launch looks."""

    index: int

    def get_device(self) -> int:
        return self.index

    __torch_function__ = torch._C._disabled_torch_function_impl


def on_gpu(tensor: torch.Tensor, index: int = 0) -> torch.Tensor:
    made = tensor.as_subclass(OnGpu)
    made.index = index
    return made


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    """Two Hopper GPUs without a GPU: `on_gpu` makes their tensors. No kernel is on disk."""
    made = FakeDriver()

    class Device:
        def __init__(self, index: Any) -> None:
            self.index = index if isinstance(index, int) else torch.device(index).index

        def __enter__(self) -> None:
            self.before, made.current = made.current, self.index

        def __exit__(self, *_: Any) -> None:
            made.current = self.before

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (driver, "library", lambda: made),
        (disk_cache, "cache_folder", lambda: tmp_path / "kernels on disk"),
        (torch.cuda, "device", Device),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "is_current_stream_capturing", lambda: made.capturing),
    ]
    for module in (guard, launch, triton_kernel):
        replaced += [
            (module, "current_device", lambda: made.current),
            (module, "raw_stream", lambda device: made.streams.get(device, 0)),
        ]
    for owner, name, value in replaced:
        monkeypatch.setattr(owner, name, value)
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90a")
    return made
