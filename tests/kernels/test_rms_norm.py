"""RMSNorm: the definition is transformers' modules to the bit, its gradient autograd's, and a GPU agrees with both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onegpu.errors import ArgumentError
from onegpu.kernels.rms_norm import MAX_WIDTH, STYLES, cost, rms_norm
from tests.compare import assert_close
from tests.matrices import FLOATS

OPS = torch.ops.onegpu


def theirs(style: str, n: int, eps: float, dtype: torch.dtype) -> torch.nn.Module:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    kind = dict(zip(STYLES, (LlamaRMSNorm, T5LayerNorm, GemmaRMSNorm, Olmo2RMSNorm), strict=True))[style]
    module: torch.nn.Module = kind(n, eps=eps)
    torch.nn.init.normal_(module.weight)
    return module.to(dtype)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", FLOATS)
def test_the_definition_is_transformers_module(style: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    if style == "t5" and dtype == torch.float16 and weight_dtype == torch.bfloat16:
        pytest.skip("T5 rounds to one 16-bit dtype and multiplies in the other; no model has both")
    module = theirs(style, 48, 1e-6, weight_dtype)
    x = (3 * torch.randn(5, 7, 48)).to(dtype)
    with torch.no_grad():
        ours, wanted = rms_norm(x, module.weight, 1e-6, style=style), module(x)
    assert ours.dtype == wanted.dtype and torch.equal(ours, wanted)


def by_formula(x: torch.Tensor, weight: torch.Tensor, offset: float) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    mean = (wide * wide).sum(-1, keepdim=True) / x.shape[-1]
    return (wide / torch.sqrt(mean + 1e-5) * (weight.to(wide.dtype) + offset)).to(x.dtype)


@pytest.mark.parametrize("style", ["llama", "gemma"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(37, 64), (3, 5, 203), (4, 4096)])
def test_value_and_gradients(device: str, style: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device=device).to(dtype)

    def run(function: Any, wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(wide).requires_grad_() for t in (x.clone(), weight.clone())]
        y = function(*leaves)
        y.backward(grad.to(wide))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    offset = 1.0 if style == "gemma" else 0.0
    ours = run(lambda x, w: rms_norm(x, w, 1e-5, style=style), dtype)
    exact, same = (run(lambda x, w: by_formula(x, w, offset), kind) for kind in (torch.float64, dtype))
    for name, *tensors in zip(("y", "gradient of x", "gradient of the weight"), ours, exact, same, strict=True):
        assert_close(*tensors, gradient=name != "y", what=name)


@pytest.mark.parametrize("dtype", FLOATS)
def test_with_a_residual_it_is_the_sum_that_is_normalised(device: str, dtype: torch.dtype) -> None:
    x, residual, grad, grad_sum = (torch.randn(5, 3, 96, device=device).to(dtype) for _ in range(4))
    weight = torch.randn(96, device=device).to(dtype).requires_grad_()
    leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    y, total = rms_norm(leaves[0], weight, 1e-5, residual=leaves[1])
    torch.autograd.backward((y, total), (grad, grad_sum))
    alone = (x + residual).requires_grad_()
    y_alone = rms_norm(alone, weight, 1e-5)
    assert torch.equal(total, alone) and torch.equal(y, y_alone)
    y_alone.backward(grad)
    for leaf in leaves:
        assert torch.equal(leaf.grad, alone.grad + grad_sum)


def test_opcheck(device: str) -> None:
    x, weight = torch.randn(3, 5, 40, device=device)[..., :32].half(), torch.randn(32, device=device).half()
    how = (1e-5, 0.0, torch.float16, torch.float16)
    torch.library.opcheck(OPS.rms_norm.default, (x, weight, *how))
    torch.library.opcheck(OPS.add_rms_norm.default, (x, x + 1, weight, *how))
    torch.library.opcheck(OPS.rms_norm_backward.default, (x, x + 1, weight, 1e-5, 1.0))


def test_strides_empty_rows_and_wide_rows(device: str) -> None:
    weight = torch.randn(32, device=device)
    x = torch.randn(32, 6, device=device).t()
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm(x.contiguous(), weight, 1e-5))
    assert rms_norm(x[:0], weight, 1e-5).shape == (0, 32)
    row = x[:1].contiguous().expand(4, 32)
    assert torch.equal(rms_norm(row, weight, 1e-5)[3], rms_norm(row[:1], weight, 1e-5)[0])
    wide, ones = torch.randn(2, MAX_WIDTH + 8, device=device), torch.ones(MAX_WIDTH + 8, device=device)
    assert_close(rms_norm(wide, ones, 1e-5), by_formula(wide.double(), ones.double(), 0.0), by_formula(wide, ones, 0.0))


def test_nan_stays_in_its_row(device: str) -> None:
    x = torch.randn(3, 64, device=device)
    x[1, 5] = float("nan")
    y = rms_norm(x, torch.ones(64, device=device), 1e-5)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_an_unknown_style_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="style='bert' is no way of rounding"):
        rms_norm(torch.zeros(1, 4), torch.zeros(4), 1e-5, style="bert")


def test_cost_counts_rows_and_weight() -> None:
    assert cost(10, 64, 2) == (21 * 64 * 2, 4 * 640)
    assert cost(10, 64, 2, residual=True) == (41 * 64 * 2, 4 * 640)
