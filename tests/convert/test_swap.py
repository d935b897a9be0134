"""One module in another's place: names, hooks and the parameter of an expert stack."""

from __future__ import annotations

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from onegpu.convert.swap import stack_to_parameter, swap_module
from onegpu.nn import ExpertStack8bit
from onegpu.nn.experts import replace_parameter


def test_accelerates_hook_moves_along():
    class Double(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return tuple(2 * a for a in args), kwargs

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    old, new = model[1], nn.Linear(4, 4)
    add_hook_to_module(old, Double())
    x = torch.randn(2, 4)
    swap_module(model, "1", new)
    assert model[1] is new and not hasattr(old, "_hf_hook")
    torch.testing.assert_close(new(x), nn.functional.linear(2 * x, new.weight, new.bias))
    torch.testing.assert_close(old(x), nn.functional.linear(x, old.weight, old.bias))
    assert [name for name, _ in model.named_children()] == ["0", "1"]


def test_a_stack_becomes_a_parameter_again():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 8, 64))

    model = nn.ModuleDict({"experts": Experts()})
    original = model.experts.up
    stack = ExpertStack8bit((2, 8, 64), torch.float32, ("{}.up.weight",))
    stack.quantize_(original.data)
    replace_parameter(model.experts, "up", stack)
    assert "experts.0.up.weight" in model.state_dict()
    stack_to_parameter(model, "experts.up", stack.dequantize())
    assert isinstance(model.experts.up, nn.Parameter) and not model.experts.up.requires_grad
    assert list(model.state_dict()) == ["experts.up"]
    replace_parameter(model.experts, "up", stack)
    stack_to_parameter(model, "experts.up", original)
    assert model.experts.up is original
