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

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from onegpu.errors import bad_argument
from onegpu.kernels.attention_definition import backward, backward_fake, forward, forward_fake
from onegpu.kernels.attention_dispatch import IMPLEMENTATIONS, again, backward_cuda, forward_cuda, plain
from onegpu.kernels.autocast import autocast_dtype
from onegpu.kernels.library import define
from onegpu.kernels.warmup import register

_OPTIONS = (
    "float scale, SymInt left, SymInt right, Tensor? q_range, Tensor? k_range, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, str implementation"
)
define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    forward,
    forward_fake,
    cuda=forward_cuda,
)
define(
    "attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"bool deterministic, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)",
    backward,
    backward_fake,
    cuda=backward_cuda,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, deterministic: bool, options: tuple[Any, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        made = forward_cuda if plain(q, k, v) else torch.ops.onegpu.attention_forward
        out, lse = made(q, k, v, *options)
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
        made = backward_cuda if plain(grad, q, k, v) else torch.ops.onegpu.attention_backward
        gradients = made(grad, grad_lse, q, k, v, out, lse, deterministic, *options)
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
            ``[cu_seqlens[b], cu_seqlens[b + 1])``. Rows before the first and after the last are padding. They must not
            fall, nor pass T; only the CPU looks, since on a GPU reading them would wait for it.
        max_seqlen_q, max_seqlen_k: upper bounds of packed lengths; without them T is, which starts idle blocks.
        deterministic: gradients bit-equal from run to run; None is ``torch.are_deterministic_algorithms_enabled()``.
        return_lse: also return the log-sum-exp.
        implementation: None chooses; else one of `IMPLEMENTATIONS`, an error where that cannot serve. On a CPU all are
            the definition.

    Returns:
        ``[B, S_q, H, D_v]`` (``[T, H, D_v]``), contiguous, in the dtype of q; with ``return_lse`` also the natural
        logarithms of each row's sum, float32 ``[B, H, S_q]`` (``[H, T]``; float64 for float64). A row that sees no key
        gives zeros and -inf. Both are differentiable in q, k and v.

    Raises:
        ArgumentError: shapes, dtypes or combinations that cannot work.
    """
    dtype = autocast_dtype("cuda" if q.is_cuda else q.device.type)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if q.ndim < 3 or k.ndim < 3:
        _check(q, k, v, q_range, k_range, cu_seqlens_q, cu_seqlens_k, implementation)
    if window is not None and not _is_window(window):
        raise bad_argument("window", window, "is not (left, right)", "Pass two numbers of keys; -1 is no limit")
    left, right = (-1, -1) if window is None else window
    if causal:
        right = 0 if right < 0 else min(right, 0)
    options = (  # of `Options`, which would take longer to make
        q.shape[-1] ** -0.5 if scale is None else scale, left, right, q_range, k_range, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q or q.shape[-3], max_seqlen_k or k.shape[-3],
        "auto" if implementation is None else implementation,
    )  # fmt: skip
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        _check(q, k, v, q_range, k_range, cu_seqlens_q, cu_seqlens_k, implementation)
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        out, lse = _Attention.apply(q, k, v, deterministic, options)
    else:
        made = again(q, k, v, options) if plain(q, k, v) else None
        if made is None:
            _check(q, k, v, q_range, k_range, cu_seqlens_q, cu_seqlens_k, implementation)
            made = torch.ops.onegpu.attention_forward(q, k, v, *options)
        out, lse = made
    return (out, lse) if return_lse else out


def _is_window(window: Any) -> bool:
    if not isinstance(window, tuple | list) or len(window) != 2:
        return False
    return all(isinstance(side, int | torch.SymInt) and side >= -1 for side in window)


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
        if x.device != q.device:
            raise bad_argument(name, str(x.device), f"is not the device of q, {q.device}", "Move q, k and v to one")
    if k.shape[-1] != q.shape[-1] or (not packed and k.shape[0] != q.shape[0]):
        raise bad_argument("k", list(k.shape), f"does not fit q {list(q.shape)}", "Use the batch and head dim of q")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        why = f"has heads whose number does not divide the query heads, {q.shape[-2]}"
        raise bad_argument("k", list(k.shape), why, "Pass one key head for each group of query heads")
    if k.shape[:-1] != v.shape[:-1]:
        raise bad_argument("v", list(v.shape), "has other rows or heads than k", f"Pass {[*k.shape[:-1], 'D_v']}")
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if ends is not None and not (_is_int32(ends, q.device) and ends.ndim == 1 and ends.numel()):
            raise bad_argument(name, ends, "is not an int32 vector on the device of q", "Pass int32 [B + 1]")
    if cu_seqlens_q is not None and cu_seqlens_k is not None and cu_seqlens_q.numel() != cu_seqlens_k.numel():
        why = f"does not go with the {cu_seqlens_q.numel() - 1} sequences of cu_seqlens_q"
        raise bad_argument("cu_seqlens_k", cu_seqlens_k, why, "Pass one end more than there are sequences, in both")
    for name, rows in (("q_range", q_range), ("k_range", k_range)):
        if rows is None:
            continue
        if packed:
            raise bad_argument(name, rows, "is for padded batches", "Pass either ranges or cu_seqlens")
        if not _is_int32(rows, q.device) or rows.shape != (q.shape[0], 2):
            raise bad_argument(name, rows, "is not int32 [B, 2] on the device of q", "Pass (first, length) of each row")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise bad_argument("implementation", implementation, "is not known", f"Use one of {IMPLEMENTATIONS}")


def _is_int32(x: Any, device: torch.device) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype == torch.int32 and x.device == device


@register("attention")
def _warm(
    device: torch.device, dtype: torch.dtype, rows: int, heads: int, heads_kv: int, d: int, d_v: int, batch: int = 1,
    causal: bool = True, window: int | None = None, scale: float | None = None, backward: bool = False,
    padded: bool = True,
) -> None:  # fmt: skip
    """So many sequences of so many rows, as they are and, if padded, with padding; window: keys that a query sees, its
    own too."""
    shapes = (batch, rows, heads, d), (batch, rows, heads_kv, d), (batch, rows, heads_kv, d_v)
    q, k, v = (torch.zeros(shape, dtype=dtype, device=device, requires_grad=backward) for shape in shapes)
    real = torch.tensor([[0, rows]] * batch, dtype=torch.int32, device=device)
    # A single query is the last one, and sees all keys.
    options: dict[str, Any] = {"causal": causal and rows > 1, "scale": scale}
    options["window"] = None if window is None else (window - 1, -1)
    with torch.set_grad_enabled(backward):
        for ranges in (None, real) if padded else (None,):
            out = attention(q, k, v, q_range=ranges, k_range=ranges, **options)
            if backward:
                torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))  # type: ignore[arg-type]


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
