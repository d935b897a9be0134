"""What is set aside is not seen, and comes back where it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onegpu.nn.set_aside import set_aside


def module() -> nn.Module:
    made = nn.Linear(2, 3)
    for name in ("first", "second", "third"):
        made.register_buffer(name, torch.ones(1))
    return made


def test_names_are_hidden_inside_and_back_in_order() -> None:
    layer = module()
    before = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    with set_aside(layer, "weight", "second", "not there"):
        assert [name for name, _ in layer.named_parameters()] == ["bias"]
        assert [name for name, _ in layer.named_buffers()] == ["first", "third"]
        assert not hasattr(layer, "weight")
    after = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


def test_what_happens_to_the_rest_stays() -> None:
    layer = module()
    weight = layer.weight
    with set_aside(layer, "weight"):
        layer.double()
        del layer._buffers["first"]
        layer.register_buffer("fourth", torch.zeros(1))
    assert layer.weight is weight and weight.dtype == torch.float32 and layer.bias.dtype == torch.float64
    assert [name for name, _ in layer.named_buffers()] == ["second", "third", "fourth"]
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_they_are_back_after_an_error() -> None:
    layer = module()
    with pytest.raises(RuntimeError, match="inside"), set_aside(layer, "weight", "first"):
        raise RuntimeError("inside")
    assert list(layer._parameters) == ["weight", "bias"] and list(layer._buffers) == ["first", "second", "third"]
