"""Damaged files: our errors or the right weights, never a crash, a hang or other weights.

Fixed damages with their reasons are in test_checkpoint.py; here hypothesis looks for those that nobody thought of.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import onegpu
from onegpu.convert.quantize_checkpoint import quantize_checkpoint
from onegpu.errors import ArgumentError, CheckpointError
from onegpu.formats.bitsandbytes import STATE_KEYS, find_quantized
from onegpu.formats.checkpoint import read_headers

OURS = (ArgumentError, CheckpointError)
SMALL = {
    "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 1, "tokenizer": False,
}  # fmt: skip
# The same examples in every run, on every machine.
FUZZ: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, Path]:
    """float: a checkpoint; nf4: of one file; int8: of shards with an index; mixtral: float experts."""
    from tests.tiny import tiny_model_dir

    base = tmp_path_factory.mktemp("fuzz")
    made = {"float": tiny_model_dir(base, "llama", **SMALL), "nf4": base / "nf4", "int8": base / "int8"}
    made["mixtral"] = tiny_model_dir(base, "mixtral", **SMALL)
    quantize_checkpoint(made["float"], made["nf4"], "nf4", double_quant=True, device="cpu")
    quantize_checkpoint(made["float"], made["int8"], "int8", max_shard_size=1500, device="cpu")
    return made


def damage(draw: st.DrawFn, raw: bytes, end: int) -> bytes:
    """Truncated, a bit flipped, a byte replaced, two bytes or two pieces exchanged; before `end`."""
    place, other = draw(st.integers(0, end - 1)), draw(st.integers(0, end - 1))
    kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "byte", "exchange", "reorder", "insert"]))
    changed = bytearray(raw)
    if kind == "flip":
        changed[place] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del changed[place:]
    elif kind == "byte":
        changed[place] = draw(st.integers(0, 255))
    elif kind == "exchange":
        changed[place], changed[other] = changed[other], changed[place]
    elif kind == "insert":
        changed[place:place] = draw(st.binary(min_size=1, max_size=4))
    else:
        low, high = sorted((place, other))
        middle = draw(st.integers(low, high))
        changed[low:high] = changed[middle:high] + changed[low:middle]
    return bytes(changed)


def header_end(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes, int], bytes]:
    """One damage, or two."""
    times = draw(st.sampled_from([1, 1, 1, 2]))

    def apply(raw: bytes, end: int) -> bytes:
        for _ in range(times):
            raw = damage(draw, raw, max(1, min(end, len(raw))))
        return raw

    return apply


@given(change=damages())
@settings(max_examples=400, **FUZZ)
def test_headers(small, tmp_path, change):
    raw = (small["nf4"] / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    file.write_bytes(change(raw, header_end(raw)))
    try:
        infos = read_headers([file])
    except CheckpointError:
        return
    size, position = file.stat().st_size, header_end(file.read_bytes())
    for info in sorted(infos, key=lambda info: (info.start, info.nbytes)):  # every byte has one owner
        assert info.start == position and info.nbytes >= 0
        position += info.nbytes
    assert position == size


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "I8", "BF16", "F4", "X9"]) | JSON,
        "shape": st.lists(st.integers(-2, 2**40), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 2**40), max_size=3) | JSON,
    }
)


@given(header=st.dictionaries(st.text(max_size=6), ENTRY | JSON, max_size=4) | JSON, data=st.binary(max_size=32))
@settings(max_examples=300, **FUZZ)
def test_headers_of_any_json(tmp_path, header, data):
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    try:
        infos = read_headers([file])
    except CheckpointError:
        return
    assert sum(info.nbytes for info in infos) == len(data)


@st.composite
def edits(draw: st.DrawFn) -> Callable[[list], list]:
    """Tensors dropped, doubled, renamed, of another dtype or shape; in any order."""

    def apply(infos: list) -> list:
        infos = draw(st.permutations(infos))
        for _ in range(draw(st.integers(0, 3))):
            place = draw(st.integers(0, len(infos) - 1))
            info = infos[place]
            kind = draw(st.sampled_from(["drop", "rename", "dtype", "shape", "ending"]))
            if kind == "drop":
                del infos[place]
                continue
            ending = draw(
                st.sampled_from(["SCB", "weight_format", "weight.absmax", f"weight.{STATE_KEYS[1]}", "weight"])
            )
            stem = info.name.partition(".weight")[0]
            infos[place] = replace(
                info,
                name={"rename": info.name + "x", "ending": f"{stem}.{ending}"}.get(kind, info.name),
                dtype=draw(st.sampled_from(["U8", "I8", "F32", "I64", "BF16"])) if kind == "dtype" else info.dtype,
                shape=(3, 5) if kind == "shape" else info.shape,
            )
        return infos

    return apply


@given(edit=edits(), kind=st.sampled_from(["nf4", "int8"]), bits=st.sampled_from([4, 8]))
@settings(max_examples=200, **FUZZ)
def test_sets_of_tensors(small, edit, kind, bits):
    infos = edit(read_headers(sorted(small[kind].glob("*.safetensors"))))
    try:
        entries = find_quantized(infos, bits)
    except CheckpointError:
        return
    needed = {"SCB"} if bits == 8 else {"weight.absmax", "weight.quant_map"}
    assert entries and all({"weight", *needed} <= entry.tensors.keys() for entry in entries.values())


def load_or_refuse(
    source: Path, folder: Path, name: str, change: Callable[[bytes, int], bytes], **options: Any
) -> None:
    """Load `source` with the file `name` changed: our error, or exactly the weights of the undamaged files."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(change(raw, header_end(raw) if name.endswith(".safetensors") else len(raw)))
    try:
        model = onegpu.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options)
    except OURS:
        return
    right = onegpu.AutoModelForCausalLM.from_pretrained(source, device_map="cpu", **options).state_dict()
    state = model.state_dict()
    assert state.keys() == right.keys()
    assert all(torch.equal(state[key], right[key]) for key in right)


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("nf4", "model.safetensors", {}),
        ("nf4", "config.json", {}),
        ("int8", "model.safetensors.index.json", {}),
        ("int8", "model-00002-of-*.safetensors", {}),
        ("mixtral", "model.safetensors", {"load_in_4bit": True}),
    ],
)
def test_whole_checkpoints(small, tmp_path, kind, name, options):
    name = next(small[kind].glob(name)).name

    @given(change=damages())
    @settings(max_examples=40, **FUZZ)
    def run(change):
        load_or_refuse(small[kind], tmp_path / "m", name, change, **options)

    run()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_quantising_damaged_checkpoints(small, tmp_path, name):
    (expected := tmp_path / "right").mkdir()
    quantize_checkpoint(small["mixtral"], expected / "out", "int8", device="cpu")
    weights = (expected / "out" / "model.safetensors").read_bytes()

    @given(change=damages())
    @settings(max_examples=25, **FUZZ)
    def run(change):
        for place in ("m", "out"):
            shutil.rmtree(tmp_path / place, ignore_errors=True)
        shutil.copytree(small["mixtral"], tmp_path / "m")
        raw = (tmp_path / "m" / name).read_bytes()
        damaged = change(raw, header_end(raw) if name.endswith(".safetensors") else len(raw))
        (tmp_path / "m" / name).write_bytes(damaged)
        try:
            quantize_checkpoint(tmp_path / "m", tmp_path / "out", "int8", device="cpu")
        except OURS:
            assert not (tmp_path / "out").exists()
            return
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights

    run()


@given(place=st.floats(0, 1), bit=st.integers(0, 7))
@settings(max_examples=25, **FUZZ)
def test_flipped_bits_in_the_data_load_or_are_refused(small, tmp_path, place, bit):
    """Codes and plain weights have no check sum; scales, tables and states do not let everything pass. No crash."""
    folder = tmp_path / "m"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(small["nf4"], folder)
    raw = bytearray((folder / "model.safetensors").read_bytes())
    start = header_end(bytes(raw))
    raw[start + int(place * (len(raw) - start - 1))] ^= 1 << bit
    (folder / "model.safetensors").write_bytes(bytes(raw))
    try:
        model = onegpu.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    except OURS:
        return
    with torch.no_grad():
        assert model(input_ids=torch.arange(8)[None]).logits.shape == (1, 8, model.config.vocab_size)
