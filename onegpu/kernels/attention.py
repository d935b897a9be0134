"""``out = softmax(scale * q @ k.T + mask) @ v`` without the matrix of scores in memory (FlashAttention).

q ``[B, S_q, H, D]``, k ``[B, S_k, H_kv, D]``, v ``[B, S_k, H_kv, D_v]``, H a multiple of H_kv; the log-sum-exp of each
row is kept in natural logarithms. With row i and key j counted from the first real one and n, m the real lengths, i
sees j if ``-left <= j - (i + m - n) <= right``: causal is ``right = 0``, aligned at the bottom right. Padding is what
``(first, length)`` of a row leaves out, or what lies outside the packed sequences: never read, zeros in the output and
in the gradients.

Long sequences are bound by ``2 * S_q * S_k * H * (D + D_v)`` FLOPs (half of it causal, 2.5 times in the backward),
short ones by bytes. The backward recomputes ``P = exp(S - lse)``, then ``dV = P.T dO``,
``dS = scale * P * (dO V.T - rowsum(O * dO))``, ``dQ = dS K``, ``dK = dS.T Q``.
Sources: FlashAttention-2 (arXiv 2307.08691), FlashAttention-3 (arXiv 2407.08608).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from onegpu.errors import bad_argument
from onegpu.kernels.autocast import autocast_dtype
from onegpu.kernels.library import define, has_triton

IMPLEMENTATIONS = ("auto", "definition", "portable", "hopper")
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_DIM = 256  # of the kernels


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
        for b in range(len(ends_q) - 1):
            rows, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
            yield _Sequence((rows,), (keys,), (slice(None), rows))
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


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = Options(*rest)
    out, lse = _forward_fake(q, k, v, *rest)
    out.zero_()
    lse.fill_(-math.inf)
    for at in _sequences(q, k, options):
        keys, values = (_by_head(x[at.k], k.shape[-2]) for x in (k, v))
        scores = _scores(_by_head(q[at.q], k.shape[-2]), keys, options)
        if scores.numel():
            logarithm = torch.logsumexp(scores, -1)
            lse[at.lse] = logarithm.flatten(0, 1)
            out[at.q] = _rows(_probabilities(scores, logarithm) @ values).to(out.dtype)
    return out, lse


def _forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *batch, heads, _ = q.shape
    shape = (batch[0], heads, batch[1]) if len(batch) == 2 else (heads, batch[0])
    return q.new_empty((*batch, heads, v.shape[-1])), q.new_empty(shape, dtype=_lse_dtype(q))


_Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _backward(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, deterministic: bool, *rest: Any,
) -> _Gradients:  # fmt: skip
    options = Options(*rest)
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    heads = k.shape[-2]
    for at in _sequences(q, k, options):
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


def _backward_fake(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> _Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _implementation(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, backward: bool = False) -> str:
    """What serves these inputs on a GPU: the name that was asked for, or the best for "auto"."""
    name = options.implementation
    kernels = has_triton() and q.dtype in _KERNEL_DTYPES and max(q.shape[-1], v.shape[-1]) <= _MAX_HEAD_DIM
    kernels = kernels and options.scale > 0 and q.numel() > 0 and v.numel() > 0
    if name == "definition" or (name == "auto" and not kernels):
        return "definition"
    hopper = False
    if kernels and name != "portable":
        from onegpu.kernels import attention_hopper

        hopper = attention_hopper.serves(q, k, v, backward=backward)
    if name == "auto":
        return "hopper" if hopper else "portable"
    if name == "hopper" and backward and not hopper:
        return "portable"  # head dims past 128
    if not kernels or (name == "hopper" and not hopper):
        fix = "Leave it out. Kernels take 16-bit (portable also float32) inputs, head dims to 256 and a positive scale"
        raise bad_argument("implementation", name, "cannot serve these inputs", fix)
    return name


def _readable(x: torch.Tensor) -> torch.Tensor:
    """What the kernels read: the head dim side by side, rows that begin on 16 bytes; a copy where it is not so.

    Rows elsewhere would be loaded two bytes at a time (and Triton 3.6 made wrong code of it).
    """
    *outer, last = x.stride()
    on_16_bytes = x.data_ptr() % 16 == 0
    for n, stride in zip(x.shape, outer, strict=False):
        on_16_bytes = on_16_bytes and (n == 1 or stride % 8 == 0)
    return x if last == 1 and on_16_bytes else x.clone(memory_format=torch.contiguous_format)


def _padded(x: torch.Tensor) -> torch.Tensor:
    """With zeros behind each head, to a multiple of 8 columns: products and sums of both are the same."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 8))


