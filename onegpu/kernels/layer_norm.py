"""``y = w * (x - mean(x)) / sqrt(var(x) + eps) + b`` over the last dimension, optionally of ``x + residual``.

x ``[..., N]``, w and b ``[N]`` or absent. Bound by bytes: x read and y written once (with a residual, two read and two
written). Mean and variance are float32, and so is everything until y is rounded to the dtype of x, as in
``torch.nn.functional.layer_norm``, which is the definition.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from onegpu.kernels.library import check_columns, define, has_triton
from onegpu.kernels.rms_norm import MAX_BACKWARD_WIDTH, MAX_WIDTH
from onegpu.kernels.warmup import register


def _norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).contiguous()


def _norm_cuda(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    if not has_triton() or x.shape[-1] > MAX_WIDTH or x.dtype == torch.float64:
        return _norm(x, weight, bias, eps)
    from onegpu.kernels import norm_triton

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm_triton.forward(x, None, weight, bias, eps, 0.0, torch.float32, True, y, None)
    return y


def _norm_fake(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = (residual + x).contiguous()
    return _norm(total, weight, bias, eps), total


def _add_norm_cuda(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if not has_triton() or x.shape[-1] > MAX_WIDTH or x.dtype == torch.float64:
        return _add_norm(x, residual, weight, bias, eps)
    from onegpu.kernels import norm_triton

    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    norm_triton.forward(x, residual, weight, bias, eps, 0.0, torch.float32, True, y, total)
    return y, total


def _add_norm_fake(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _norm_fake(x), _norm_fake(x)


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide, up = x.float(), grad.float()
    wide = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normal, inner = wide * scale, up if weight is None else up * weight.float()
    middle = inner.mean(-1, keepdim=True) + normal * (inner * normal).mean(-1, keepdim=True)
    grad_x = (scale * (inner - middle)).to(x.dtype).contiguous()
    dtype = x.dtype if weight is None else weight.dtype
    rows = (-1, x.shape[-1])
    return grad_x, (up * normal).reshape(rows).sum(0).to(dtype), up.reshape(rows).sum(0).to(dtype)


def _backward_cuda(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not has_triton() or x.shape[-1] > MAX_BACKWARD_WIDTH or x.dtype == torch.float64:
        return _backward(grad, x, weight, eps)
    from onegpu.kernels import norm_triton

    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_weight, grad_bias = norm_triton.backward(grad, x, weight, eps, 0.0, True, grad_x)
    dtype = x.dtype if weight is None else weight.dtype
    return grad_x, grad_weight.to(dtype), grad_bias.to(dtype)


def _backward_fake(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = x.dtype if weight is None else weight.dtype
    row = torch.empty(x.shape[-1:], dtype=dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), row, torch.empty_like(row)


_HOW = "Tensor? weight, Tensor? bias, float eps"
define(f"layer_norm(Tensor x, {_HOW}) -> Tensor", _norm, _norm_fake, cuda=_norm_cuda)
define(
    f"add_layer_norm(Tensor x, Tensor residual, {_HOW}) -> (Tensor, Tensor)",
    _add_norm,
    _add_norm_fake,
    cuda=_add_norm_cuda,
)
define(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    cuda=_backward_cuda,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        ctx.eps, ctx.bias = eps, bias is not None
        if residual is None:
            ctx.save_for_backward(x, weight)
            return torch.ops.onegpu.layer_norm(x, weight, bias, eps)  # type: ignore[no-any-return]
        y, total = torch.ops.onegpu.add_layer_norm(x, residual, weight, bias, eps)
        ctx.save_for_backward(total, weight)
        return y, total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.onegpu.layer_norm_backward(grad, x, weight, ctx.eps)
        if grad_total:
            grad_x = grad_x + grad_total[0]
        return (
            grad_x,
            grad_x if grad_total else None,
            None if weight is None else grad_weight,
            grad_bias if ctx.bias else None,
            None,
        )


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
) -> Any:
    """Layer normalisation over the last dimension.

    Args:
        x: float16, bfloat16 or float32, ``[..., N]``, any strides.
        weight, bias: ``[N]`` in the dtype of x, or None.
        eps: added to the variance.
        residual: the shape and dtype of x; ``x + residual`` is then what is normalised.

    Returns:
        y, or with a residual ``(y, x + residual)``; contiguous, in the dtype of x. Gradients flow to all tensors.

    Raises:
        ArgumentError: weight or bias has another N.
    """
    for one in (weight, bias):
        if one is not None:
            check_columns(x, one.shape[0])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight, bias)):
        return _LayerNorm.apply(x, residual, weight, bias, eps)
    if residual is None:
        return torch.ops.onegpu.layer_norm(x, weight, bias, eps)
    return torch.ops.onegpu.add_layer_norm(x, residual, weight, bias, eps)


@register("layer_norm")
def _warm(device: torch.device, dtype: torch.dtype, rows: int, n: int, bias: bool) -> None:
    x = torch.zeros(rows, n, dtype=dtype, device=device)
    layer_norm(x, x.new_zeros(n), x.new_zeros(n) if bias else None, 1e-5)


def cost(rows: int, n: int, itemsize: int, residual: bool = False) -> tuple[int, int]:
    """Bytes moved and FLOPs of one forward."""
    return (rows * (4 if residual else 2) + 2) * n * itemsize, 7 * rows * n
