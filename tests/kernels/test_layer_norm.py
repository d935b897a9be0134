"""LayerNorm: torch's own as the definition, its gradient against autograd's, and a GPU agrees with both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional

from onegpu.kernels.layer_norm import cost, layer_norm
from tests.compare import assert_close
from tests.matrices import FLOATS

OPS = torch.ops.onegpu


@pytest.mark.parametrize("parts", ["weight and bias", "weight", "neither"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(37, 64), (3, 5, 203), (4, 4096)])
def test_value_and_gradients(device: str, parts: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    vectors = [torch.randn(shape[-1], device=device).to(dtype) for _ in range(parts.count("weight") + parts.count("b"))]

    def run(function: Any, wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.clone().to(wide).requires_grad_() for t in (x, *vectors)]
        y = function(*leaves, *[None] * (3 - len(leaves)))
        y.backward(grad.to(wide))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    ours = run(lambda x, w, b: layer_norm(x, w, b, 1e-5), dtype)

    def formula(x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        mean = wide.sum(-1, keepdim=True) / x.shape[-1]
        variance = ((wide - mean) * (wide - mean)).sum(-1, keepdim=True) / x.shape[-1]
        y = (wide - mean) / torch.sqrt(variance + 1e-5) * (1.0 if w is None else w) + (0.0 if b is None else b)
        return y.to(x.dtype)

    exact, same = (run(formula, kind) for kind in (torch.float64, dtype))
    names = ("y", "gradient of x", "gradient of the weight", "gradient of the bias")
    for name, *tensors in zip(names, ours, exact, same, strict=False):
        assert_close(*tensors, gradient=name != "y", what=name)


@pytest.mark.parametrize("dtype", FLOATS)
def test_with_a_residual_it_is_the_sum_that_is_normalised(device: str, dtype: torch.dtype) -> None:
    x, residual, grad, grad_sum = (torch.randn(5, 3, 96, device=device).to(dtype) for _ in range(4))
    weight, bias = (torch.randn(96, device=device).to(dtype).requires_grad_() for _ in range(2))
    leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    y, total = layer_norm(leaves[0], weight, bias, 1e-5, residual=leaves[1])
    torch.autograd.backward((y, total), (grad, grad_sum))
    alone = (x + residual).requires_grad_()
    y_alone = layer_norm(alone, weight, bias, 1e-5)
    assert torch.equal(total, alone) and torch.equal(y, y_alone)
    y_alone.backward(grad)
    for leaf in leaves:
        assert torch.equal(leaf.grad, alone.grad + grad_sum)


def test_on_the_cpu_it_is_torchs_to_the_bit() -> None:
    x, w, b = torch.randn(7, 48).half(), torch.randn(48).half(), torch.randn(48).half()
    assert torch.equal(layer_norm(x, w, b, 1e-5), torch_functional.layer_norm(x, (48,), w, b, 1e-5))


def test_opcheck(device: str) -> None:
    x, w = torch.randn(3, 5, 40, device=device)[..., :32].half(), torch.randn(32, device=device).half()
    torch.library.opcheck(OPS.layer_norm.default, (x, w, None, 1e-5))
    torch.library.opcheck(OPS.add_layer_norm.default, (x, x + 1, w, w, 1e-5))
    torch.library.opcheck(OPS.layer_norm_backward.default, (x, x + 1, w, 1e-5))
    torch.library.opcheck(OPS.layer_norm_backward.default, (x, x + 1, None, 1e-5))


def test_a_large_mean_costs_no_digits(device: str) -> None:
    x = torch.randn(4, 512, device=device) + 1000
    y = layer_norm(x, None, None, 0.0)
    assert (y.double() - torch_functional.layer_norm(x.double(), (512,), eps=0.0)).abs().max() < 1e-3


def test_nan_stays_in_its_row(device: str) -> None:
    x = torch.randn(3, 64, device=device)
    x[1, 5] = float("nan")
    y = layer_norm(x, None, None, 1e-5)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all() and layer_norm(x[:0], None, None, 1e-5).shape == (0, 64)


def test_cost_counts_rows_weight_and_bias() -> None:
    assert cost(10, 64, 2) == (22 * 64 * 2, 7 * 640)
    assert cost(10, 64, 2, residual=True) == (42 * 64 * 2, 7 * 640)
