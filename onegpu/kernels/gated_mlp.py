"""``y = act(gate) * up``, the middle of a gated MLP (Shazeer 2020, arXiv:2002.05202); act is silu or gelu.

gate, up, y ``[..., I]``; gate and up may be halves of one tensor. Bound by bytes: two read, one written. The definition
rounds act(gate) as transformers does; the kernel computes in float32 and rounds once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from onegpu.errors import bad_argument
from onegpu.kernels.library import define, has_triton
from onegpu.kernels.warmup import register

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_ROOT = math.sqrt(2.0 / math.pi)


def _act(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _slope(x: torch.Tensor, activation: str) -> torch.Tensor:
    """The derivative of the activation."""
    if activation == "silu":
        half = torch.sigmoid(x)
        return half * (1 + x * (1 - half))
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * (0.5 * _ROOT)
    tanh = torch.tanh(_ROOT * (x + 0.044715 * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * _ROOT * (1 + 3 * 0.044715 * x * x)


def _gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return (_act(gate, activation) * up).contiguous()


def _gated_cuda(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    if not has_triton() or gate.dtype == torch.float64:
        return _gated(gate, up, activation)
    from onegpu.kernels import gated_mlp_triton

    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gated_mlp_triton.forward(gate, up, activation, y)
    return y


def _gated_fake(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    wide, dtype = gate.float(), gate.dtype
    down = grad.float()
    grad_gate = (down * up.float() * _slope(wide, activation)).to(dtype)
    return grad_gate.contiguous(), (down * _act(wide, activation)).to(dtype).contiguous()


def _backward_cuda(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if not has_triton() or gate.dtype == torch.float64:
        return _backward(grad, gate, up, activation)
    from onegpu.kernels import gated_mlp_triton

    grads = [torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2)]
    gated_mlp_triton.backward(grad, gate, up, activation, *grads)
    return grads[0], grads[1]


def _backward_fake(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _gated_fake(gate, up, activation), _gated_fake(gate, up, activation)


define("gated_mlp(Tensor gate, Tensor up, str activation) -> Tensor", _gated, _gated_fake, cuda=_gated_cuda)
define(
    "gated_mlp_backward(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    cuda=_backward_cuda,
)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return torch.ops.onegpu.gated_mlp(gate, up, activation)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return (*torch.ops.onegpu.gated_mlp_backward(grad, *ctx.saved_tensors, ctx.activation), None)


def gated_mlp(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """``act(gate) * up``.

    Args:
        gate, up: float16, bfloat16 or float32 of one dtype and shape ``[..., I]``, any strides.
        activation: "silu", "gelu" (by erf) or "gelu_tanh".

    Returns:
        The shape and dtype of gate, contiguous. Gradients flow to both.

    Raises:
        ArgumentError: an unknown activation, or shapes or dtypes that differ.
    """
    if activation not in ACTIVATIONS:
        raise bad_argument("activation", activation, "is not known here", f"use one of {', '.join(ACTIVATIONS)}")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        what = f"{tuple(up.shape)} {up.dtype}"
        raise bad_argument("up", what, f"differs from gate, {tuple(gate.shape)} {gate.dtype}", "pass two alike")
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gated.apply(gate, up, activation)  # type: ignore[no-any-return]
    return torch.ops.onegpu.gated_mlp(gate, up, activation)  # type: ignore[no-any-return]


@register("gated_mlp")
def _warm(device: torch.device, dtype: torch.dtype, rows: int, n: int, activation: str) -> None:
    gate = torch.zeros(rows, n, dtype=dtype, device=device)
    gated_mlp(gate, gate, activation)


def cost(rows: int, width: int, itemsize: int) -> tuple[int, int]:
    """Bytes moved and FLOPs of one forward."""
    return 3 * rows * width * itemsize, 6 * rows * width
