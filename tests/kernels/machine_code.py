"""What a cubin says about itself: stack bytes of its kernels, and instructions that some compilers encode wrongly."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_FRAME_SIZE = 0x11  # EIATTR_FRAME_SIZE of a section .nv.info: a symbol, and its stack in bytes
_COPY_UNIFORM = 0xDAE  # LDGSTS with a uniform base register
_GRID_WAIT, _LOAD, _COPY, _BULK_COPY = 0x82E, 0x981, 0xFAE, 0x5B4
_WGMMA, _WGMMA_WAIT, _MOVE, _MOVE_BY_IMAD = 0xDF0, 0x9C5, 0x202, 0x224


def sections(code: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the sections of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", code, 0x28)
    size, count, names = struct.unpack_from("<HHH", code, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", code, table + i * size) for i in range(count)]  # name … offset, bytes
    strings = headers[names][4]
    for name, _, _, _, offset, length in headers:
        start = strings + name
        yield code[start : code.index(b"\0", start)].decode(), code[offset : offset + length]


def stack_bytes(code: bytes) -> int:
    """The largest stack of the kernels: registers that spilled and local arrays."""
    largest = 0
    for name, data in sections(code):
        at = 0
        while name == ".nv.info" and at < len(data):
            form, attribute, value = struct.unpack_from("<BBH", data, at)
            if form == 4 and attribute == _FRAME_SIZE:
                largest = max(largest, struct.unpack_from("<II", data, at + 4)[1])
            at += 4 + (value if form == 4 else 0)
    return largest


def static_shared(code: bytes) -> int:
    """Bytes of the kernels' arrays in shared memory whose size is fixed, with what the system reserves."""
    return sum(len(data) for name, data in sections(code) if name.startswith(".nv.shared"))


def copies_with_a_uniform_base(code: bytes) -> int:
    """Of the asynchronous copies. With a cache hint ptxas 13.0 encodes them as an illegal instruction."""
    found = 0
    for name, data in sections(code):
        if name.startswith(".text."):
            found += sum(
                struct.unpack_from("<H", data, at)[0] & 0xFFF == _COPY_UNIFORM for at in range(0, len(data), 16)
            )
    return found


def sums_copied_early(code: bytes, registers: int) -> int:
    """Moves that read one of the `registers` sums of a wgmma ahead of its wait: they may miss products."""
    found = 0
    for name, data in sections(code):
        sums, running = range(0), False
        for at in range(0, len(data) if name.startswith(".text.") else 0, 16):
            low, high = struct.unpack_from("<QQ", data, at)
            operation = low & 0xFFF
            if operation == _WGMMA:
                sums, running = range(low >> 16 & 0xFF, (low >> 16 & 0xFF) + registers), True
            elif operation == _WGMMA_WAIT:
                running = running and (high >> 8 & 0xFF) != 0  # how many groups may still run
            elif running and operation in (_MOVE, _MOVE_BY_IMAD):
                found += (low >> 32 if operation == _MOVE else high) & 0xFF in sums
    return found


def reads_before_the_wait(code: bytes) -> int:
    """Loads and copies from global memory in front of ``griddepcontrol.wait``, which is there."""
    found = 0
    for name, data in sections(code):
        if name.startswith(".text."):
            operations = [struct.unpack_from("<H", data, at)[0] & 0xFFF for at in range(0, len(data), 16)]
            ahead = operations[: operations.index(_GRID_WAIT)]
            found += sum(operation in (_LOAD, _COPY, _COPY_UNIFORM, _BULK_COPY) for operation in ahead)
    return found
