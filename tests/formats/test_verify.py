"""Weights that transformers loads in silence: missing, surplus, reshaped, NaN, of another dtype."""

from __future__ import annotations

import pytest
import torch

import onegpu
from onegpu.errors import CheckpointError
from onegpu.formats.verify import verify_loaded
from tests.damage import changed, damaged, refuses, set_one
from tests.tiny import tiny_model

Q, NORM, EMBED = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
WAYS = [{}, {"load_in_4bit": True}, {"load_in_8bit": True}]


def surplus(tensors):
    tensors["model.layers.0.mlp.surprise.weight"] = torch.ones(3)


CASES = {
    "missing linear": (lambda tensors: tensors.pop(Q), Q, "missing"),
    "missing norm": (lambda tensors: tensors.pop(NORM), NORM, "missing"),
    "missing embedding": (lambda tensors: tensors.pop(EMBED), EMBED, "missing"),
    "surplus": (surplus, "surprise", "unknown"),
    "wrong shape of a linear": (changed(Q, lambda t: t[:-1]), Q, "shape (63, 64)"),
    "wrong shape of a norm": (changed(NORM, lambda t: t[:-1]), NORM, "shape (63,)"),
    "transposed": (changed(DOWN, lambda t: t.t()), DOWN, "shape (112, 64)"),
    "flattened": (changed(Q, lambda t: t.view(-1)), Q, "shape (4096,)"),
    "NaN in a linear": (changed(Q, set_one(float("nan"))), Q, "NaN"),
    "infinity in a linear": (changed(Q, set_one(float("-inf"))), Q, "infinity"),
    "NaN in a norm": (changed(NORM, set_one(float("nan"))), NORM, "NaN"),
    "infinity in an embedding": (changed(EMBED, set_one(float("inf"))), EMBED, "infinity"),
    "integers in a linear": (changed(Q, lambda t: t.long()), Q, "I64"),
    "integers in a norm": (changed(NORM, lambda t: t.long()), NORM, "I64"),
}


@pytest.mark.parametrize("options", WAYS, ids=["float", "4bit", "8bit"])
@pytest.mark.parametrize("case", CASES)
def test_a_float_checkpoint(tiny, tmp_path, case, options):
    edit, tensor, reason = CASES[case]
    folder = damaged(tiny("llama"), tmp_path, edit)
    refuses(lambda: onegpu.AutoModelForCausalLM.from_pretrained(folder, **options), folder, tensor, reason)


@pytest.mark.parametrize("options", WAYS, ids=["float", "4bit", "8bit"])
def test_nan_in_an_expert(tiny, tmp_path, options):
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    folder = damaged(tiny("mixtral"), tmp_path, changed(name, set_one(float("nan"))))
    load = onegpu.AutoModelForCausalLM.from_pretrained
    refuses(lambda: load(folder, **options), folder, "model.layers.1.mlp.experts.gate_up_proj", "NaN")


def test_a_value_past_float16_cannot_go_to_8_bits(tiny, tmp_path):
    folder = damaged(tiny("llama"), tmp_path, changed(Q, set_one(1e6)))
    load = onegpu.AutoModelForCausalLM.from_pretrained
    refuses(lambda: load(folder, load_in_8bit=True), folder, Q, "float16")
    load(folder, load_in_4bit=True)


def test_not_strict_loads_what_is_missing_and_surplus_but_never_nan(tiny, tmp_path):
    load = onegpu.AutoModelForCausalLM.from_pretrained
    folder = damaged(tiny("llama"), tmp_path / "missing", lambda tensors: (tensors.pop(NORM), surplus(tensors)))
    assert load(folder, strict=False).model.norm.weight.isfinite().all()
    folder = damaged(tiny("llama"), tmp_path / "nan", changed(NORM, set_one(float("nan"))))
    refuses(lambda: load(folder, strict=False), folder, NORM, "NaN")


def test_a_mismatch_that_was_asked_for(tiny):
    model = onegpu.AutoModelForCausalLM.from_pretrained(tiny("llama"), vocab_size=64, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.shape == (64, 64)


def test_a_new_head_is_not_missing_but_a_lost_body_is(tiny, tmp_path):
    load = onegpu.AutoModelForSequenceClassification.from_pretrained
    assert load(tiny("llama"), num_labels=2).score.weight.shape == (2, 64)
    folder = damaged(tiny("llama"), tmp_path, lambda tensors: tensors.pop(Q))
    refuses(lambda: load(folder, num_labels=2), folder, Q, "missing")
    assert onegpu.AutoModel.from_pretrained(tiny("llama"), load_in_4bit=True).layers  # the head is surplus


def test_verify_loaded_counts_tensors_alike():
    model = tiny_model("llama")
    info = {"missing_keys": {"model.a", "model.b"}, "unexpected_keys": set(), "mismatched_keys": set()}
    model.config.architectures = ["LlamaForCausalLM"]
    with pytest.raises(CheckpointError, match=r"'model.a': is missing from the files \(2 tensors like it\)"):
        verify_loaded(model, info, "somewhere")
    verify_loaded(model, info, "somewhere", strict=False)
