"""Launching the Hopper attention: what it serves, its descriptors, its configurations."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from onegpu.kernels import attention_sm90, attention_sm90_backward, attention_sm90_few, attention_sm90_rows
from onegpu.kernels.attention_definition import forward_fake
from onegpu.kernels.guard import current_device, raw_stream
from onegpu.kernels.hopper import LOG2E
from onegpu.kernels.launch import triton_bind
from onegpu.kernels.triton_kernel import Bound

TRITON_VERSIONS = ("3.6.", "3.7.")  # what the kernels were compiled with; Gluon changes between releases
_L2_BYTES = 32 << 20  # what the keys and values of the heads that run together may take of it
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_FEW_QUERIES = 1024  # up to here few tiles have a kernel that compiles in a quarter of the time
_SMALLEST = 32  # head dim from which on padding it to 64 pays


def serves(*tensors: torch.Tensor, backward: bool = False) -> bool:
    """Whether the kernels take these q, k, v: Hopper, 16 bits, aligned for TMA; the backward, head dims up to 128."""
    if not triton.__version__.startswith(TRITON_VERSIONS) or tensors[0].dtype not in _DTYPES:
        return False
    if backward and not boxed(tensors[0].shape[-1]) == boxed(tensors[2].shape[-1]) <= 128:
        return False
    return _is_hopper(tensors[0].get_device()) and all(map(_for_tma, tensors))


@lru_cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


@lru_cache
def processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def _wide_memory(device: int) -> bool:
    """Whether the memory is an H200's (4.8 TB/s) and not an H100's (3.35): 6144 bits wide and not 5120."""
    return getattr(torch.cuda.get_device_properties(device), "memory_bus_width", 0) > 5120


def _for_tma(x: torch.Tensor) -> bool:
    """Head dim side by side, and everything else on 16 bytes."""
    *outer, last = x.stride()
    if last != 1 or x.shape[-1] <= _SMALLEST or x.shape[-1] % 8 or x.data_ptr() % 16:
        return False
    return all(n == 1 or (stride > 0 and stride % 8 == 0) for n, stride in zip(x.shape, outer, strict=False))


def boxed(d: int) -> int:
    """The head dim in shared memory; TMA fills what is past the real one with zeros."""
    return 64 if d <= 64 else 128 if d <= 128 else 256


@lru_cache
def _layout(box: tuple[int, ...], dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for(list(box), _DTYPES[dtype])


def descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """A TMA descriptor of ``[B, S, H, D]`` (or packed ``[T, H, D]``) as (batch, head, row, column)."""
    s_row, s_head, _ = x.stride()[-3:]
    n_row, heads, d = x.shape[-3:]
    batch, s_batch = (x.shape[0], x.stride(0)) if x.ndim == 4 else (1, 8)
    box = [1, 1, rows, boxed(d)]
    made = object.__new__(TensorDescriptor)  # the constructor checks, in 5 microseconds, what `serves` has checked
    made.base, made.padding, made.block_shape = x, "zero", box
    # the stride of a single row, head or sequence may be anything: 8 is allowed
    made.shape = [batch, heads, n_row, d]
    made.strides = [s_batch if batch > 1 else 8, s_head if heads > 1 else 8, s_row if n_row > 1 else 8, 1]
    made.layout = _layout(tuple(box), x.dtype)
    return made


def scratch(rows: torch.Tensor, total: torch.Tensor) -> list[TensorDescriptor]:
    """Descriptors of the backward's float32 scratch memory: a block's (lse, delta), and a 64 x 64 tile of dQ."""
    made = []
    for x, box, swizzle in ((rows, [1, rows.shape[1]], 0), (total, [64, 64], 128)):
        one = object.__new__(TensorDescriptor)
        one.base, one.padding, one.block_shape = x, "zero", box
        one.shape, one.strides = list(x.shape), list(x.stride())
        one.layout = _scratch_layout(swizzle)
        made.append(one)
    return made


@lru_cache
def _scratch_layout(swizzle: int) -> Any:
    return gl.NVMMASharedLayout(swizzle, 32, rank=2)


def rows_of(rows: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """Where the kernels read a sequence's first row and length, and how."""
    if cu_seqlens is not None:
        return cu_seqlens, 2
    return rows, 0 if rows is None else 1


