"""Attention as transformers asks for it, ``[B, H, S, D]`` and any mask, on the op that serves it.

Ours where it can; else PyTorch's scaled dot-product attention, on what the mask means. Which of the two may run is the
caller's to say with ``torch.nn.attention.sdpa_kernel`` or ``torch.backends.cuda.sdp_kernel``: ours counts as the flash
backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from onegpu.kernels.attention import attention
from onegpu.kernels.autocast import autocast_dtype
from onegpu.kernels.decode_attention import MAX_QUERIES, decode_attention
from onegpu.nn.attention_context import DecodeStep, current_step
from onegpu.nn.attention_mask import AttentionMask, Plan, Rule, matrix

_LARGEST_HEAD = 256


class Packed(NamedTuple):
    """Ends of packed sequences, int32 ``[N + 1]`` from 0, and the longest, of queries and of keys."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    sdpa: Callable[..., torch.Tensor],
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    dropout: float = 0.0,
    packed: Packed | None = None,
) -> torch.Tensor:
    """Softmax attention on whatever serves it.

    Args:
        query: ``[B, H, S_q, D]``. key, value: ``[B, H_kv, S_k, D]`` and ``[B, H_kv, S_k, D_v]``. Any strides.
        mask: an :class:`AttentionMask`; ``[B, S_k]``, true for real keys; ``[B or 1, H or 1, S_q, S_k]``, boolean
            (true: seen) or float (added to the scores); None: nothing but ``causal`` and ``window``.
        sdpa: ``sdpa(query, key, value, mask, causal)``, the same in PyTorch; its masks are four-dimensional, and causal
            comes without one.
        scale: of the scores; None is ``1 / sqrt(D)``.
        causal, window: hide the keys after a query (the last query sees the last key), and those ``window`` or more
            before it. Masks with four dimensions say so themselves, and these two are not asked.
        dropout: probability at which weights are dropped.
        packed: B = 1, and the sequences lie one after the other; with a mask that has padding it is not asked.

    Returns:
        ``[B, S_q, H, D_v]``, contiguous. Queries in the padding of a causal mask give zeros.

    Raises:
        RuntimeError: "No available kernel", where the backends that are allowed cannot serve this.
    """
    step = current_step()
    if step is not None and causal and not dropout and step.keys in (None, key.shape[-2]):
        return _decode(query, key, value, step, scale, window)
    if torch.compiler.is_compiling():
        return sdpa(query, key, value, _matrix(mask, query, key, causal, window), False)
    plan = _plan(mask, query, key, causal, window)
    if packed is not None and plan is not None and plan.k_range is None:
        plan = Plan(plan.causal, plan.window, cu_seqlens=packed.cu_seqlens_q)
        mask = None
    else:
        packed = None
    reason = _refusal(query, value, plan, dropout)
    if reason is None and torch.backends.cuda.flash_sdp_enabled():
        assert plan is not None
        return _kernel(query, key, value, plan, scale, packed)
    if reason is not None:
        _check_allowed(query, reason)
    if plan is not None and plan.window is None and plan.k_range is None and plan.cu_seqlens is None:
        keys = key.shape[-2] if plan.keys is None else plan.keys
        if not plan.causal or keys == query.shape[-2]:
            return sdpa(query, key[:, :, :keys], value[:, :, :keys], None, plan.causal)
    if packed is not None:
        assert plan is not None
        return sdpa(query, key, value, _packed_matrix(packed, query, key, plan), False)
    return sdpa(query, key, value, _matrix(mask, query, key, causal, window), False)


def _refusal(query: torch.Tensor, value: torch.Tensor, plan: Plan | None, dropout: float) -> str | None:
    """Why the kernel cannot serve; None if it can."""
    if plan is None:
        return "its mask is more than padding, causality and a window"
    if dropout:
        return f"dropout={dropout}"
    if (size := max(query.shape[-1], value.shape[-1])) > _LARGEST_HEAD:
        return f"a head dimension of {size}, more than {_LARGEST_HEAD}"
    dtype = autocast_dtype(query.device.type) or query.dtype
    if query.device.type == "cuda" and dtype not in (torch.float16, torch.bfloat16):
        return f"{str(dtype).removeprefix('torch.')} on a GPU, it takes float16 and bfloat16"
    if query.device.type not in ("cuda", "cpu", "meta"):
        return f"a device of type {query.device.type}"
    return None


