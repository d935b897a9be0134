"""Norms of ours in the place of transformers': the same bits on the CPU, the same gradients, the same parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

from onegpu.nn.norm import LayerNorm, RMSNorm, epsilon_of, form_of, is_rms_like
from tests.compare import assert_close

FORMS = {
    LlamaRMSNorm: "llama",
    Olmo2RMSNorm: "olmo2",
    Gemma2RMSNorm: "gemma",
    Gemma3nRMSNorm: "olmo2",
    T5LayerNorm: "t5",
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(kind, n, dtype=torch.float32, device="cpu"):
    norm = kind(n, eps=1e-5)
    with torch.no_grad():
        norm.weight.normal_()
    return norm.to(device, dtype)


@pytest.mark.parametrize("kind", FORMS)
def test_the_form_is_found_whatever_the_size_and_device(kind):
    assert form_of(kind(5120)) == FORMS[kind] == form_of(kind(64).to("meta")) == form_of(kind(1).half().train())


@pytest.mark.parametrize("kind", [CohereLayerNorm, Qwen3NextRMSNormGated])
def test_what_computes_something_else_has_no_form(kind):
    norm = kind(64)
    assert not is_rms_like(norm) or form_of(norm) is None


def test_what_looks_like_one():
    assert is_rms_like(LlamaRMSNorm(8)) and not is_rms_like(nn.LayerNorm(8)) and not is_rms_like(nn.BatchNorm1d(8))
    assert not is_rms_like(nn.Linear(8, 8, bias=False)) and not is_rms_like(nn.Embedding(8, 8))
    assert epsilon_of(LlamaRMSNorm(8, eps=1e-3)) == epsilon_of(Gemma2RMSNorm(8, eps=1e-3)) == 1e-3
    assert epsilon_of(nn.Linear(1, 1)) is None


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMS)
def test_the_same_bits(kind, dtype, weight_dtype):
    norm, x = made(kind, 203, weight_dtype), torch.randn(2, 5, 203).to(dtype)
    ours, theirs = RMSNorm(norm, FORMS[kind])(x), norm(x)
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [*FORMS, nn.LayerNorm])
def test_gradients(device, kind):
    norm = made(kind, 203, device=device)
    ours = LayerNorm(norm) if kind is nn.LayerNorm else RMSNorm(norm, FORMS[kind])
    x, grad = torch.randn(7, 203, device=device), torch.randn(7, 203, device=device)

    def by_formula(x):  # transformers' modules compute in float32 whatever they are given
        weight = exact.weight + (kind is Gemma2RMSNorm)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    exact = copy.deepcopy(norm).double()

    def gradients(module, function, dtype):
        inner = x.detach().clone().to(dtype).requires_grad_()
        module.zero_grad()
        (function(inner) * grad.to(dtype)).sum().backward()
        return [inner.grad, *(p.grad for p in module.parameters())]

    results = (
        gradients(ours, ours, torch.float32),
        gradients(exact, exact if kind is nn.LayerNorm else by_formula, torch.float64),
        gradients(norm, norm, torch.float32),
    )
    for got, wanted, other in zip(*results, strict=True):
        assert_close(got, wanted, other, gradient=True)


def test_layer_norm_is_torchs_where_dtypes_meet():
    norm = made(nn.LayerNorm, 64)
    ours, x = LayerNorm(norm), torch.randn(3, 64)
    assert isinstance(ours, nn.LayerNorm) and repr(ours) == repr(norm)
    assert torch.equal(ours(x), norm(x)) and torch.equal(ours.double()(x.double()), norm(x.double()))
    norm.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x.bfloat16()).dtype == norm(x.bfloat16()).dtype
    bare = nn.LayerNorm(64, elementwise_affine=False)
    assert torch.equal(LayerNorm(bare)(x), bare(x))


def test_parameters_are_shared_whatever_happens_to_them():
    norm = made(LlamaRMSNorm, 64)
    ours, x = RMSNorm(norm, "llama"), torch.randn(3, 64)
    assert list(ours.state_dict()) == ["weight"] and ours.weight is norm.weight
    ours.weight = nn.Parameter(torch.zeros(64))
    assert not norm(x).any()
    copied = copy.deepcopy(ours)
    copied.weight.data.fill_(1.0)
    assert copied.original.weight is copied.weight and not ours(x).any() and copied(x).all()
    assert "style='llama'" in repr(ours) and [name for name, _ in ours.named_modules()] == [""]
    assert ours.double()(x.double()).dtype == torch.float64
