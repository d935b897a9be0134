"""Files in bitsandbytes' format: the same bytes as bitsandbytes' own, readable on both sides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import onegpu
from tests.bnb_process import FILES_ONLY, FORMATS, OURS_ONLY, SAME_FILES, Checkpoints, checkpoints, logits
from tests.tiny import AUTO_CLASS

KINDS = list(FORMATS)
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}  # of float32, over two layers


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Checkpoints:
    pytest.importorskip("bitsandbytes")
    return checkpoints(tmp_path_factory)


def load(model_type: str, path: Path, **options):
    return getattr(onegpu, AUTO_CLASS[model_type]).from_pretrained(path, **options)


def differing_files(ours: Path, theirs: Path) -> list[str]:
    names = {file.name for folder in (ours, theirs) for file in folder.iterdir()}
    return [
        name
        for name in sorted(names)
        if not ((ours / name).is_file() and (theirs / name).is_file())
        or (ours / name).read_bytes() != (theirs / name).read_bytes()
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", [*SAME_FILES, *FILES_ONLY])
def test_our_files_are_theirs_byte_for_byte(made, model_type, kind):
    assert differing_files(made.ours(model_type, kind), made.theirs(model_type, kind)) == []


@pytest.mark.parametrize(("model_type", "kind"), [("llama", "sharded_nf4"), ("gpt2", "sharded_int8")])
def test_shards_are_theirs_byte_for_byte(made, model_type, kind):
    ours = made.ours(model_type, kind)
    assert len(list(ours.glob("*.safetensors"))) > 2
    assert differing_files(ours, made.theirs(model_type, kind)) == []
    torch.testing.assert_close(logits(load(model_type, ours)), made.logits("theirs", model_type, kind), **ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", SAME_FILES)
def test_theirs_load_here(made, model_type, kind):
    theirs = made.logits("theirs", model_type, kind)
    torch.testing.assert_close(logits(load(model_type, made.theirs(model_type, kind))), theirs, **ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", SAME_FILES)
def test_ours_load_there(made, model_type, kind):
    torch.testing.assert_close(
        made.logits("ours", model_type, kind), made.logits("theirs", model_type, kind), rtol=0, atol=0
    )


@pytest.mark.parametrize("kind", ["nf4_double", "int8"])
@pytest.mark.parametrize("model_type", OURS_ONLY)
def test_what_bitsandbytes_cannot_quantise_is_written_for_it_in_16_bits(made, model_type, kind):
    path = made.ours(model_type, kind)
    model = load(model_type, path)
    torch.testing.assert_close(made.logits("ours", model_type, kind), logits(model), **ROUNDING)
    # Falcon has no layer left that is quantised: the files are an ordinary model's.
    said = "quantization_config" in json.loads((path / "config.json").read_text())
    assert said == any(isinstance(m, onegpu.nn.Linear4bit | onegpu.nn.Linear8bitLt) for m in model.modules())
    assert said == (model_type == "mixtral")


def test_a_skip_list_adds_to_the_default_and_loads_on_both_sides(made):
    path = made.ours("llama", "skips")
    saved = json.loads((path / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert saved[:2] == ["q_proj", "mlp.up_proj"] and "lm_head" in saved
    assert differing_files(path, made.theirs("llama", "skips")) == []
    model = load("llama", path)
    layer = model.model.layers[0]
    assert type(model.lm_head) is type(layer.self_attn.q_proj) is type(layer.mlp.up_proj) is torch.nn.Linear
    assert isinstance(layer.self_attn.k_proj, onegpu.nn.Linear4bit)
    torch.testing.assert_close(made.logits("ours", "llama", "skips"), logits(model), **ROUNDING)
