"""Files that are not what they say: every way to damage one ends in an error that names it, before anything is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import onegpu
from onegpu.errors import CheckpointError
from onegpu.formats.checkpoint import TensorInfo, read_headers, read_tensor

SINGLE = "model.safetensors"


def header_of(raw: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def damage(raw: bytes) -> bytes:
        header, data = header_of(raw)
        changed = change(header)
        text = json.dumps(header if changed is None else changed).encode()
        return len(text).to_bytes(8, "little") + text + data

    return damage


def first(header: dict) -> dict:
    return next(entry for name, entry in header.items() if name != "__metadata__")


# What is done to the bytes of a file, and a word of the reason given.
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated by half": (lambda raw: raw[: len(raw) // 2], "bytes"),
    "truncated by one byte": (lambda raw: raw[:-1], "bytes"),
    "two trailing bytes": (lambda raw: raw + b"xx", "bytes"),
    "empty": (lambda raw: b"", "header"),
    "seven bytes": (lambda raw: raw[:7], "header"),
    "header length 2^40": (lambda raw: (2**40).to_bytes(8, "little") + raw[8:], "header"),
    "header length 2^63": (lambda raw: (2**63).to_bytes(8, "little") + raw[8:], "header"),
    "header is no JSON": (lambda raw: raw[:8] + b"!" + raw[9:], "JSON"),
    "header is a list": (with_header(lambda header: [1, 2]), "table"),
    "a pickle": (lambda raw: b"\x80\x04\x95" + raw, "header"),
    "unknown dtype": (with_header(lambda header: first(header).update(dtype="F31")), "F31"),
    "negative size": (with_header(lambda header: first(header).update(shape=[-1, -64])), "damaged"),
    "size of 2^62": (with_header(lambda header: first(header).update(shape=[2**31, 2**31])), "bytes"),
    "no offsets": (with_header(lambda header: first(header).pop("data_offsets") and None), "damaged"),
    "shape that is no list": (with_header(lambda header: first(header).update(shape="big")), "damaged"),
    "overlapping tensors": (
        with_header(lambda header: header.update(again={**first(header), "dtype": "F32"})),
        "starts at byte",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(tmp_path, damage):
    file = tmp_path / "some.safetensors"
    save_file({"a.weight": torch.ones(4, 64), "b": torch.zeros(3)}, file)
    change, reason = DAMAGES[damage]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        read_headers([file])
    assert caught.value.file == str(file) and reason in str(caught.value)


def test_a_deeply_nested_header(tmp_path):
    file = tmp_path / "deep.safetensors"
    text = b"[" * 100_000 + b"]" * 100_000
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="header"):
        read_headers([file])


@pytest.mark.parametrize("options", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}], ids=["float", "4bit", "8bit"])
@pytest.mark.parametrize("damage", ["truncated by half", "truncated by one byte", "two trailing bytes", "empty",
                                    "header length 2^40", "header is no JSON", "overlapping tensors"])  # fmt: skip
def test_a_model_in_a_damaged_file_is_not_loaded(tiny, tmp_path, damage, options):
    shutil.copytree(tiny("llama"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / SINGLE
    file.write_bytes(DAMAGES[damage][0](file.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        onegpu.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert str(tmp_path) in str(caught.value)


def test_every_flipped_bit_of_a_header_is_an_error_of_ours_or_harmless(tmp_path):
    file = tmp_path / "some.safetensors"
    save_file({"a.weight": torch.ones(4, 64), "b": torch.zeros(3)}, file)
    raw = file.read_bytes()
    for position in range(8 + int.from_bytes(raw[:8], "little")):
        for bit in (0, 3, 7):
            file.write_bytes(raw[:position] + bytes([raw[position] ^ 1 << bit]) + raw[position + 1 :])
            try:
                infos = read_headers([file])
            except CheckpointError:
                continue
            assert sum(info.nbytes for info in infos) == 4 * 64 * 4 + 3 * 4


def test_headers_say_what_is_there(tmp_path):
    tensors = {"a": torch.ones(4, 6, dtype=torch.bfloat16), "b": torch.arange(5), "none": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    infos = {info.name: info for info in read_headers([tmp_path / "x.safetensors"])}
    assert set(infos) == set(tensors)
    assert infos["a"].dtype == "BF16" and infos["a"].shape == (4, 6) and infos["a"].nbytes == 48
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(infos[name]), tensor)


def test_a_file_that_ends_within_a_tensor(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(64)}, file)
    (info,) = read_headers([file])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends within it"):
        read_tensor(info)
    with pytest.raises(CheckpointError, match="no dtype for F4"):
        read_tensor(TensorInfo("a", str(file), "F4", (2,), 1))


def test_one_name_in_two_files(tmp_path):
    files: list[Path] = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file in files:
        save_file({"same": torch.ones(2)}, file)
    with pytest.raises(CheckpointError) as caught:
        read_headers(files)
    assert caught.value.tensor == "same" and all(file.name in str(caught.value) for file in files)


def test_a_whole_file_is_left_as_it_is(tiny):
    names = {info.name for info in read_headers([tiny("llama") / SINGLE])}
    assert names == set(load_file(tiny("llama") / SINGLE))
