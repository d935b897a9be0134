"""The registry of conversions, and its first rule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onegpu.convert.attention_rule import UseAttention
from onegpu.convert.optimize import State
from onegpu.convert.report import Report
from onegpu.convert.rules import RULES, QuantizeWeights
from onegpu.convert.structure_rule import UseKernels
from onegpu.errors import ArgumentError
from onegpu.formats.bitsandbytes import Settings
from tests.tiny import tiny_model


def test_the_registry():
    assert [type(rule) for rule in RULES] == [QuantizeWeights, UseAttention, UseKernels]


def test_no_settings_no_change_of_weights():
    model, report = tiny_model("llama"), Report("optimize")
    before = dict(model.named_parameters())
    for rule in RULES:
        rule.apply(model, None, State(), False, report)
    assert {change.after for change in report.changes} == {"onegpu attention", "onegpu RMSNorm", "onegpu GatedMLP"}
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_apply_and_restore_are_inverse_and_noted():
    model, state = tiny_model("mixtral"), State()
    implementation = model.config._experts_implementation
    modules = dict(model.named_modules())
    parameter = model.model.layers[0].mlp.experts.down_proj
    done, undone = Report("optimize"), Report("restore")
    rule = QuantizeWeights()
    rule.apply(model, Settings("nf4"), state, True, done)
    assert model.config._experts_implementation == "eager"
    assert state.attributes == {"_experts_implementation": implementation}
    assert len(done.swapped) == len(state.originals) == 2 * (4 + 2)
    rule.restore(model, state, undone)
    assert {change.name for change in undone.changes} == {change.name for change in done.swapped}
    assert dict(model.named_modules()) == modules
    assert model.model.layers[0].mlp.experts.down_proj is parameter


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nothing_changes_where_a_weight_is_no_number(value):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[0, 0] = value
    with pytest.raises(ArgumentError, match="NaN or infinity in 1"):
        QuantizeWeights().apply(model, Settings("nf4"), State(), False, Report("optimize"))
    assert type(model[0]) is nn.Linear and model[0].weight.numel() == 64 * 64
