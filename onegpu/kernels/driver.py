"""The few functions of the CUDA driver that a launch needs, called directly.

cuda-core compiles; it does not launch here: its objects cost more host time a call than the 10 µs that a whole launch
may take, and Triton's own dispatch 15 to 40. One `struct.pack_into` writes the configuration and all arguments, one
call through ctypes hands them over. Only the driver's documented, stable interface is used (CUDA 12.4 and later).
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from onegpu.errors import KernelError

# CUfunction_attribute, CUdevice_attribute and CUlaunchAttributeID of cuda.h
_MAX_DYNAMIC_SHARED, _NON_PORTABLE_CLUSTER, _SHARED_OPTIN = 8, 14, 97
_COOPERATIVE, _CLUSTER, _CLUSTER_SPREAD, _PROGRAMMATIC = 2, 4, 5, 6
_INVALID_CONTEXT = 201

# CUlaunchConfig: six sizes, shared bytes, stream, attributes, their number; then the arguments.
_CONFIG = "<7I4xQQI4x"
_CONFIG_BYTES = struct.calcsize(_CONFIG)
_ATTRIBUTE = struct.Struct("<i4x3i52x")  # CUlaunchAttribute: id, and a union of 64 bytes

# How an argument is stored: format of `struct`, bytes. "P" is a tensor, "T" a TMA descriptor (a CUtensorMap).
KINDS = {
    "P": ("Q", 8), "i": ("i", 4), "q": ("q", 8), "I": ("I", 4), "Q": ("Q", 8), "b": ("b", 1), "B": ("B", 1),
    "h": ("h", 2), "H": ("H", 2), "e": ("e", 2), "f": ("f", 4), "d": ("d", 8), "T": ("128s", 128),
}  # fmt: skip


@lru_cache(maxsize=1)
def library() -> Any:
    """The driver, loaded and initialised once. Raises KernelError where there is none."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        loaded = ctypes.CDLL(name)
    except OSError as error:
        raise KernelError(f"{name}: the CUDA driver cannot be loaded ({error})") from error
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    loaded.cuLaunchKernelEx.argtypes = [pointer, pointer, pointer, pointer]
    loaded.cuLibraryLoadData.argtypes = [*[pointer] * 4, ctypes.c_uint, pointer, pointer, ctypes.c_uint]
    loaded.cuLibraryGetKernel.argtypes = [pointer, pointer, ctypes.c_char_p]
    loaded.cuKernelGetFunction.argtypes = [pointer, pointer]
    loaded.cuKernelSetAttribute.argtypes = [integer, integer, pointer, integer]
    loaded.cuKernelGetParamInfo.argtypes = [pointer, ctypes.c_size_t, pointer, pointer]
    loaded.cuFuncLoad.argtypes = [pointer]
    loaded.cuMemcpyDtoHAsync_v2.argtypes = [pointer, pointer, ctypes.c_size_t, pointer]
    check(loaded.cuInit(0), "cuInit", loaded)
    return loaded


def check(code: int, what: str, driver: Any = None) -> None:
    """Raises KernelError, with the driver's name and text of the code, unless it is 0."""
    if code == 0:
        return
    driver = driver or library()
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(name))
    driver.cuGetErrorString(code, ctypes.byref(text))
    known = f"{(name.value or b'?').decode()}, {(text.value or b'no text').decode()}"
    raise KernelError(f"{what}: the CUDA driver refused with code {code} ({known})")


