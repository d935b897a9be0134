from __future__ import annotations

import struct
from pathlib import Path

import pytest

from onegpu.errors import CheckpointError
from onegpu.formats.gguf_header import read_header
from tests.tiny_gguf import tiny_gguf_tensors, write_tiny_gguf

pytest.importorskip("gguf", reason="the gguf package writes the files of these tests")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


def test_what_the_file_says(tiny: Path) -> None:
    header = read_header(tiny)
    tensors = tiny_gguf_tensors()
    assert header.architecture == "llama" and header.dtype == "float32"
    assert {tensor.name: tensor.shape for tensor in header.tensors} == {n: a.shape for n, a in tensors.items()}
    assert header.elements == sum(array.size for array in tensors.values())
    assert header.metadata["llama.context_length"] == 256 and len(header.metadata["tokenizer.ggml.tokens"]) == 128


def test_storage_table_agrees_with_the_gguf_package() -> None:
    import gguf

    from onegpu.formats.gguf_header import STORAGE

    for number, (name, block, size) in STORAGE.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (int(kind), gguf.GGML_QUANT_SIZES[kind]) == (number, (block, size))


@pytest.mark.parametrize("kept", [0, 1, 3, 4, 8, 23, 24, 40, 500, 3000, -1])
def test_cut_short_anywhere(tiny: Path, kept: int) -> None:
    tiny.write_bytes(tiny.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
        read_header(tiny)


def test_says_how_much_is_missing(tiny: Path) -> None:
    tiny.write_bytes(tiny.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_down\.weight.*100 bytes after the end"):
        read_header(tiny)


@pytest.mark.parametrize(
    ("offset", "blob", "reason"),
    [
        (0, b"GGML", "not a GGUF file"),
        (0, b"PK\x03\x04", "not a GGUF file"),
        (4, struct.pack("<I", 99), "version 99"),
        (4, struct.pack("<I", 1), "version 1"),
        (8, struct.pack("<Q", 1 << 40), "claims 1099511627776 tensors"),
        (16, struct.pack("<Q", 1 << 62), "metadata entries"),
        (24, struct.pack("<Q", 1 << 63), "a metadata key claims"),
        (32, b"\xff\xfe\xfd", "not UTF-8"),
    ],
)
def test_a_lying_header(tiny: Path, offset: int, blob: bytes, reason: str) -> None:
    data = bytearray(tiny.read_bytes())
    data[offset : offset + len(blob)] = blob
    tiny.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason):
        read_header(tiny)


def record(tiny: Path, name: str) -> tuple[bytearray, int]:
    """The file, and where the tensor's record goes on after its name: dimensions, sizes, type, offset."""
    data = bytearray(tiny.read_bytes())
    return data, data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)


@pytest.mark.parametrize(
    ("skip", "blob", "reason"),
    [
        (0, struct.pack("<I", 9), "9 dimensions"),
        (4, struct.pack("<Q", 1 << 60), "cut short"),
        (4, struct.pack("<Q", 0), "whole F32 blocks"),
        (4, struct.pack("<Q", 60), "the metadata says 64 columns"),
        (20, struct.pack("<I", 77), "storage type 77"),
        (24, struct.pack("<Q", 3), "no multiple of the alignment"),
        (24, struct.pack("<Q", 1 << 50), "cut short"),
        (24, struct.pack("<Q", 32), "overlaps"),
    ],
)
def test_a_lying_tensor_record(tiny: Path, skip: int, blob: bytes, reason: str) -> None:
    data, place = record(tiny, "token_embd.weight")
    data[place + skip : place + skip + len(blob)] = blob
    tiny.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason):
        read_header(tiny)


def test_more_blocks_claimed_than_held(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="claims 20000 blocks and holds the tensors of 2"):
        read_header(write_tiny_gguf(tmp_path / "deep.gguf", block_count=20000))


def test_one_part_of_a_split_file(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "part.gguf"), "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", tiny_gguf_tensors()["token_embd.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"one part of 3.*llama-gguf-split"):
        read_header(tmp_path / "part.gguf")


def test_flipped_bits_never_crash_the_reader(tiny: Path) -> None:
    """Each byte of the header's start and a spread of the rest, damaged one at a time: read or refused, no more."""
    data = tiny.read_bytes()
    for place in [*range(200), *range(200, 6000, 37)]:
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        tiny.write_bytes(damaged)
        try:
            read_header(tiny)
        except CheckpointError as error:
            assert error.file == str(tiny)
