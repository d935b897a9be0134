"""What is in a checkpoint, from the headers of its safetensors files, before anything is loaded.

The header: an 8-byte little-endian length, then JSON with dtype, shape and byte range of every tensor
(safetensors format, "Format" in its README). Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from onegpu.errors import CheckpointError

_HEADER_LIMIT = 100_000_000
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8,
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
TORCH_DTYPES = {
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64, "C64": torch.complex64, "F32": torch.float32,
    "I32": torch.int32, "U32": torch.uint32, "F16": torch.float16, "BF16": torch.bfloat16, "I16": torch.int16,
    "U16": torch.uint16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_INTEGERS = frozenset({"I64", "U64", "I32", "U32", "I16", "U16", "BOOL"})
_FIX = "download or save the file again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: dtype in safetensors' spelling ("BF16"), shape, size in bytes, first byte in the file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int = 0


def read_headers(files: Iterable[str | Path]) -> list[TensorInfo]:
    """Every tensor of the safetensors ``files``.

    Raises:
        CheckpointError: a file is truncated, has bytes that no tensor owns, overlapping or mis-sized tensors, an
            unknown dtype, or a header that is no JSON; two files hold the same name; a weight is stored as integers
            that are no codes.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in _read_header(Path(file)):
            if info.name in tensors:
                raise CheckpointError(
                    file=file, tensor=info.name, reason=f"is also in {tensors[info.name].file}", fix=_FIX
                )
            if info.dtype in _INTEGERS and info.name.endswith((".weight", ".bias")):
                # transformers casts it in silence. Codes of quantised weights are bytes, or have names of their own.
                raise CheckpointError(
                    file=file, tensor=info.name, reason=f"is stored as {info.dtype}, weights are floats", fix=_FIX
                )
            tensors[info.name] = info
    return list(tensors.values())


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """One tensor, read into memory of its own.

    (Not mapped: the pages of a mapped file count as this process's memory as long as the file is open.)

    Raises:
        CheckpointError: its dtype has no counterpart in torch, or the file ends before it does.
    """
    dtype = TORCH_DTYPES.get(info.dtype)
    if dtype is None:
        raise CheckpointError(file=info.file, tensor=info.name, reason=f"torch has no dtype for {info.dtype}")
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    with open(info.file, "rb", buffering=0) as stream:
        stream.seek(info.start)
        view, done = raw.numpy().data, 0
        while done < info.nbytes:  # one read gives 2 GiB at most
            count = stream.readinto(view[done:])
            if not count:
                raise CheckpointError(file=info.file, tensor=info.name, reason="the file ends within it", fix=_FIX)
            done += count
    return raw.view(dtype).reshape(info.shape)


def _read_header(file: Path) -> list[TensorInfo]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_HEADER_LIMIT, size - 8):
            raise CheckpointError(
                file=file, reason=f"its header claims {length} bytes of a file of {size}: truncated or no safetensors",
                fix=_FIX,
            )  # fmt: skip
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(file=file, reason=f"its header is not JSON ({error})", fix=_FIX) from None
    if not isinstance(header, dict):
        raise CheckpointError(file=file, reason="its header is no table of tensors", fix=_FIX)
    infos, ranges = [], []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        info, begin, end = _parse(file, name, entry, 8 + length)
        infos.append(info)
        ranges.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            raise CheckpointError(file=file, tensor=name, reason=f"starts at byte {begin}, not {position}", fix=_FIX)
        position = end
    if position != size - 8 - length:
        raise CheckpointError(
            file=file, reason=f"holds {size - 8 - length} bytes of tensors, its header describes {position}", fix=_FIX
        )
    return infos


def _parse(file: Path, name: str, entry: object, data: int) -> tuple[TensorInfo, int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]  # type: ignore[index]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole or not isinstance(dtype, str):
        raise CheckpointError(file=file, tensor=name, reason=f"its header entry {entry!r:.200} is damaged", fix=_FIX)
    if dtype not in _BITS:
        raise CheckpointError(file=file, tensor=name, reason=f"its dtype {dtype!r} is unknown", fix=_FIX)
    if math.prod(shape) * _BITS[dtype] != (end - begin) * 8:
        raise CheckpointError(
            file=file, tensor=name, reason=f"{dtype} {shape} does not take {end - begin} bytes", fix=_FIX
        )
    return TensorInfo(name, str(file), dtype, shape, end - begin, data + begin), begin, end
