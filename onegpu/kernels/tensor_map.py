"""TMA descriptors made on the host: passed to a kernel by value, and kept, since encoding one takes microseconds."""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache

import torch

from onegpu.kernels import driver

# CUtensorMapDataType of cuda.h
_DTYPES = {
    torch.uint8: 0, torch.int8: 0, torch.uint16: 1, torch.uint32: 2, torch.int32: 3, torch.int64: 5,
    torch.float16: 6, torch.float32: 7, torch.float64: 8, torch.bfloat16: 9,
}  # fmt: skip
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_L2_PROMOTION_128 = 2
# Of the second word; wrong for tensors under 128 KiB in drivers up to 13.1, so CUTLASS and Triton clear it too.
_SMALL_BIT = 1 << 21


def tensor_map(tensor: torch.Tensor, box: tuple[int, ...], swizzle: int = 0, nan_fill: bool = False) -> bytes:
    """The descriptor (a CUtensorMap, 128 bytes) of a tensor, for an argument of kind ``T``.

    Args:
        tensor: up to five dimensions, the last one contiguous, base and other strides multiples of 16 bytes.
        box: elements of each dimension that one copy moves, in the order of the tensor's dimensions, each <= 256.
        swizzle: bytes, 0, 32, 64 or 128.
        nan_fill: elements out of bounds are NaN instead of zero.

    Raises:
        KernelError: where the driver does not take it.
    """
    mode = _SWIZZLES[swizzle]
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    return encode(tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.element_size(), shape, strides, box, mode, nan_fill)


def words_map(address: int, rows: int, columns: int, box: tuple[int, int], swizzle: int = 0) -> bytes:
    """The same of contiguous elements of two bytes, ``[rows, columns]``, at an address, whatever they mean."""
    return encode(address, _DTYPES[torch.uint16], 2, (rows, columns), (columns, 1), box, _SWIZZLES[swizzle], False)


def byte_map(address: int, rows: int, width: int, box: tuple[int, int], swizzle: int = 0) -> bytes:
    """The same of bytes, ``[rows, width]``."""
    return encode(address, _DTYPES[torch.uint8], 1, (rows, width), (width, 1), box, _SWIZZLES[swizzle], False)


@lru_cache(maxsize=4096)
def encode(
    address: int,
    kind: int,
    itemsize: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
    nan_fill: bool,
) -> bytes:
    """As `tensor_map`, of an address and the driver's numbers for dtype and swizzle. Depends on nothing else."""
    rank, cuda = len(shape), driver.library()
    memory = ctypes.create_string_buffer(128 + 64)
    place = ctypes.addressof(memory) + -ctypes.addressof(memory) % 64
    outer = [stride * itemsize for stride in reversed(strides[:-1])]
    code = cuda.cuTensorMapEncodeTiled(
        ctypes.c_void_p(place),
        kind,
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * rank)(*outer, 0),
        (ctypes.c_uint32 * rank)(*reversed(box)),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,
        swizzle,
        _L2_PROMOTION_128,
        int(nan_fill),
    )
    driver.check(code, f"a TMA descriptor of shape {shape}, strides {strides}, box {box}")
    made = ctypes.string_at(place, 128)
    extent = sum((size - 1) * stride * itemsize for size, stride in zip(shape, strides, strict=True))
    if extent + 1 < 128 * 1024 and driver.driver_version() <= 13010:
        words = list(struct.unpack("<16Q", made))
        words[1] &= ~_SMALL_BIT
        made = struct.pack("<16Q", *words)
    return made
