"""The gated MLP of ours in the place of transformers'."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from onegpu.nn import Linear4bit
from onegpu.nn.gated_mlp import GatedMLP, activation_of, is_gated
from tests.compare import assert_close

SIZES = {"hidden_size": 64, "intermediate_size": 203}


def mlp(kind=LlamaMLP, act="silu"):
    return kind(LlamaConfig(**SIZES, hidden_act=act))


@pytest.mark.parametrize(
    ("act", "name"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", None)]
)
def test_the_activation_is_found(act, name):
    assert activation_of(mlp(act=act)) == activation_of(mlp(Qwen2MLP, act).to("meta")) == name


def test_what_computes_something_else_has_none():
    class Clamped(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=1.0)) * self.up_proj(x))

    class Scaled(LlamaMLP):
        def __init__(self, config):
            super().__init__(config)
            self.norm = nn.LayerNorm(203)

    assert is_gated(mlp(Clamped)) and activation_of(mlp(Clamped)) is None
    assert activation_of(mlp(Scaled)) is None and not is_gated(nn.Sequential(nn.Linear(2, 2)))
    gemma = Gemma2MLP(Gemma2Config(**SIZES))
    assert activation_of(gemma) == "gelu_tanh"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("act", "name"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh")])
def test_the_same_bits(act, name, dtype):
    theirs, x = mlp(act=act).to(dtype), torch.randn(2, 5, 64, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(GatedMLP(theirs, name)(x), theirs(x))


def test_gradients(device):
    theirs = mlp().to(device)
    x, grad = torch.randn(7, 64, device=device), torch.randn(7, 64, device=device)

    def gradients(module, dtype):
        module, inner = copy.deepcopy(module).to(dtype), x.detach().clone().to(dtype).requires_grad_()
        (module(inner) * grad.to(dtype)).sum().backward()
        return [inner.grad, *(p.grad for p in module.parameters())]

    for got, exact, other in zip(
        gradients(GatedMLP(theirs, "silu"), torch.float32),
        gradients(theirs, torch.float64),
        gradients(theirs, torch.float32),
        strict=True,
    ):
        assert_close(got, exact, other, gradient=True)


def test_layers_are_shared_whatever_becomes_of_them():
    theirs, x = mlp(), torch.randn(2, 64)
    ours = GatedMLP(theirs, "silu")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    ours.up_proj = nn.Linear(64, 203)
    assert theirs.up_proj is ours.up_proj
    ours.gate_proj = Linear4bit(64, 203, bias=False, compute_dtype=torch.float32).to("cpu")
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    copied = copy.deepcopy(ours)
    assert copied.original.up_proj is copied.up_proj is not ours.up_proj
