"""A fingerprint changes with everything that a captured step would not follow, and with nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import onegpu
from onegpu.engine.fingerprint import fingerprint, runs_python
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    "same",
    [
        lambda m: m.lm_head.weight.data.mul_(2),
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
        lambda m: m.lm_head.weight.requires_grad_(False),
        lambda m: m(torch.tensor([[5, 6]])),
        lambda m: m.eval(),
    ],
    ids=["in place", "load_state_dict", "requires_grad", "forward", "eval"],
)
def test_what_a_graph_follows_leaves_it_as_it_is(same):
    model = tiny_model("llama")
    with torch.no_grad():
        before = fingerprint(model)
        same(model)
        assert fingerprint(model) == before


def replace_norm(model):
    model.model.norm = copy.deepcopy(model.model.norm)


def scale(model):
    model.model.layers[0].self_attn.scaling *= 2


def assign(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.float64),
        lambda m: m.half().float(),
        lambda m: setattr(m.lm_head.weight, "data", m.lm_head.weight.data.clone()),
        lambda m: m.train(),
        lambda m: m.set_attn_implementation("eager"),
        lambda m: onegpu.optimize(m, quantize="nf4"),
        replace_norm,
        scale,
        assign,
    ],
    ids=["to", "half", "data", "train", "attention", "optimize", "module", "number", "assign"],
)
def test_what_it_does_not_follow_changes_it(change):
    model = tiny_model("llama")
    before, kept = fingerprint(model), [p.data for p in model.parameters()]
    change(model)
    assert kept and fingerprint(model) != before


def test_adapters_change_it():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config, adapter_name="one")
    model.add_adapter("two", config)
    seen = [fingerprint(model)]
    for act in (
        lambda: model.set_adapter("two"),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.merge_adapter(["two"]),
    ):
        act()
        assert fingerprint(model) != seen[-1]
        seen.append(fingerprint(model))


def test_scales_of_quantised_weights_belong_to_it():
    model = tiny_model("llama")
    onegpu.optimize(model, quantize="nf4")
    before = fingerprint(model)
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    state.absmax = state.absmax.clone()
    assert fingerprint(model) != before


def test_hooks_and_replaced_forwards_want_python():
    model = tiny_model("llama")
    assert runs_python(model) is None
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    assert "model.norm" in runs_python(model)
    handle.remove()
    handle = model.model.norm.register_forward_pre_hook(lambda *_: None)
    assert "hook" in runs_python(model)
    handle.remove()
    assert runs_python(model) is None
    model.model.norm.forward = model.model.norm.forward
    assert "forward method of its own" in runs_python(model)
    del model.model.norm.forward
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "every module" in runs_python(model)
    finally:
        handle.remove()


def test_transformers_idle_hooks_do_not():
    model = tiny_model("llama", attn_implementation="eager")
    model(torch.tensor([[5, 6]]), output_attentions=True)
    assert runs_python(model) is None
