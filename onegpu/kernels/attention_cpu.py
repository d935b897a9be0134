"""One sequence of `attention` on a CPU by PyTorch's flash attention, in blocks instead of the matrix of scores.

It is called below ``scaled_dot_product_attention``, for the log-sum-exp that the backward needs. What it would answer
otherwise than the definition is left to that: rows that see no key, and NaN in queries or keys, which it makes zeros.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from onegpu.kernels.attention_definition import Options

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether it takes tensors like these."""
    return q.device.type == "cpu" and q.dtype in _DTYPES and 0 < v.shape[-1] <= q.shape[-1]


def masks(q: torch.Tensor, k: torch.Tensor, options: Options) -> dict[str, Any] | None:
    """What PyTorch's op is told of one sequence, ``[n, H, D]`` and ``[m, H_kv, D]``; None where it does not serve."""
    n, m = q.shape[0], k.shape[0]
    if n == 0 or m == 0 or (n > m and options.right >= 0):
        return None
    if not torch.isfinite(q.sum(dtype=torch.float64) + k.sum(dtype=torch.float64)):
        return None
    left = options.left if options.left < m - 1 else -1
    right = options.right if options.right < n - 1 else -1
    if left < 0 and (right < 0 or (right == 0 and n == m)):
        return {"is_causal": right == 0, "scale": options.scale}
    distance = torch.arange(m) - torch.arange(m - n, m)[:, None]
    hidden = distance < -left if left >= 0 else torch.zeros_like(distance, dtype=torch.bool)
    if right >= 0:
        hidden |= distance > right
    mask = torch.zeros(n, m, dtype=q.dtype).masked_fill_(hidden, -math.inf)
    return {"is_causal": False, "attn_mask": mask, "scale": options.scale}


def _turned(x: torch.Tensor, d: int) -> torch.Tensor:
    """``[S, H, D]`` as ``[1, H, S, d]``, filled up with zeros, which add nothing to any product."""
    if x.stride(-1) != 1:
        x = x.clone(memory_format=torch.contiguous_format)  # PyTorch's op takes that for granted, and does not check
    if x.shape[-1] < d:
        x = torch.nn.functional.pad(x, (0, d - x.shape[-1]))
    return x.transpose(0, 1)[None]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, told: dict[str, Any]
) -> None:
    """Fills ``out`` ``[n, H, D_v]`` and ``lse`` ``[H, n]``."""
    turned = (_turned(x, q.shape[-1]) for x in (q, k, v))
    answer, logarithm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*turned, 0.0, **told)
    out.copy_(answer[0, ..., : out.shape[-1]].transpose(0, 1))
    lse.copy_(logarithm[0])


def backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor], told: dict[str, Any],
) -> None:  # fmt: skip
    """Fills the gradients of q, k and v."""
    turned = (_turned(x, q.shape[-1]) for x in (grad, q, k, v, out))
    logarithm = lse.t().contiguous().t()[None]  # laid out as the forward returns it
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *turned, logarithm, 0.0, told["is_causal"], attn_mask=told.get("attn_mask"), scale=told["scale"]
    )
    for x, y in zip(gradients, found, strict=True):
        x.copy_(y[0, ..., : x.shape[-1]].transpose(0, 1))
