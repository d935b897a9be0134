"""``y = x @ weight.T + bias`` for 16-bit weights and few rows: a step of decoding.

x ``[..., K]``, weight ``[N, K]``, bias ``[N]``, all float16 or all bfloat16. Bound by the 2*N*K bytes of weights, at
which up to four rows cuBLAS is behind ours, and from five on as good for some sizes. What ours is faster at goes to
few_rows.py; everything else, and every device without those kernels, to `torch.nn.functional.linear`, the definition.
"""

from __future__ import annotations

import torch

from onegpu.kernels import few_rows
from onegpu.kernels.library import check_columns, define
from onegpu.kernels.warmup import register


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def ours_is_faster(m: int, n: int, k: int) -> bool:
    """Than cuBLAS, as measured on an H100 with sizes of Llama-2-7B and Qwen2.5-0.5B (docs/few_rows.md)."""
    if m <= 4:
        return k >= 1024 or n > 16384
    if k > 8192 or 8192 < n <= 16384:
        return False
    return n > 16384 or m == 5


def _forward_cuda(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    n, k = weight.shape
    small = 0 < x.numel() <= few_rows.MAX_ROWS["16bit"] * k and x.dtype == weight.dtype
    if small and weight.is_contiguous() and ours_is_faster(x.numel() // k, n, k):
        rows = x.reshape(-1, k).contiguous()
        y = few_rows.launch("16bit", rows, weight, n, bias) if few_rows.supports("16bit", rows, weight, k) else None
        if y is not None:
            return y if x.dim() == 2 else y.view(*x.shape[:-1], n)
    return _forward(x, weight, bias)


def _forward_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


define("linear_16bit(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _forward, _forward_fake, cuda=_forward_cuda)


def linear_16bit(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply by a float matrix.

    Args:
        x: ``[..., K]`` in the dtype of weight.
        weight: ``[N, K]``.
        bias: ``[N]`` in that dtype, or None.

    Returns:
        ``[..., N]``. Where a gradient is needed this is `torch.nn.functional.linear`, whose gradients are cuBLAS's.

    Raises:
        ArgumentError: x has another K.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return torch.nn.functional.linear(x, weight, bias)
    check_columns(x, weight.shape[1])
    return torch.ops.onegpu.linear_16bit(x, weight, bias)  # type: ignore[no-any-return]


@register("linear_16bit")
def _warm(device: torch.device, dtype: torch.dtype, rows: int, n: int, k: int, bias: bool = False) -> None:
    x = torch.zeros(rows, k, device=device, dtype=dtype)
    linear_16bit(x, x.new_zeros(n, k), x.new_zeros(n) if bias else None)


def cost(m: int, n: int, k: int, itemsize: int) -> tuple[int, int]:
    """Bytes moved and FLOPs of one product with M = ``m`` rows, elements of ``itemsize`` bytes."""
    return (n * k + m * (n + k)) * itemsize, 2 * m * n * k
