"""The structural rule: which weights are quantised, which stay and why, and the modules that take their place."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from onegpu.convert.quantized import (
    Target,
    _skip_reason,
    default_skips,
    find_targets,
    is_conv1d,
    original_linear,
    part_names,
    quantized_experts,
    quantized_linear,
)
from onegpu.formats.bitsandbytes import Settings
from onegpu.nn import ExpertStack4bit, ExpertStack8bit, Linear4bit, Linear8bitLt
from tests.tiny import tiny_model

NF4, INT8 = Settings("nf4"), Settings("int8")


@pytest.mark.parametrize(
    ("key", "name", "matches"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("mlp.up_proj", "model.layers.0.mlp.up_proj", True),
        ("layers.0", "model.layers.0.mlp.up_proj", True),
        ("layers.1", "model.layers.10.mlp.up_proj", False),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("model.layers.*.mlp", "model.layers.3.mlp.up_proj", True),
        ("model.layers.0", "other.model.layers.0.x", True),
        # What transformers would take for regular expressions is literal: a file cannot hang the loader.
        (".*", "lm_head", False),
        ("(a+)+$", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", False),
        ("a[b]", "x.a[b]", True),
        ("a?", "ab", False),
    ],
)
def test_what_a_skip_list_matches(key, name, matches):
    assert (_skip_reason(name, {key: "reason"}) == "reason") == matches


@pytest.mark.parametrize(
    ("model_type", "skipped"),
    [
        ("llama", {"lm_head": "last module"}),
        ("qwen2", {"lm_head": "tied weights"}),
        ("gpt2", {"lm_head": "tied weights"}),
        ("falcon_old", {"lm_head": "tied weights"}),
    ],
)
def test_the_head_stays(model_type, skipped):
    model = tiny_model(model_type)
    skips = default_skips(model)
    assert skipped.keys() <= skips.keys()
    targets, left = find_targets(model, NF4)
    assert [change.name for change in left] == list(skipped) and all(change.reason for change in left)
    assert not {target.name for target in targets} & set(skips)


def test_t5_keeps_what_it_needs_in_float32():
    targets, left = find_targets(tiny_model("t5"), NF4)
    assert {change.name.rpartition(".")[2] for change in left} == {"lm_head", "wo"}
    assert any(change.reason == "kept in float32 by the model" for change in left)
    assert not any(target.name.endswith(".wo") for target in targets)


def test_a_list_adds_to_the_default_or_replaces_it():
    model = tiny_model("llama")
    more = Settings("nf4", skip=("down_proj",))
    assert {c.name.rpartition(".")[2] for c in find_targets(model, more)[1]} == {"lm_head", "down_proj"}
    instead = Settings("nf4", skip=("down_proj",), keep_default_skips=False)
    assert {c.name.rpartition(".")[2] for c in find_targets(model, instead)[1]} == {"down_proj"}


def test_experts_are_found_and_named_as_the_checkpoint_has_them():
    model = tiny_model("mixtral")
    experts = [target for target in find_targets(model, NF4)[0] if target.kind == "experts"]
    assert experts[:2] == [
        Target("model.layers.0.mlp.experts.gate_up_proj", "experts", ("{}.w1.weight", "{}.w3.weight")),
        Target("model.layers.0.mlp.experts.down_proj", "experts", ("{}.w2.weight",)),
    ]
    assert part_names(model, "model.layers.0.mlp.experts.other") == ("{}.other.weight",)


class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize("settings", [NF4, Settings("fp4", True), INT8], ids=["nf4", "fp4 double", "int8"])
@pytest.mark.parametrize("make", [nn.Linear, Subclass, lambda k, n: Conv1D(n, k), lambda k, n: nn.Linear(k, n, False)])
def test_there_and_back(make, settings):
    source = make(64, 32).eval()
    weight = source.weight.detach().t() if is_conv1d(source) else source.weight.detach()
    new = quantized_linear(source, settings, "cpu")
    assert isinstance(new, Linear8bitLt if settings.bits == 8 else Linear4bit)
    assert (new.in_features, new.out_features) == (64, 32) and not new.training
    assert (new.bias is None) == (getattr(source, "bias", None) is None)
    new.weight = new.weight._like(weight.clone(), None).to("cpu")
    if new.bias is not None:
        new.bias = source.bias
    back = original_linear(new, torch.float32)
    assert type(back) is type(source) and back.weight.shape == source.weight.shape
    assert (back.weight - source.weight).abs().max() < 0.25 * source.weight.abs().max()
    x = torch.randn(3, 64)
    assert (back(x) - source(x)).abs().max() < 1


def test_empty_stacks_take_no_memory():
    parameter = torch.empty(4, 32, 64, device="meta", dtype=torch.bfloat16)
    names = ("{}.a.weight", "{}.b.weight")
    for settings, kind in ((NF4, ExpertStack4bit), (INT8, ExpertStack8bit)):
        stack = quantized_experts(parameter, names, settings)
        assert isinstance(stack, kind) and stack.device.type == "meta" and stack.dtype == torch.bfloat16
        assert stack.part_shape == (16, 64) and stack.names == names
