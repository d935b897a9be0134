"""Reads what a GGUF file says about itself, believing none of it.

Layout (little-endian): magic `GGUF`, version, tensor count, metadata count; the metadata (key, type, value); one record
per tensor (name, dimensions, storage type, offset); padding; the tensors' bytes. Every length in it is checked against
the size of the file before anything is allocated or read, so that a file cut short, or one that claims 2⁴⁰ tensors, is
refused in a sentence and not by a crash deep in a reader. The weights themselves are left to transformers.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from onegpu.errors import CheckpointError

# ggml's storage types: number -> (name, elements per block, bytes per block).
STORAGE: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}  # fmt: skip

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_STRING = 64 << 20  # a chat template is kilobytes; a longer one is a broken length
_FIX = "Download or convert the file again"


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor lies: `shape` in torch's order, `storage` as ggml names it, `offset` from the data's start."""

    name: str
    shape: tuple[int, ...]
    storage: str
    offset: int
    bytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself, checked against its size."""

    path: Path
    architecture: str
    metadata: dict[str, Any] = field(repr=False)
    tensors: tuple[TensorRecord, ...] = field(repr=False)

    @property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def dtype(self) -> str:
        """Name of the torch dtype the file was written in: its half type if it holds no blocks, else float32."""
        kinds = {tensor.storage for tensor in self.tensors}
        if kinds <= {"F32", "F16", "BF16"}:
            # The norms are fp32 beside half-precision matrices, so the half type is the model's.
            return "bfloat16" if "BF16" in kinds else "float16" if "F16" in kinds else "float32"
        return "float32"


def read_header(path: str | os.PathLike[str]) -> Header:
    """The file's metadata and tensor table; no tensor data is read.

    Raises:
        CheckpointError: not a GGUF file, an unknown version, cut short, a length or an offset that leads outside the
            file, an unknown storage type, or one part of a file that was split.
    """
    path = Path(path)
    with open(path, "rb") as stream:
        return _Reader(path, stream).header()


class _Reader:
    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path = path
        self.stream = stream
        self.size = os.fstat(stream.fileno()).st_size

    def header(self) -> Header:
        magic = self.stream.read(4)
        if magic != b"GGUF":
            found = "is empty" if not magic else f"starts with {magic!r}, not with b'GGUF'"
            self.fail(f"not a GGUF file: it {found}", fix="Pass a .gguf file")
        version = self.scalar("I")
        if version not in _VERSIONS:
            self.fail(f"GGUF version {version} is not supported (2 and 3 are)", fix="Convert the model again")
        tensor_count, metadata_count = self.scalar("Q"), self.scalar("Q")
        # A tensor record takes at least 24 bytes, a metadata entry at least 13.
        if tensor_count * 24 + metadata_count * 13 > self.size:
            self.fail(
                f"it claims {tensor_count} tensors and {metadata_count} metadata entries, "
                f"more than its {self.size} bytes can hold"
            )
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = self.string("a metadata key")
            metadata[key] = self.value(self.scalar("I"), key)
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            self.fail("it does not name an architecture (metadata key general.architecture)")
        parts = metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            self.fail(
                f"it is one part of {parts}", fix="Join the parts first with llama.cpp's `llama-gguf-split --merge`"
            )
        tensors = tuple(self.tensor() for _ in range(tensor_count))
        if not tensors:
            self.fail("it holds no tensors")
        self.check_data(tensors, metadata.get("general.alignment", 32))
        self.check_sizes(tensors, metadata, architecture)
        return Header(self.path, architecture, metadata, tensors)

    def tensor(self) -> TensorRecord:
        name = self.string("a tensor name")
        dimensions = self.scalar("I")
        if not 1 <= dimensions <= 4:
            self.fail(f"it has {dimensions} dimensions, GGUF allows 1 to 4", tensor=name)
        # ggml stores the fastest-moving dimension first, torch last.
        shape = tuple(reversed([self.scalar("Q") for _ in range(dimensions)]))
        kind, offset = self.scalar("I"), self.scalar("Q")
        if kind not in STORAGE:
            self.fail(
                f"its storage type {kind} is unknown", tensor=name, fix="Use a file in a common type such as Q4_K_M"
            )
        storage, block, block_bytes = STORAGE[kind]
        if shape[-1] % block or 0 in shape:
            self.fail(f"its shape {shape} does not consist of whole {storage} blocks of {block}", tensor=name)
        return TensorRecord(name, shape, storage, offset, prod(shape) // block * block_bytes)

    def check_data(self, tensors: tuple[TensorRecord, ...], alignment: object) -> None:
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            self.fail(f"its alignment is {alignment!r}, not a small positive number")
        start = -(-self.stream.tell() // alignment) * alignment
        names: set[str] = set()
        for tensor in tensors:
            if tensor.name in names:
                self.fail("it stands in the file twice", tensor=tensor.name)
            names.add(tensor.name)
            if tensor.offset % alignment:
                self.fail(f"its offset {tensor.offset} is no multiple of the alignment {alignment}", tensor=tensor.name)
            missing = start + tensor.offset + tensor.bytes - self.size
            if missing > 0:
                self.fail(
                    f"its data ends {missing} bytes after the end of the file: the file is cut short", tensor.name
                )
        end = 0
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                self.fail("its data overlaps another tensor's", tensor=tensor.name)
            end = tensor.offset + tensor.bytes

    def check_sizes(self, tensors: tuple[TensorRecord, ...], metadata: dict[str, Any], architecture: str) -> None:
        """Two figures from which a model is built before its tensors are looked at: a lie costs memory and minutes."""
        blocks = {tensor.name.split(".")[1] for tensor in tensors if tensor.name.startswith("blk.")}
        claimed = metadata.get(f"{architecture}.block_count")
        if isinstance(claimed, int) and blocks and claimed > len(blocks):
            self.fail(f"it claims {claimed} blocks and holds the tensors of {len(blocks)}")
        width = metadata.get(f"{architecture}.embedding_length")
        for tensor in tensors:
            if tensor.name == "token_embd.weight" and isinstance(width, int) and tensor.shape[-1] != width:
                self.fail(f"its shape is {tensor.shape}, the metadata says {width} columns", tensor=tensor.name)

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string(f"metadata {key}")
        if kind != _ARRAY:
            self.fail(f"metadata {key} has the unknown type {kind}")
        element, count = self.scalar("I"), self.scalar("Q")
        if element in _SCALARS:
            layout = struct.Struct(f"<{_SCALARS[element]}")
            self.check_room(count * layout.size, f"metadata {key}")
            return [value for (value,) in layout.iter_unpack(self.stream.read(count * layout.size))]
        if element != _STRING:
            self.fail(f"metadata {key} is an array of the unknown type {element}")
        self.check_room(count * 8, f"metadata {key}")
        return [self.string(f"metadata {key}") for _ in range(count)]

    def scalar(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        blob = self.stream.read(size)
        if len(blob) < size:
            self.fail("the file ends inside its header: it is cut short")
        return struct.unpack(f"<{code}", blob)[0]

    def string(self, what: str) -> str:
        length = self.scalar("Q")
        if length > _MAX_STRING:
            self.fail(f"{what} claims a length of {length} bytes")
        self.check_room(length, what)
        try:
            return self.stream.read(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                file=self.path, reason=f"{what} is not UTF-8 text ({error.reason})", fix=_FIX
            ) from error

    def check_room(self, wanted: int, what: str) -> None:
        left = self.size - self.stream.tell()
        if wanted > left:
            self.fail(f"{what} claims {wanted} bytes where {left} are left: the file is cut short or damaged")

    def fail(self, reason: str, tensor: str | None = None, fix: str = _FIX) -> NoReturn:
        raise CheckpointError(file=self.path, tensor=tensor, reason=reason, fix=fix)