def driver_version() -> int:
    """The newest CUDA version that the driver serves, such as 13000."""
    version = ctypes.c_int()
    check(library().cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
    return version.value


def copy_to_host(target: int, source: int, size: int, stream: int) -> None:
    """Copies `size` bytes from the current device to pinned memory of the host, in the order of `stream`.

    At a third of the host time of `torch.Tensor.copy_`, whose allocator does not know of it: the caller keeps the
    memory until the copy is done.
    """
    code = library().cuMemcpyDtoHAsync_v2(target, source, size, stream)
    if code:
        check(code, "copying to the host")


def make_context_current(device: int) -> None:
    """Binds torch's (the primary) context of a device to this thread: a new thread has none until torch touches it."""
    driver, context = library(), ctypes.c_void_p()
    check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")


class LoadedKernel:
    """A kernel of a cubin: a CUkernel, which belongs to no context, made ready device by device."""

    def __init__(self, cubin: bytes, name: str, op: str) -> None:
        self.op, self.name = op, name
        self._cubin = cubin  # the driver may read it again
        self._shared: dict[int, int] = {}
        driver, code, self.handle = library(), ctypes.c_void_p(), ctypes.c_void_p()
        check(driver.cuLibraryLoadData(ctypes.byref(code), cubin, None, None, 0, None, None, 0), f"{op}: loading")
        check(driver.cuLibraryGetKernel(ctypes.byref(self.handle), code, name.encode()), f"{op}: finding {name}")

    def load(self, device: int) -> None:
        """Puts the code on the device, which must be current: loading lazily, at the launch, might be in a capture."""
        driver, function = library(), ctypes.c_void_p()
        code = driver.cuKernelGetFunction(ctypes.byref(function), self.handle)
        if code == _INVALID_CONTEXT:
            make_context_current(device)
            code = driver.cuKernelGetFunction(ctypes.byref(function), self.handle)
        check(code, f"{self.op}: loading {self.name}")
        check(driver.cuFuncLoad(function), f"{self.op}: loading {self.name}")

    def allow_shared(self, size: int, device: int) -> None:
        """Opts in to `size` bytes of dynamic shared memory a block on one device (over 48 KiB needs it)."""
        if size > self._shared.get(device, 48 * 1024):
            what = f"{self.op}: {size} bytes of shared memory a block"
            check(library().cuKernelSetAttribute(_MAX_DYNAMIC_SHARED, size, self.handle, device), what)
            self._shared[device] = size

    def allow_large_cluster(self, device: int) -> None:
        """Opts in to clusters of more than 8 blocks."""
        what = f"{self.op}: a cluster of more than 8 blocks"
        check(library().cuKernelSetAttribute(_NON_PORTABLE_CLUSTER, 1, self.handle, device), what)

    def parameter_bytes(self) -> list[int]:
        """Size of each parameter, in order, as compiled."""
        driver = library()
        sizes: list[int] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        while driver.cuKernelGetParamInfo(self.handle, len(sizes), ctypes.byref(offset), ctypes.byref(size)) == 0:
            sizes.append(size.value)
        return sizes


@lru_cache(maxsize=256)
def attributes(pdl: bool, cooperative: bool, cluster: tuple[int, int, int], spread: bool = False) -> tuple[int, int]:
    """Address and number of launch attributes; they live as long as the process, as few as there are combinations."""
    rows = []
    if pdl:
        rows.append(_ATTRIBUTE.pack(_PROGRAMMATIC, 1, 0, 0))
    if cooperative:
        rows.append(_ATTRIBUTE.pack(_COOPERATIVE, 1, 0, 0))
    if cluster != (1, 1, 1):
        rows.append(_ATTRIBUTE.pack(_CLUSTER, *cluster))
        if spread:
            rows.append(_ATTRIBUTE.pack(_CLUSTER_SPREAD, 1, 0, 0))
    block = ctypes.create_string_buffer(b"".join(rows), max(1, _ATTRIBUTE.size * len(rows)))
    _KEPT.append(block)
    return (ctypes.addressof(block), len(rows)) if rows else (0, 0)


_KEPT: list[Any] = []


class Packer:
    """Writes launches of one signature. Each launch in flight has its own memory, so threads need no lock.

    Args:
        kinds: one letter an argument, see KINDS.
    """

    def __init__(self, kinds: str) -> None:
        self.kinds = kinds
        layout, place, self._offsets = _CONFIG, _CONFIG_BYTES, []
        for kind in kinds:
            code, size = KINDS[kind]
            alignment = min(size, 64)
            padding = -place % alignment
            layout += f"{padding}x{code}"
            self._offsets.append(place + padding)
            place += padding + size
        self._struct = struct.Struct(layout)
        self._free: list[tuple[Any, int, Any]] = []
        self._launch = library().cuLaunchKernelEx

    def _memory(self) -> tuple[Any, int, Any]:
        buffer = ctypes.create_string_buffer(self._struct.size + 64)
        start = -ctypes.addressof(buffer) % 64
        view = memoryview(buffer).cast("B")[start : start + self._struct.size]
        base = ctypes.addressof(buffer) + start
        pointers = (ctypes.c_void_p * max(1, len(self._offsets)))(*(base + offset for offset in self._offsets))
        return view, base, pointers

    def launch(
        self,
        kernel: LoadedKernel,
        grid: tuple[int, ...],
        block: tuple[int, int, int],
        shared: int,
        stream: int,
        attributes: tuple[int, int],
        values: Sequence[Any],
        device: int,
    ) -> None:
        """Enqueues the kernel; the driver has copied the arguments when this returns."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = self._memory()
        view, base, pointers = memory
        try:
            self._struct.pack_into(view, 0, *grid, *block, shared, stream, *attributes, *values)
        except struct.error as error:
            raise KernelError(f"{kernel.op}: the arguments {values!r} do not fit {self.kinds!r} ({error})") from error
        code = self._launch(base, kernel.handle, pointers, None)
        if code == _INVALID_CONTEXT:
            make_context_current(device)
            code = self._launch(base, kernel.handle, pointers, None)
        self._free.append(memory)
        if code:
            check(code, f"{kernel.op}: launching {kernel.name}, grid {grid}, block {block}, {shared} bytes shared")


LOCK = threading.RLock()  # held while something compiles or loads