def _check_allowed(query: torch.Tensor, reason: str) -> None:
    """Raise where the caller allows no backend but flash, as PyTorch does, with the reason."""
    backends = torch.backends.cuda
    cudnn = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and backends.cudnn_sdp_enabled()
    if backends.flash_sdp_enabled() and not (
        backends.math_sdp_enabled() or backends.mem_efficient_sdp_enabled() or cudnn
    ):
        raise RuntimeError(
            f"No available kernel: of the backends allowed here only flash could serve, and it does not serve this "
            f"attention ({reason}). Allow another one, with sdpa_kernel or sdp_kernel(enable_math=True)."
        )


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    scale: float | None,
    packed: Packed | None,
) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, S, H, D]
    if plan.cu_seqlens is None:
        k, v = k[:, : plan.keys], v[:, : plan.keys]
        return attention(  # type: ignore[return-value]
            q, k, v, scale=scale, causal=plan.causal, window=plan.window, q_range=plan.q_range, k_range=plan.k_range
        )
    if packed is None:
        packed = Packed(plan.cu_seqlens, plan.cu_seqlens, plan.max_seqlen, plan.max_seqlen)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    out = attention(
        *flat, scale=scale, causal=plan.causal, window=plan.window, cu_seqlens_q=packed.cu_seqlens_q,
        cu_seqlens_k=packed.cu_seqlens_k, max_seqlen_q=packed.max_seqlen_q, max_seqlen_k=packed.max_seqlen_k,
    )  # fmt: skip
    return out.unflatten(0, q.shape[:2])  # type: ignore[union-attr, no-any-return]


def _decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: DecodeStep, scale: float | None,
    window: int | None,
) -> torch.Tensor:  # fmt: skip
    queries = query.shape[-2]
    if queries <= MAX_QUERIES and not (torch.is_grad_enabled() and query.requires_grad):
        return decode_attention(
            query.to(key.dtype), key, value, step.length, first=step.first, scale=scale, window=window or 0
        ).transpose(1, 2)
    # The queries are the last ones of each row; where a row has fewer real ones, the others are padding before them.
    held = step.length - step.first
    first = (queries - held).clamp(min=0)
    return attention(  # type: ignore[return-value]
        *(x.transpose(1, 2) for x in (query, key, value)),
        scale=scale,
        causal=True,
        window=None if window is None else (window - 1, 0),
        q_range=torch.stack([first, queries - first], dim=1).to(torch.int32),
        k_range=torch.stack([step.first, held], dim=1).to(torch.int32),
    )


def _plan(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, causal: bool, window: int | None
) -> Plan | None:
    if mask is None:
        # A single query is the last one: it sees all keys, whatever is hidden from those before it.
        limits = None if window is None or window >= key.shape[-2] else (window - 1, 0 if causal else window - 1)
        return Plan(causal and query.shape[-2] > 1, limits)
    if isinstance(mask, AttentionMask):
        return mask.plan() if mask.shape[-1] == key.shape[-2] else None
    return _from_2d(mask, query, key, causal, window).plan() if mask.ndim == 2 else None


def _from_2d(
    mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, causal: bool, window: int | None
) -> AttentionMask:
    """The rule of a mask over keys, ``[B, S_k]``; one that is longer or shorter ends where the keys end."""
    queries, keys = query.shape[-2], key.shape[-2]
    mask = mask[:, -keys:].bool()
    mask = torch.nn.functional.pad(mask, (0, keys - mask.shape[-1]))
    left = -1 if window is None else window - 1
    rule = Rule(causal, left, -1 if causal else left, padding=mask, q_offset=keys - queries)
    shape = (query.shape[0], queries, keys)
    return AttentionMask(rule, shape, lambda: matrix(rule, shape, query.device), query.device)


def _matrix(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, causal: bool, window: int | None
) -> torch.Tensor | None:
    """What PyTorch takes in the place of ``mask``."""
    if isinstance(mask, AttentionMask):
        return mask.dense()
    if mask is not None and mask.ndim == 2:
        return _from_2d(mask, query, key, causal, window).dense()
    if mask is not None or not (causal or window):
        return mask
    left = -1 if window is None else window - 1
    queries, keys = query.shape[-2], key.shape[-2]
    rule = Rule(causal, left, -1 if causal else left, q_offset=keys - queries)
    return matrix(rule, (1, queries, keys), query.device)


def _packed_matrix(packed: Packed, query: torch.Tensor, key: torch.Tensor, plan: Plan) -> torch.Tensor:
    """What packed sequences see, ``[1, 1, T_q, T_k]``."""
    places = []
    for ends, rows in ((packed.cu_seqlens_q, query), (packed.cu_seqlens_k, key)):
        at = torch.arange(rows.shape[-2], device=ends.device)
        number = torch.searchsorted(ends, at, right=True)  # of the sequence, from 1; padding behind them: one more
        places.append((number, at - ends[number.clamp(max=ends.numel() - 1)]))
    (sequence_q, i), (sequence_k, j) = places
    distance = j[None, :] - i[:, None]  # from the ends, which are aligned
    left, right = plan.window or (-1, -1)
    seen = sequence_q[:, None] == sequence_k[None, :]
    if left >= 0:
        seen &= distance >= -left
    if right >= 0 or plan.causal:
        seen &= distance <= (0 if plan.causal else right)
    return seen[None, None]
