"""The definition of attention in plain PyTorch, sequence by sequence: what the kernels are held to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from onegpu.errors import bad_argument
from onegpu.kernels import attention_cpu


class Options(NamedTuple):
    """What the ops take beside the tensors of the attention itself, in the order of their schema.

    left, right: the window, -1 without a limit. q_range, k_range: int32 ``[B, 2]``, (first, length) of each row of a
    padded batch. cu_seqlens_q, cu_seqlens_k: int32 ``[B + 1]``, ends of packed sequences, from 0. max_seqlen_q,
    max_seqlen_k: upper bounds of their lengths.
    """

    scale: float
    left: int = -1
    right: int = -1
    q_range: torch.Tensor | None = None
    k_range: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    implementation: str = "auto"


class _Sequence(NamedTuple):
    """Indices of one sequence's real rows: of q and out, of k and v, of the log-sum-exp."""

    q: tuple[Any, ...]
    k: tuple[Any, ...]
    lse: tuple[Any, ...]


def _sequences(q: torch.Tensor, k: torch.Tensor, options: Options) -> Iterator[_Sequence]:
    if options.cu_seqlens_q is not None and options.cu_seqlens_k is not None:
        ends_q, ends_k = options.cu_seqlens_q.tolist(), options.cu_seqlens_k.tolist()
        for name, ends, most in (("cu_seqlens_q", ends_q, q.shape[0]), ("cu_seqlens_k", ends_k, k.shape[0])):
            if ends != sorted(ends) or ends[0] < 0 or ends[-1] > most:
                fix = "Pass where each sequence begins, in order, and where the last one ends"
                raise bad_argument(name, ends, f"does not rise from 0 to at most {most}, the rows there are", fix)
        for b in range(len(ends_q) - 1):
            queries, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
            yield _Sequence((queries,), (keys,), (slice(None), queries))
        return
    ranges_q = [(0, q.shape[1])] * q.shape[0] if options.q_range is None else options.q_range.tolist()
    ranges_k = [(0, k.shape[1])] * q.shape[0] if options.k_range is None else options.k_range.tolist()
    for b, ((first_q, n), (first_k, m)) in enumerate(zip(ranges_q, ranges_k, strict=True)):
        rows, keys = slice(first_q, first_q + n), slice(first_k, first_k + m)
        yield _Sequence((b, rows), (b, keys), (b, slice(None), rows))


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``[S, H, D]`` of one sequence, in the dtype of the calculation, as ``[heads, H / heads, S, D]``."""
    x = x if x.dtype == torch.float64 else x.float()
    return x.transpose(0, 1).unflatten(0, (heads, -1))  # type: ignore[no-any-return]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `_by_head`."""
    return x.flatten(0, 1).transpose(0, 1)


def _scores(q: torch.Tensor, k: torch.Tensor, options: Options) -> torch.Tensor:
    """``[H_kv, G, n, m]``, -inf where a row does not see a key."""
    scores = q @ k.transpose(-1, -2) * options.scale
    n, m = scores.shape[-2:]
    distance = torch.arange(m, device=q.device) - torch.arange(m - n, m, device=q.device)[:, None]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if options.left >= 0:
        hidden |= distance < -options.left
    if options.right >= 0:
        hidden |= distance > options.right
    return scores.masked_fill_(hidden, -math.inf)


def _probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None])


def _lse_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = Options(*rest)
    out, lse = forward_fake(q, k, v, *rest)
    out.zero_()
    lse.fill_(-math.inf)
    # torch's is NaN where a mask meets a negative scale
    flash = options.implementation == "auto" and options.scale > 0 and attention_cpu.serves(q, k, v)
    for at in _sequences(q, k, options):
        if flash and (told := attention_cpu.masks(q[at.q], k[at.k], options)) is not None:
            attention_cpu.forward(q[at.q], k[at.k], v[at.k], out[at.q], lse[at.lse], told)
            continue
        keys, values = (_by_head(x[at.k], k.shape[-2]) for x in (k, v))
        scores = _scores(_by_head(q[at.q], k.shape[-2]), keys, options)
        if scores.numel():
            logarithm = torch.logsumexp(scores, -1)
            lse[at.lse] = logarithm.flatten(0, 1)
            out[at.q] = _rows(_probabilities(scores, logarithm) @ values).to(out.dtype)
    return out, lse


def forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *batch, heads, d = q.shape
    shape = (batch[0], heads, batch[1]) if len(batch) == 2 else (heads, batch[0])
    same = v.shape[-1] == d and q.is_contiguous()
    out = torch.empty_like(q) if same else q.new_empty((*batch, heads, v.shape[-1]))
    return out, q.new_empty(shape, dtype=_lse_dtype(q))


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def backward(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, deterministic: bool, *rest: Any,
) -> Gradients:  # fmt: skip
    options = Options(*rest)
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    heads = k.shape[-2]
    flash = options.implementation == "auto" and options.scale > 0 and grad_lse is None
    flash = flash and attention_cpu.serves(q, k, v)
    for at in _sequences(q, k, options):
        if flash and (told := attention_cpu.masks(q[at.q], k[at.k], options)) is not None:
            given = (grad[at.q], q[at.q], k[at.k], v[at.k], out[at.q], lse[at.lse])
            attention_cpu.backward(*given, (dq[at.q], dk[at.k], dv[at.k]), told)
            continue
        queries, gradients, outputs = (_by_head(x[at.q], heads) for x in (q, grad, out))
        keys, values = (_by_head(x[at.k], heads) for x in (k, v))
        logarithm = lse[at.lse].unflatten(0, (heads, -1))
        p = _probabilities(_scores(queries, keys, options), logarithm)
        delta = (gradients * outputs).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse[at.lse].unflatten(0, (heads, -1))
        ds = p * (gradients @ values.transpose(-1, -2) - delta[..., None]) * options.scale
        dq[at.q] = _rows(ds @ keys).to(dq.dtype)
        dk[at.k] = _rows((ds.transpose(-1, -2) @ queries).sum(1, keepdim=True)).to(dk.dtype)
        dv[at.k] = _rows((p.transpose(-1, -2) @ gradients).sum(1, keepdim=True)).to(dv.dtype)
    return dq, dk, dv


def backward_fake(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
