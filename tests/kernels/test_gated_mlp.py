"""act(gate) * up: the definition is transformers' expression, its gradient autograd's, and a GPU agrees with both."""

from __future__ import annotations

import pytest
import torch

from onegpu.errors import ArgumentError
from onegpu.kernels.gated_mlp import ACTIVATIONS, cost, gated_mlp
from tests.compare import assert_close
from tests.matrices import FLOATS

OPS = torch.ops.onegpu
THEIRS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_definition_is_transformers_expression(activation: str, dtype: torch.dtype) -> None:
    from transformers.activations import ACT2FN

    gate, up = 3 * torch.randn(2, 5, 7, 48).to(dtype)
    assert torch.equal(gated_mlp(gate, up, activation), ACT2FN[THEIRS[activation]](gate) * up)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [64, 1203])
def test_value_and_gradients(device: str, activation: str, dtype: torch.dtype, width: int) -> None:
    from transformers.activations import ACT2FN

    both, grad = (
        3 * torch.randn(19, 2 * width, device=device).to(dtype),
        torch.randn(19, width, device=device).to(dtype),
    )

    def run(wide: torch.dtype, ours: bool) -> list[torch.Tensor]:
        leaves = [t.to(wide).detach().requires_grad_() for t in both.clone().chunk(2, -1)]
        gate, up = leaves
        y = gated_mlp(gate, up, activation) if ours else ACT2FN[THEIRS[activation]](gate) * up
        y.backward(grad.to(wide))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    results = run(dtype, True), run(torch.float64, False), run(dtype, False)
    for name, *tensors in zip(("y", "gradient of gate", "gradient of up"), *results, strict=True):
        assert_close(*tensors, gradient=name != "y", what=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_values_and_nan(device: str, activation: str) -> None:
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4, float("nan")], device=device)
    y = gated_mlp(gate, torch.ones_like(gate), activation)
    assert y[:5].tolist() == pytest.approx([0, 0, 0, 100, 1e4], abs=1e-5) and y[5].isnan()
    grads = OPS.gated_mlp_backward(torch.ones_like(gate), gate, gate, activation)
    assert all(grad[:5].isfinite().all() and grad[5].isnan() for grad in grads)


def test_strides_and_no_rows(device: str) -> None:
    both = torch.randn(6, 3, 64, device=device).transpose(0, 1)
    gate, up = both.chunk(2, -1)
    assert torch.equal(gated_mlp(gate, up), gated_mlp(gate.contiguous(), up.contiguous()))
    assert torch.equal(gated_mlp(gate.mT, up.mT), gated_mlp(gate, up).mT.contiguous())
    assert gated_mlp(gate[:0], up[:0]).shape == (0, 6, 32)


def test_opcheck(device: str) -> None:
    gate, up = torch.randn(3, 5, 64, device=device).half().chunk(2, -1)
    torch.library.opcheck(OPS.gated_mlp.default, (gate, up, "silu"))
    torch.library.opcheck(OPS.gated_mlp_backward.default, (up.contiguous(), gate, up, "gelu_tanh"))


def test_what_does_not_go_together_is_an_error() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ArgumentError, match="activation='tanh' is not known"):
        gated_mlp(x, x, "tanh")
    for other in (x[:1], x.half()):
        with pytest.raises(ArgumentError, match="differs from gate"):
            gated_mlp(x, other)


def test_cost_counts_two_read_and_one_written() -> None:
    assert cost(10, 64, 2) == (3 * 640 * 2, 6 * 640)
