"""``y = (offset + w) * x / sqrt(mean(x²) + eps)`` over the last dimension, optionally of ``x + residual``.

x ``[..., N]``, w ``[N]``. Bound by bytes: x read and y written once (with a residual, two read and two written). The
mean is float32. Where the result is rounded differs between transformers' modules, and so between the styles here:

- "llama": the normalised x in the dtype of x, then times w, in the dtype that the two promote to;
- "t5": the same in the dtype of w where that has 16 bits, else in float32;
- "gemma": times ``1 + w`` in float32, then the dtype of x;
- "olmo2": times w in float32, then the dtype of x.
"""

from __future__ import annotations

from typing import Any

import torch

from onegpu.errors import bad_argument
from onegpu.kernels.library import check_columns, define, has_triton
from onegpu.kernels.warmup import register

STYLES = ("llama", "t5", "gemma", "olmo2")
MAX_WIDTH = 16384  # of the kernel: a row lies in the registers of one program
MAX_BACKWARD_WIDTH = 8192  # and on the way back, with its gradient and the sums of all rows


def _norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, middle: torch.dtype, out: torch.dtype
) -> torch.Tensor:
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    factor = offset + weight.float() if offset else weight
    return (factor * normal.to(middle)).to(out)


def _norm_cuda(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, middle: torch.dtype, out: torch.dtype
) -> torch.Tensor:
    if not has_triton() or x.shape[-1] > MAX_WIDTH or x.dtype == torch.float64:
        return _norm(x, weight, eps, offset, middle, out)
    from onegpu.kernels import norm_triton

    y = torch.empty(x.shape, dtype=out, device=x.device)
    norm_triton.forward(x, None, weight, None, eps, offset, middle, False, y, None)
    return y


def _norm_fake(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, middle: torch.dtype, out: torch.dtype
) -> torch.Tensor:
    return torch.empty(x.shape, dtype=out, device=x.device)


def _add_norm(x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    total = (residual + x).contiguous()
    return _norm(total, *rest), total


def _add_norm_cuda(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    middle: torch.dtype,
    out: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not has_triton() or x.shape[-1] > MAX_WIDTH or x.dtype != residual.dtype or x.dtype == torch.float64:
        return _add_norm(x, residual, weight, eps, offset, middle, out)
    from onegpu.kernels import norm_triton

    y, total = torch.empty(x.shape, dtype=out, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm_triton.forward(x, residual, weight, None, eps, offset, middle, False, y, total)
    return y, total


def _add_norm_fake(x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return _norm_fake(x, *rest), torch.empty(x.shape, dtype=dtype, device=x.device)


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    wide, up = x.float(), grad.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normal, inner = wide * scale, up * (offset + weight.float())
    grad_x = scale * (inner - normal * (inner * normal).mean(-1, keepdim=True))
    grad_weight = (up * normal).reshape(-1, x.shape[-1]).sum(0)
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(weight.dtype)


def _backward_cuda(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if not has_triton() or x.shape[-1] > MAX_BACKWARD_WIDTH or x.dtype == torch.float64:
        return _backward(grad, x, weight, eps, offset)
    from onegpu.kernels import norm_triton

    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_weight, _ = norm_triton.backward(grad, x, weight, eps, offset, False, grad_x)
    return grad_x, grad_weight.to(weight.dtype)


def _backward_fake(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)


_HOW = "Tensor weight, float eps, float offset"
define(f"rms_norm(Tensor x, {_HOW}, ScalarType middle, ScalarType out) -> Tensor", _norm, _norm_fake, cuda=_norm_cuda)
define(
    f"add_rms_norm(Tensor x, Tensor residual, {_HOW}, ScalarType middle, ScalarType out) -> (Tensor, Tensor)",
    _add_norm,
    _add_norm_fake,
    cuda=_add_norm_cuda,
)
define(
    f"rms_norm_backward(Tensor grad, Tensor x, {_HOW}) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    cuda=_backward_cuda,
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, *how: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        ctx.how = how[:2]
        if residual is None:
            ctx.save_for_backward(x, weight)
            return torch.ops.onegpu.rms_norm(x, weight, *how)  # type: ignore[no-any-return]
        y, total = torch.ops.onegpu.add_rms_norm(x, residual, weight, *how)
        ctx.save_for_backward(total, weight)
        return y, total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.ops.onegpu.rms_norm_backward(grad, x, weight, *ctx.how)
        if grad_total:
            grad_x = grad_x + grad_total[0]
        return grad_x, grad_x if grad_total else None, grad_weight, None, None, None, None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, residual: torch.Tensor | None = None, style: str = "llama"
) -> Any:
    """Root mean square normalisation, as transformers' modules round it.

    Args:
        x: float16, bfloat16 or float32, ``[..., N]``, any strides.
        weight: ``[N]``, any of these dtypes.
        eps: added to the mean of the squares.
        residual: the shape and dtype of x; ``x + residual`` is then what is normalised.
        style: "llama", "t5", "gemma" or "olmo2"; see the module.

    Returns:
        y, or with a residual ``(y, x + residual)``; contiguous. Gradients flow to x, residual and weight.

    Raises:
        ArgumentError: an unknown style, or a weight of another N.
    """
    if style not in STYLES:
        raise bad_argument("style", style, "is no way of rounding", f"use one of {', '.join(STYLES)}")
    check_columns(x, weight.shape[0])
    offset = 1.0 if style == "gemma" else 0.0
    if style == "llama":
        middle, out = x.dtype, torch.promote_types(weight.dtype, x.dtype)
    elif style == "t5":
        middle = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float32
        out = torch.promote_types(weight.dtype, middle)
    else:
        middle, out = torch.float32, x.dtype
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight)):
        return _RMSNorm.apply(x, residual, weight, eps, offset, middle, out)
    if residual is None:
        return torch.ops.onegpu.rms_norm(x, weight, eps, offset, middle, out)
    return torch.ops.onegpu.add_rms_norm(x, residual, weight, eps, offset, middle, out)


@register("rms_norm")
def _warm(device: torch.device, dtype: torch.dtype, rows: int, n: int, style: str) -> None:
    x = torch.zeros(rows, n, dtype=dtype, device=device)
    rms_norm(x, x.new_zeros(n), 1e-6, style=style)


def cost(rows: int, n: int, itemsize: int, residual: bool = False) -> tuple[int, int]:
    """Bytes moved and FLOPs of one forward."""
    return (rows * (4 if residual else 2) + 1) * n * itemsize, 4 * rows * n