def _forward_cuda(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = Options(*rest)
    if options.implementation != "definition" and (q.shape[-1] % 8 or v.shape[-1] % 8):
        out, lse = _forward_cuda(_padded(q), _padded(k), _padded(v), *rest)
        return out[..., : v.shape[-1]].contiguous(), lse
    q, k, v = _readable(q), _readable(k), _readable(v)
    name = _implementation(q, k, v, options)
    if name == "definition":
        return _forward(q, k, v, *rest)
    out, lse = _forward_fake(q, k, v, *rest)
    if name == "hopper":
        from onegpu.kernels import attention_hopper

        attention_hopper.forward(q, k, v, out, lse, *rest[:-2])
    else:
        from onegpu.kernels import attention_triton

        attention_triton.forward(q, k, v, out, lse, *rest[:-2])
    return out, lse


def _backward_cuda(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, deterministic: bool, *rest: Any,
) -> _Gradients:  # fmt: skip
    options = Options(*rest)
    if options.implementation != "definition" and (q.shape[-1] % 8 or v.shape[-1] % 8):
        wide = [_padded(x) for x in (q, k, v, out)]
        made = _backward_cuda(_padded(grad), grad_lse, *wide, lse, deterministic, *rest)
        dq, dk, dv = (x[..., : like.shape[-1]].contiguous() for x, like in zip(made, (q, k, v), strict=True))
        return dq, dk, dv
    grad, q, k, v = _readable(grad), _readable(q), _readable(k), _readable(v)
    name = _implementation(q, k, v, options, backward=True)
    if name == "definition":
        return _backward(grad, grad_lse, q, k, v, out, lse, deterministic, *rest)
    gradients = _backward_fake(grad, grad_lse, q, k, v)
    if options.cu_seqlens_q is not None:  # the kernels write the rows of sequences only
        for x in gradients:
            x.zero_()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    if name == "hopper" and not deterministic:
        from onegpu.kernels import attention_hopper

        attention_hopper.backward(grad, grad_lse, q, k, v, out, lse, gradients, *rest[:-1])
    else:
        from onegpu.kernels import attention_triton_backward

        attention_triton_backward.backward(grad, grad_lse, q, k, v, out, lse, gradients, *rest[:-1])
    return gradients


_OPTIONS = (
    "float scale, SymInt left, SymInt right, Tensor? q_range, Tensor? k_range, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, str implementation"
)
define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    _forward,
    _forward_fake,
    cuda=_forward_cuda,
)
define(
    "attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"bool deterministic, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward,
    _backward_fake,
    cuda=_backward_cuda,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, deterministic: bool, options: Options
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = torch.ops.onegpu.attention_forward(q, k, v, *options)
        ctx.save_for_backward(q, k, v, out, lse, *(x for x in options if isinstance(x, torch.Tensor)))
        ctx.options = tuple(isinstance(x, torch.Tensor) or x for x in options)  # True where a tensor was
        ctx.deterministic = deterministic
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, *ranges = ctx.saved_tensors
        if grad is None:
            if grad_lse is None:
                return None, None, None, None, None
            grad = torch.zeros_like(out)
        options = (ranges.pop(0) if x is True else x for x in ctx.options)
        deterministic = ctx.deterministic
        gradients = torch.ops.onegpu.attention_backward(grad, grad_lse, q, k, v, out, lse, deterministic, *options)
        return *gradients, None, None


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, causal: bool = False,
    window: tuple[int, int] | None = None, q_range: torch.Tensor | None = None, k_range: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None, cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, deterministic: bool | None = None,
    return_lse: bool = False, implementation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Softmax attention of dense, padded or packed sequences.

    Args:
        q: ``[B, S_q, H, D]``, or ``[T, H, D]`` with ``cu_seqlens_q``; any strides.
        k: ``[B, S_k, H_kv, D]`` (``[T_k, H_kv, D]``), H a multiple of H_kv: each key head serves H / H_kv query heads.
        v: ``[B, S_k, H_kv, D_v]`` (``[T_k, H_kv, D_v]``).
        scale: of the scores; None is ``1 / sqrt(D)``.
        causal: hide the keys after each query, the last query aligned with the last key.
        window: (left, right), how many keys before and after its own position a query sees; -1 is no limit.
        q_range, k_range: int32 ``[B, 2]`` on the device of q, (first, length) of the real rows of each batch row. What
            the others hold does not matter, not even NaN; their output and gradients are zeros. None: all are real.
        cu_seqlens_q, cu_seqlens_k: int32 ``[B + 1]`` on the device of q: packed sequence b is
            ``[cu_seqlens[b], cu_seqlens[b + 1])``. Rows before the first and after the last are padding.
        max_seqlen_q, max_seqlen_k: upper bounds of packed lengths; without them T is, which starts idle blocks.
        deterministic: gradients bit-equal from run to run; None is ``torch.are_deterministic_algorithms_enabled()``.
        return_lse: also return the log-sum-exp.
        implementation: None chooses; else one of `IMPLEMENTATIONS`, an error where that cannot serve.

    Returns:
        ``[B, S_q, H, D_v]`` (``[T, H, D_v]``), contiguous, in the dtype of q; with ``return_lse`` also the natural
        logarithms of each row's sum, float32 ``[B, H, S_q]`` (``[H, T]``; float64 for float64). A row that sees no key
        gives zeros and -inf. Both are differentiable in q, k and v.

    Raises:
        ArgumentError: shapes, dtypes or combinations that cannot work.
    """
    dtype = autocast_dtype(q.device.type)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, q_range, k_range, cu_seqlens_q, cu_seqlens_k, implementation)
    left, right = (-1, -1) if window is None else window
    if causal:
        right = 0 if right < 0 else min(right, 0)
    options = Options(
        q.shape[-1] ** -0.5 if scale is None else scale, left, right, q_range, k_range, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q or q.shape[-3], max_seqlen_k or k.shape[-3],
        "auto" if implementation is None else implementation,
    )  # fmt: skip
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        out, lse = _Attention.apply(q, k, v, deterministic, options)
    else:
        out, lse = torch.ops.onegpu.attention_forward(q, k, v, *options)
    return (out, lse) if return_lse else out


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_range: torch.Tensor | None, k_range: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None, implementation: str | None,
) -> None:  # fmt: skip
    packed = cu_seqlens_q is not None
    if packed != (cu_seqlens_k is not None):
        missing = "cu_seqlens_k" if packed else "cu_seqlens_q"
        raise bad_argument(missing, None, "is needed for packed sequences", "Pass both cu_seqlens")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != (3 if packed else 4):
            wanted = "[T, H, D] with cu_seqlens" if packed else "[B, S, H, D] without cu_seqlens"
            raise bad_argument(name, list(x.shape), "has the wrong number of dimensions", f"Pass {wanted}")
        if x.dtype != q.dtype or not x.is_floating_point():
            raise bad_argument(name, x.dtype, "is not the floating dtype of q", "Cast q, k and v to one dtype")
    if k.shape[-1] != q.shape[-1] or (not packed and k.shape[0] != q.shape[0]):
        raise bad_argument("k", list(k.shape), f"does not fit q {list(q.shape)}", "Use the batch and head dim of q")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        why = f"has heads whose number does not divide the query heads, {q.shape[-2]}"
        raise bad_argument("k", list(k.shape), why, "Pass one key head for each group of query heads")
    if k.shape[:-1] != v.shape[:-1]:
        raise bad_argument("v", list(v.shape), "has other rows or heads than k", f"Pass {[*k.shape[:-1], 'D_v']}")
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if ends is not None and (ends.ndim != 1 or ends.dtype != torch.int32 or ends.device != q.device):
            raise bad_argument(name, ends, "is not an int32 vector on the device of q", "Pass int32 [B + 1]")
    for name, rows in (("q_range", q_range), ("k_range", k_range)):
        if rows is None:
            continue
        if packed:
            raise bad_argument(name, rows, "is for padded batches", "Pass either ranges or cu_seqlens")
        if rows.shape != (q.shape[0], 2) or rows.dtype != torch.int32 or rows.device != q.device:
            raise bad_argument(name, rows, "is not int32 [B, 2] on the device of q", "Pass (first, length) of each row")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise bad_argument("implementation", implementation, "is not known", f"Use one of {IMPLEMENTATIONS}")


def cost(
    batch: int, s_q: int, s_k: int, heads: int, heads_kv: int, d: int, d_v: int, itemsize: int, *, causal: bool = False,
    backward: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Bytes that must be moved and FLOPs of one dense call; of a causal one the products that are seen."""
    pairs = s_q * s_k
    if causal:
        pairs = s_k * (s_k + 1) // 2 if s_q > s_k else pairs - s_q * (s_q - 1) // 2
    read = batch * itemsize * (s_q * heads * (d + d_v) + s_k * heads_kv * (d + d_v)) + batch * heads * s_q * 4
    flops = 2 * batch * heads * pairs * (d + d_v)
    if not backward:
        return read, flops
    return 2 * read + batch * itemsize * s_q * heads * d_v, 2 * batch * heads * pairs * (3 * d + 2 * d_v)
