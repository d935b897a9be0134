"""Rotary position embedding of queries and keys (Su et al. 2021, arXiv:2104.09864), and the write into a static cache.

Of each head the first R elements turn in pairs by the angles whose cosines and sines come in, ``[B, T, R / 2]``:
``(a, b) -> (a cos - b sin, b cos + a sin)``; the others stay. A pair is elements i and i + R / 2 (GPT-NeoX, Llama), or
2 i and 2 i + 1 where ``interleaved`` (GPT-J). q ``[B, H, T, D]``, k and v ``[B, H_kv, T, D]``. Bound by bytes, in
decoding by the launch: one kernel turns q and k and writes k and v to their places in the cache.
"""

from __future__ import annotations

from typing import Any

import torch

from onegpu.errors import bad_argument
from onegpu.kernels.library import define, has_triton


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x ``[B, H, T, D]`` in its own strides; products and sums rounded as transformers rounds them."""
    half = cos.shape[-1]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    a, b, cos, sin = x[..., first], x[..., second], cos[:, None], sin[:, None]
    out = x.clone()
    out[..., first] = a * cos + -b * sin
    out[..., second] = b * cos + a * sin
    return out


def _rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _turn(q, cos, sin, interleaved), _turn(k, cos, sin, interleaved)


def _rotary_cuda(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if not has_triton() or q.dtype == torch.float64:
        return _rotary(q, k, cos, sin, interleaved)
    from onegpu.kernels import rotary_triton

    outs = torch.empty_like(q), torch.empty_like(k)
    rotary_triton.rotary(q, k, cos, sin, interleaved, *outs)
    return outs


def _rotary_fake(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _rotary_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    places: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:
    room = k_cache.shape[2]
    for values, cache in ((_turn(k, cos, sin, interleaved), k_cache), (v, v_cache)):
        inside = (places >= 0) & (places < room)  # [B, T]
        sequence = torch.arange(places.shape[0], device=q.device)[:, None].expand_as(places)[inside]
        cache.transpose(1, 2)[sequence, places[inside].long()] = values.transpose(1, 2)[inside].to(cache.dtype)
    return _turn(q, cos, sin, interleaved)


def _rotary_cache_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    places: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:
    if not has_triton() or q.dtype == torch.float64:
        return _rotary_cache(q, k, v, cos, sin, places, k_cache, v_cache, interleaved)
    from onegpu.kernels import rotary_triton

    out = torch.empty_like(q)
    rotary_triton.rotary_cache(q, k, v, cos, sin, places, k_cache, v_cache, interleaved, out)
    return out


def _rotary_cache_fake(q: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(q)


define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    _rotary,
    _rotary_fake,
    cuda=_rotary_cuda,
)
define(
    "rotary_cache_(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor places, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, bool interleaved) -> Tensor",
    _rotary_cache,
    _rotary_cache_fake,
    cuda=_rotary_cache_cuda,
)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return torch.ops.onegpu.rotary(q, k, cos, sin, interleaved)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        turned = torch.ops.onegpu.rotary(grad_q, grad_k, cos, -sin, ctx.interleaved)  # a rotation's transpose
        return (*turned, None, None, None)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys by their positions.

    Args:
        q, k: ``[B, H, T, D]`` and ``[B, H_kv, T, D]`` of one float dtype, any strides.
        cos, sin: ``[B or 1, T, R / 2]``, R <= D: one value a pair. transformers' tables hold each twice: pass
            ``cos[..., : R // 2]``, or of interleaved models ``cos[..., ::2]``.
        interleaved: a pair is two neighbours.

    Returns:
        New q and k, laid out in memory as q and k are. Gradients flow to q and k, not to the angles.

    Raises:
        ArgumentError: shapes that do not go together.
    """
    cos, sin = _angles(q, cos, sin)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rotary.apply(q, k, cos, sin, interleaved)  # type: ignore[no-any-return]
    return torch.ops.onegpu.rotary(q, k, cos, sin, interleaved)  # type: ignore[no-any-return]


def rotary_cache_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    places: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    interleaved: bool = False,
) -> torch.Tensor:
    """Turn queries and keys, and write keys and values to a static cache, in one kernel and without a gradient.

    Args:
        q, k, cos, sin, interleaved: as of :func:`rotary`.
        v: ``[B, H_kv, T, D_v]``.
        places: int32 or int64 ``[B, T]``, on the GPU: where each new token goes. One below 0 or past the cache is not
            written.
        k_cache, v_cache: ``[B, H_kv, L, D]`` and ``[B, H_kv, L, D_v]``, any strides but the last, changed in place.

    Returns:
        The turned q.

    Raises:
        ArgumentError: shapes that do not go together.
    """
    cos, sin = _angles(q, cos, sin)
    if places.shape != (q.shape[0], q.shape[2]):
        raise bad_argument("places", tuple(places.shape), f"does not go with q {tuple(q.shape)}", "pass [B, T]")
    return torch.ops.onegpu.rotary_cache_(  # type: ignore[no-any-return]
        q, k, v, cos, sin, places, k_cache, v_cache, interleaved
    )


def _angles(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (b, _, t, d), shape = q.shape, tuple(cos.shape)
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[0] not in (1, b) or cos.shape[1] != t or 2 * shape[2] > d:
        raise bad_argument("cos", shape, f"does not go with q {tuple(q.shape)}", "pass [B or 1, T, at most D / 2]")
    return cos.expand(b, -1, -1), sin.expand(b, -1, -1)


def cost(b: int, t: int, h: int, h_kv: int, d: int, itemsize: int, cache: bool = False) -> tuple[int, int]:
    """Bytes moved and FLOPs: q and k (with a cache also v) read and written."""
    return 2 * b * t * (h + (2 if cache else 1) * h_kv) * d * itemsize, 3 * b * t * (h + h_kv) * d