def _counter(device: int) -> torch.Tensor:
    """What tiles are drawn from: zero, and of this call alone. A sheet of them is zeroed at once, on the same stream;
    while a graph is captured one, by the graph.
    """
    if device != current_device() or torch.cuda.is_current_stream_capturing():
        return _zeros(1, device)
    sheet = _sheets[device, raw_stream(device)]
    try:
        return sheet.pop()
    except IndexError:
        sheet += _zeros(4 * SHEET, device).view(SHEET, 4).unbind()  # aligned to 16 bytes each
        return sheet.pop()


SHEET = 1024
_sheets: defaultdict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)  # by device and stream: not used yet


def _zeros(size: int, device: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32, device=torch.device("cuda", device))


@lru_cache
def _number(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What, expanded, `torch.empty_like` makes tensors from, in two thirds of the time of `torch.empty`."""
    return torch.empty((), dtype=dtype, device=device)


def for_tma(x: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy that TMA can read."""
    return x if _for_tma(x) else x.contiguous()


class Forward(NamedTuple):
    """A forward that is ready: for tensors of the layout that it was made for."""

    launch: Bound
    draws: bool
    device: int
    like_out: torch.Tensor | None  # None: q
    like_lse: torch.Tensor

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_rows: torch.Tensor | None,
        k_rows: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """(out, lse). q_rows, k_rows: ranges or cu_seqlens."""
        like = q if self.like_out is None else self.like_out
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        lse = torch.empty_like(self.like_lse, memory_format=torch.contiguous_format)
        given = [q, k, v, out]
        if q_rows is not None:
            given.append(out)
        given.append(lse)
        if q_rows is not None:
            given.append(q_rows)
        if k_rows is not None:
            given.append(k_rows)
        if self.draws:
            given.append(_counter(self.device))
        self.launch(*given)
        return out, lse


def _dense(
    wide: int, causal: bool, whole: bool, n_m: int, section: int, blocks: int, memory_bound: bool
) -> tuple[dict[str, Any], int]:
    """Constants and heads of a section, for sequences of n_m tiles each (whole: exactly), as measured on an H100.

    Up to 512 queries, tiles dealt out beforehand, with lengths mixed, beat drawn ones; of more than 256, whole or not
    and with 16 heads at a time, by 2 to 7 % (H200, 512 to 4,096 tiles). Where memory binds these, drawn ones win by 3
    to 7 % (H100, head dim 128 without groups).
    """
    short = 2 < n_m <= 4
    if wide > 128 or not (whole or short):
        return {}, section
    if n_m <= 4:
        mixed = causal and n_m > 1
        if mixed and short and memory_bound:
            return {}, min(section, 16)
        return {"DRAW": False, "ROTATE": int(mixed)}, (16 if short else max(1, blocks // n_m)) if mixed else section
    found: dict[str, Any] = {}
    if wide == 64:
        found["ST"] = 4 if n_m <= 8 else 3
        # S a block ahead costs 0.4 to 1.4 us a tile and gains 0.09 us a block of keys
        if n_m >= (32 if causal else 8):
            found |= {"AHEAD": True, "HALF": 0}
    return found, min(section, 16) if n_m <= 8 else section


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, left: int, right: int,
    q_range: torch.Tensor | None, k_range: torch.Tensor | None, cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None, max_seqlen_q: int, **options: Any,
) -> Forward:  # fmt: skip
    """As the op, for what `serves`. options: constants of the kernel, other than chosen here.

    Does not run it: returns what does.
    """
    (s_q, heads, d), (s_k, heads_kv, d_v) = q.shape[-3:], v.shape[-3:]
    out, lse = forward_fake(q, k, v)
    q_rows, how_q = rows_of(q_range, cu_seqlens_q)
    k_rows, how_k = rows_of(k_range, cu_seqlens_k)
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    alias = boxed(d) == boxed(d_v) == 256
    aligned = right >= 0 and not how_q and not how_k and (s_k - s_q + right) % 64 == 0
    constants = {"BN": 64 if max(d, d_v) > 128 else 128, "ST": 2, "ROTATE": 0, "section": 0} | options
    bn, section, m = constants["BN"], constants["section"], 128
    n_m = triton.cdiv(s_q if cu_seqlens_q is None else max_seqlen_q, m)
    tiles = n_m * heads * batch
    device = q.get_device()
    blocks = min(tiles, processors(device))
    group = heads // heads_kv
    like_out = None if d == d_v else _number(out.dtype, out.device).expand(out.shape)
    like_lse = _number(lse.dtype, lse.device).expand(lse.shape)
    n_few = triton.cdiv(s_q, 64)  # tiles of 64 rows: all run at once, two a processor, or are single queries
    few = s_q == 1 or (s_q <= _FEW_QUERIES and n_few * heads * batch <= 2 * processors(device))
    if few and not how_q and not how_k and not options:
        launch = triton_bind(
            attention_sm90_few.few_kernel, (n_few * heads * batch,), descriptor(q, 64), descriptor(k, bn),
            descriptor(v, bn), descriptor(out, 64), lse, heads, group, s_q, s_k, n_few, scale * LOG2E.value, left,
            right if right >= 0 else s_q + s_k, LEFT=left >= 0, num_warps=4,
        )  # fmt: skip
        return Forward(launch, False, device, like_out, like_lse)
    # Of a window, only the keys that the running tiles see are in use: 3 % on an H100.
    used = min(s_k, left + right + 1 + m) if min(left, right) >= 0 and not how_q and not how_k else s_k
    section = section or max(1, min(batch * heads, _L2_BYTES // (used * (d + d_v) * 2) * group))
    if how_q == 1:  # few heads of a sequence at a time, so that its padding does not come all at once: 10 % on an H100
        section = options.get("section") or min(section, 4)
    # Of the keys that the diagonal cuts, the first (1) or the second (2) consumer sees half. Where each block has one
    # tile the other consumer is waited for anyway.
    halved = aligned and right == 0 and bn == 128 and tiles > blocks
    half = 1 + (s_k - s_q) // 64 % 2 if halved else 0
    constants = {
        "HEAD": d_v, "LEFT": left >= 0, "RIGHT": right >= 0, "ALIGNED": aligned, "WIDE": left >= bn + 128, "RQ": how_q,
        "RK": how_k, "DRAW": tiles > blocks, "ALIAS": alias, "AHEAD": False, "HALF": half,
    } | constants  # fmt: skip
    if not how_q and not how_k and left < 0 and (aligned or right < 0) and tiles > blocks and s_q == s_k:
        memory_bound = group == 1 and max(d, d_v) > 96 and not _wide_memory(device)
        found, section = _dense(boxed(max(d, d_v)), right >= 0, s_q == n_m * m, n_m, section, blocks, memory_bound)
        constants |= found | options
        section = options.get("section") or section
    del constants["section"]
    drawn = _counter(device) if constants["DRAW"] else None
    launch = triton_bind(
        attention_sm90.forward_kernel, (blocks,), descriptor(q, 64), descriptor(k, bn), descriptor(v, bn),
        descriptor(out, 64), out if how_q else None, lse, q_rows, k_rows, drawn, batch, heads, group, s_q, s_k, n_m,
        section, scale * LOG2E.value, left, right, **constants, num_warps=4,
    )  # fmt: skip
    return Forward(launch, constants["DRAW"], device, like_out, like_lse)


class Backward(NamedTuple):
    """A backward that is ready: for tensors of the layout that it was made for."""

    before: Bound
    main: Bound
    after: Bound
    device: int
    draws: bool
    turns: int  # numbers that a deterministic one counts in, the first of which tiles are drawn from
    sum_shape: tuple[int, int]
    rows_shape: tuple[int, int]

    def __call__(
        self, grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor, lse: torch.Tensor, gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        q_rows: torch.Tensor | None, k_rows: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """grad as `for_tma` makes it, grad_lse contiguous; q_rows, k_rows: ranges or cu_seqlens."""
        dq, dk, dv = gradients
        q_rows, k_rows = lse if q_rows is None else q_rows, lse if k_rows is None else k_rows
        total, rows = lse.new_empty(self.sum_shape), lse.new_empty(self.rows_shape)
        given = (out, grad, lse) if grad_lse is None else (out, grad, lse, grad_lse)
        self.before(*given, rows, total, q_rows)
        drawn = _zeros(self.turns, self.device) if self.turns else _counter(self.device) if self.draws else lse
        self.main(q, k, v, grad, dk, dv, rows, total, dk, dv, q_rows, k_rows, drawn)
        self.after(total, dq, q_rows)


def backward(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scale: float,
    left: int, right: int, q_range: torch.Tensor | None, k_range: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
    *, deterministic: bool = False, **options: Any,
) -> Backward:  # fmt: skip
    """As the op, for what `serves`; out and the gradients (dq, dk, dv) contiguous, grad as `for_tma` makes it.

    Of packed ones, rows of no sequence are not written. deterministic: dQ too is the same on every run. options:
    constants of the main kernel. Does not run it: returns what does.
    """
    (s_q, heads, d), (s_k, heads_kv, d_v) = q.shape[-3:], v.shape[-3:]
    dq, dk, dv = gradients
    q_rows, how_q = rows_of(q_range, cu_seqlens_q)
    k_rows, how_k = rows_of(k_range, cu_seqlens_k)
    q_rows, k_rows = lse if q_rows is None else q_rows, lse if k_rows is None else k_rows
    packed = cu_seqlens_q is not None
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    wide = boxed(d)
    m = 8192 // wide  # queries of a step
    n_m, n_n = triton.cdiv(max_seqlen_q if packed else s_q, m), triton.cdiv(max_seqlen_k if packed else s_k, 128)
    # Scratch memory in blocks of m queries: a packed sequence begins a block of its own, at cu_seqlens[b] // m + b.
    n_b = s_q // m + batch if packed else n_m
    blocks = n_b * heads * (1 if packed else batch)
    total, rows = lse.new_empty(blocks * m, wide), lse.new_empty(blocks, 2 * m)
    strides = (0, *grad.stride()[:2]) if packed else grad.stride()[:3]
    sizes = {"D": wide, "M": m, "RQ": how_q}
    tiles = n_n * heads_kv * batch
    started = min(tiles, processors(q.get_device()))
    section = max(1, min(batch * heads_kv, _L2_BYTES // (heads // heads_kv * s_q * wide * 8)))
    # Measured on an H100, causal: loads by four warps and a loop for masked blocks, together, gain 18 % for D = 64 and
    # 6 % for 128, where neither gains alone. In turns, that loop costs 15 % for 128 and changes nothing for 64.
    diagonal = right >= 0 > left
    constants = {
        "HEAD": d, "HEAD_V": d_v, "ST": 2, "LEFT": left >= 0, "RIGHT": right >= 0,
        "EVEN": not how_k and s_k % 128 == 0, "RQ": how_q, "RK": how_k,
        "DRAW": 2 if deterministic else int(tiles > started), "SWAP": wide == 64 or diagonal,
        "SPLIT": diagonal and not deterministic, "ORDER": deterministic,
    } | options  # fmt: skip
    before = triton_bind(
        attention_sm90_rows.before_kernel, (n_m * heads * batch,), out, grad, lse, grad_lse, rows, total, q_rows,
        *strides, heads, s_q, n_b, n_m, HEAD=d_v, **sizes, num_warps=4,
    )  # fmt: skip
    device, draws, turns = q.get_device(), bool(constants["DRAW"]), 2 + 2 * blocks if constants["ORDER"] else 0
    main = triton_bind(
        attention_sm90_backward.backward_kernel, (started,), descriptor(q, m), descriptor(k, 64), descriptor(v, 64),
        descriptor(grad, m), descriptor(dk, 64), descriptor(dv, 64), *scratch(rows, total), dk, dv, q_rows,
        k_rows, _zeros(1, device), batch, heads, heads_kv, s_q, s_k, n_b, n_n, section, scale, scale * LOG2E.value,
        left, right, **constants, num_warps=4,
    )  # fmt: skip
    tiles_q = triton.cdiv(max_seqlen_q if packed else s_q, 64) * (wide // 64)
    after = triton_bind(
        attention_sm90_rows.after_kernel, (tiles_q * heads * batch,), total, dq, q_rows, heads, s_q, n_b, tiles_q,
        scale, HEAD=d, **sizes, num_warps=4,
    )  # fmt: skip
    return Backward(before, main, after, device, draws, turns, (blocks * m, wide), (blocks, 2 * m))
