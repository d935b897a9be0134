"""Triton kernels of ``decode_attention``, imported at the first call on a GPU. Compiled with Triton 3.6 and 3.7.

One program takes one part of the keys of one key head, for up to 128 rows: the T queries of the G heads that share it.
Parts are equal shares of the keys that the sequence really has, so that every program of a graph captured for the
longest cache has work at any length. Where the cache is short the parts of a head are few and one cluster, whose
programs wait for each other and add the parts: a second kernel costs more than that. 16-bit scores are kept in base 2.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from onegpu.kernels import ahead
from onegpu.kernels.decode_attention import FEWEST_KEYS, splits
from onegpu.kernels.launch import triton_bind
from onegpu.kernels.triton_kernel import Bound

_LOG2E = tl.constexpr(1.4426950408889634)
_CLUSTER = 8  # programs; more than 8 are a matter of luck with the layout of the chip
_CLUSTER_KEYS = 512  # that one of them has at most
_COMBINE_WARPS = 1  # no barrier stands between its loads and its sums
_TILE = 8192  # rows × (D + D_v)
_MOST_PLANS = 4096
_SHARED = 228 * 1024  # bytes that a Hopper SM has


@triton.jit
def _tanh(b_x):
    """Accurate to float32's last bits, unlike the hardware's, and 1 - 2 / (1 + exp(2 x)) for small x."""
    b_square = b_x * b_x
    b_small = -0.008412559 + b_square * 0.0023735163  # fitted to (tanh(x) / x - 1) / x² for |x| < 0.6
    b_small = -0.053961653 + b_square * (0.021789111 + b_square * b_small)
    b_small = -0.33333334 + b_square * (0.13333313 + b_square * b_small)
    b_size = tl.abs(b_x)
    b_large = 1.0 - 2.0 / (1.0 + tl.exp2(b_size * (2.0 * _LOG2E)))
    return tl.where(b_size < 0.6, b_x + b_x * (b_square * b_small), tl.where(b_x < 0, -b_large, b_large))


@triton.jit
def _add_parts(
    p_parts, p_stats, p_to, i_part, SPLITS, ROWS,
    DV: tl.constexpr, BP: tl.constexpr, BDV: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One row of the output. i_part: of its first part; those of the others lie ROWS further each."""
    o_dv, o_p = tl.arange(0, BDV), tl.arange(0, BP)
    m_dv = (o_dv < DV)[None, :]
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    b_acc = tl.zeros([BDV], tl.float32)
    for i_s in range(0, SPLITS, BP):
        m_p = i_s + o_p < SPLITS
        o_part = i_part + (i_s + o_p) * ROWS  # [BP]
        # All is asked for before any is there.
        b_part = tl.load(p_parts + o_part[:, None] * DV + o_dv[None, :], mask=m_p[:, None] & m_dv, other=0.0)
        b_max = tl.load(p_stats + o_part * 2, mask=m_p, other=float("-inf"))
        b_sum = tl.load(p_stats + o_part * 2 + 1, mask=m_p, other=0.0)
        top = tl.maximum(peak, tl.max(b_max, 0))
        shrink = tl.where(peak == top, 1.0, tl.exp2((peak - top) * UNIT))
        # A part without keys has sum 0, and memory that nobody wrote. Of NaN alone it has the maximum -inf, and counts.
        b_scale = tl.where(b_sum == 0.0, 0.0, tl.where(b_max == top, 1.0, tl.exp2((b_max - top) * UNIT)))  # [BP]
        total = total * shrink + tl.sum(tl.where(b_sum == 0.0, 0.0, b_sum * b_scale), 0)
        b_acc = b_acc * shrink + tl.sum(tl.where((b_sum != 0.0)[:, None], b_part * b_scale[:, None], 0.0), 0)
        peak = top
    b_acc = b_acc / tl.where(total == 0.0, 1.0, total)
    tl.store(p_to + o_dv, b_acc.to(p_to.dtype.element_ty), mask=o_dv < DV)


@triton.jit(do_not_specialize=["HKV", "L", "ROW_TILES", "SPLITS", "window"])
def _split_kernel(
    p_q, p_k, p_v, p_length, p_first, p_slopes, p_out, p_parts,
    HKV, L, ROW_TILES, SPLITS, window, scale, softcap,
    q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_t, o_h,
    T: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, PIECE: tl.constexpr, BDV: tl.constexpr, ALIGN: tl.constexpr, FIRST: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    if PDL:  # the next kernel's programs are there when the last of these ends; they wait as well, for all before them
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    i_program = tl.program_id(0)
    i_split = i_program % SPLITS
    i_tile = (i_program // SPLITS) % ROW_TILES
    i_head = (i_program // SPLITS // ROW_TILES).to(tl.int64)  # of all sequences
    i_b, i_kv = i_head // HKV, i_head % HKV
    ROWS: tl.constexpr = T * G
    o_m = i_tile * BM + tl.arange(0, BM)  # [BM]; row t * G + g
    m_m = o_m < ROWS
    length = tl.minimum(tl.load(p_length + i_b), L)
    o_at = length - T + o_m // G  # [BM]; the query's position
    begin = 0
    if FIRST:
        begin = tl.maximum(tl.load(p_first + i_b), 0)
    if WINDOW:
        begin = tl.maximum(begin, length - T + 1 - window)
    share = tl.maximum(tl.cdiv(tl.cdiv(tl.maximum(length - begin, 0), SPLITS), 16) * 16, BN)
    begin += i_split * share
    end = tl.minimum(begin + share, length)
    o_stats = (i_head * SPLITS + i_split) * ROWS + o_m  # [BM]
    p_stats = p_parts + (tl.num_programs(0) // ROW_TILES).to(tl.int64) * ROWS * DV

    o_d, o_dv, o_n = tl.arange(0, PIECE), tl.arange(0, BDV), tl.arange(0, BN)
    o_h_m = i_kv * G + o_m % G  # [BM]; query head
    p_row = p_q + i_b * q_b + o_h_m * q_h + (o_m // G).to(tl.int64) * q_t
    b_q = tl.load(p_row[:, None] + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)  # [BM, PIECE]
    if SLOPES:
        b_slope = tl.load(p_slopes + o_h_m, mask=m_m, other=0.0).to(tl.float32) * (_LOG2E / UNIT)  # [BM]
    # Strides come divided by ALIGN: the compiler then knows that rows begin at multiples of it, and loads 16 bytes.
    p_kb = p_k + (i_b * k_b + i_kv * k_h) * ALIGN
    p_vb = p_v + (i_b * v_b + i_kv * v_h) * ALIGN
    o_k = o_n.to(tl.int64)[None, :] * k_n * ALIGN + o_d[:, None]  # [PIECE, BN]
    o_v = o_n.to(tl.int64)[:, None] * v_n * ALIGN + o_dv[None, :]  # [BN, BDV]
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BDV], tl.float32)
    for i_n in range(begin, end, BN):
        m_n = i_n + o_n < end  # [BN]
        m_k, m_v = m_n[None, :], m_n[:, None]
        if D != BD:
            m_k = m_k & (o_d < D)[:, None]
        if DV != BDV:
            m_v = m_v & (o_dv < DV)[None, :]
        p_kn = p_kb + tl.cast(i_n, tl.int64) * k_n * ALIGN + o_k
        b_k = tl.load(p_kn, mask=m_k, other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale  # [BM, BN]
        # float32 in pieces: sums of D terms one by one lose more than PyTorch's. Scaled before they are added, or the
        # compiler would make one long sum of them.
        for i_d in tl.static_range(PIECE, BD, PIECE):
            m_d = i_d + o_d < D
            b_qd = tl.load(p_row[:, None] + (i_d + o_d)[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
            b_kd = tl.load(p_kn + i_d, mask=m_n[None, :] & m_d[:, None], other=0.0)
            b_s += tl.dot(b_qd, b_kd, input_precision=PRECISION) * scale
        if SOFTCAP:
            if PRECISION == "ieee":
                b_s = softcap * _tanh(b_s)
            else:
                b_s = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(b_s * (2.0 * _LOG2E)))) * _LOG2E
        o_far = i_n + o_n[None, :] - o_at[:, None]  # [BM, BN]; 0 is the query's own key
        if SLOPES:
            b_s += b_slope[:, None] * o_far
        m_s = m_n[None, :] & (o_far <= 0)
        if WINDOW:
            m_s = m_s & (o_far > -window)
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_scale = tl.exp2((b_max - b_base) * UNIT)
        b_p = tl.exp2((b_s - b_base[:, None]) * UNIT)
        b_sum = b_sum * b_scale + tl.sum(b_p, 1)
        b_v = tl.load(p_vb + tl.cast(i_n, tl.int64) * v_n * ALIGN + o_v, mask=m_v, other=0.0)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_scale[:, None], input_precision=PRECISION)
        b_max = b_new

    m_out = m_m[:, None] & (o_dv < DV)[None, :]
    if WHOLE:
        b_acc = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
        p_to = p_out + i_b * o_b + o_h_m * o_h + (o_m // G).to(tl.int64) * o_t
        tl.store(p_to[:, None] + o_dv[None, :], b_acc.to(p_out.dtype.element_ty), mask=m_out)
    else:
        tl.store(p_parts + o_stats[:, None] * DV + o_dv[None, :], b_acc, mask=m_out & (begin < end))
        tl.store(p_stats + o_stats * 2, b_max, mask=m_m)
        tl.store(p_stats + o_stats * 2 + 1, b_sum, mask=m_m)
    if BS:  # the parts of this head are one cluster, which adds them here
        _barrier("barrier.cluster.arrive.release.aligned;")
        i_first = i_tile * BM + i_split
        i_end = tl.minimum(i_tile * BM + BM, ROWS)
        if i_first < i_end:  # who has no row to add need not wait
            _barrier("barrier.cluster.wait.acquire.aligned;")
            for i_m in range(i_first, i_end, SPLITS):
                p_row_out = p_out + i_b * o_b + (i_kv * G + i_m % G) * o_h + (i_m // G).to(tl.int64) * o_t
                i_part = i_head * SPLITS * ROWS + i_m
                _add_parts(p_parts, p_stats, p_row_out, i_part, SPLITS, ROWS, DV, BS, BDV, UNIT)


@triton.jit
def _barrier(code: tl.constexpr):
    """Of all threads of a cluster."""
    tl.inline_asm_elementwise(code + " // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["HKV", "SPLITS"])
def _combine_kernel(
    p_parts, p_out, HKV, SPLITS, o_b, o_t, o_h,
    T: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, BP: tl.constexpr, BDV: tl.constexpr,
    PDL: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    ROWS: tl.constexpr = T * G
    i_row = tl.program_id(0).to(tl.int64)  # of all key heads of all sequences
    i_head, i_m = i_row // ROWS, i_row % ROWS
    p_stats = p_parts + tl.num_programs(0).to(tl.int64) * SPLITS * DV
    p_to = p_out + (i_head // HKV) * o_b + ((i_head % HKV) * G + i_m % G) * o_h + (i_m // G) * o_t
    _add_parts(p_parts, p_stats, p_to, i_head * SPLITS * ROWS + i_m, SPLITS, ROWS, DV, BP, BDV, UNIT)


class Config(NamedTuple):
    """What a program of the first kernel looks like, how many parts there are, and whether they are one cluster.

    alone: no SM takes two programs. Those of the next call, there before these have ended, would gather on free SMs.
    """

    bm: int
    bn: int
    warps: int
    stages: int
    splits: int
    cluster: bool = False
    alone: bool = False


@functools.lru_cache(maxsize=1024)
def configure(heads: int, rows: int, d: int, d_v: int, keys: int, itemsize: int, sms: int, clusters: bool) -> Config:
    """The heuristic, from sweeps on an H100 (docs/worklog.md).

    ``heads``: batch × key heads; ``rows``: queries × heads of a group; ``keys``: most keys seen.
    """
    wide = _padded(d) + _padded(d_v)
    # Three stages of at most 32 KiB are within 99 KiB, and no tile spills registers on any architecture (tested).
    if itemsize == 4:
        bm, bn, warps, stages = 16, max(16, min(32, 8192 // wide)), 8, 2
    else:
        # More rows by wider heads need eight warps, which loses more than reading keys from the L2 cache once more.
        bm = min(64, triton.next_power_of_2(rows))
        bm = max(16, min(bm, triton.next_power_of_2(_TILE // wide + 1) // 2))
        bn, warps, stages = max(16, min(128 if bm == 16 else 64, 16384 // wide)), 4, 3
    programs = max(1, heads * triton.cdiv(rows, bm))
    parts = splits(programs, keys, sms)
    # Where the cache is short, so that a second kernel costs more than idle SMs, and each program adds one row at most.
    few = min(_CLUSTER, max(2, sms // 2 // programs), triton.cdiv(keys, FEWEST_KEYS))
    cluster = clusters and parts > 1 and min(rows, bm) <= few > 1 and keys <= few * _CLUSTER_KEYS
    parts = few if cluster else parts
    # Two of the next call's on an SM do no harm, where there is one for each.
    crowd = cluster or 3 * stages * bn * wide * itemsize <= _SHARED
    return Config(bm, bn, warps, stages, parts, cluster, clusters and crowd and programs * parts <= sms)


def piece(padded: int, itemsize: int) -> int:
    """How much of a head dim is summed at once: all, but in float32, where sums are made term by term."""
    return padded if itemsize < 4 else max(16, padded // 4)


def _padded(d: int) -> int:
    return max(16, 1 << (d - 1).bit_length())


@functools.cache
def _device(device: torch.device) -> tuple[int, bool, int]:
    """Streaming multiprocessors, whether there are clusters and programmatic dependent launch, and the bytes of shared
    memory that leave no room for a second program on an SM: half, for each takes a little more."""
    if device.type != "cuda":
        return 1, False, 0
    properties = torch.cuda.get_device_properties(device)
    half = properties.shared_memory_per_multiprocessor // 2
    return properties.multi_processor_count, properties.major >= 9, half


class _Plan(NamedTuple):
    """All that a call needs beside its tensors."""

    split: Bound
    combine: Bound | None
    scratch: int  # floats


def _plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    first: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    slopes: torch.Tensor | None,
    out: torch.Tensor,
    config: Config | None,
) -> _Plan:
    (b, h, t, d), (_, h_kv, room, d_v) = q.shape, v.shape
    group = h // h_kv
    # 8 where every row begins at a multiple of eight elements
    align = 8 if all(stride % 8 == 0 for x in (k, v) for stride in x.stride()[:3]) else 1
    sms, hopper, half = _device(q.device)
    seen = min(room, window + t - 1) if window else room
    config = config or configure(b * h_kv, t * group, d, d_v, seen, q.element_size(), sms, hopper)
    bm, bn, warps, stages, parts, cluster, alone = config
    tiles, whole = triton.cdiv(t * group, bm), parts == 1
    size = 0 if whole else b * h * t * parts * (d_v + 2)
    scratch = torch.empty(size, dtype=torch.float32, device=q.device)
    out_strides = (out.stride(0), out.stride(2), out.stride(1))
    pad_d, pad_dv, block, exact = _padded(d), _padded(d_v), triton.next_power_of_2(parts), q.dtype == torch.float32
    unit = 1.4426950408889634 if exact else 1.0  # scores in natural units lose nothing before the largest is taken off
    options = {"launch_pdl": True} if hopper else {}
    split = triton_bind(
        _split_kernel, (parts * tiles * b * h_kv,),
        q, k, v, length, first, slopes, out, scratch,
        h_kv, room, tiles, parts, window, scale / softcap if softcap else scale * (1.4426950408889634 / unit), softcap,
        *q.stride()[:3], *(s // align for x in (k, v) for s in x.stride()[:3]), *out_strides,
        T=t, G=group, D=d, DV=d_v, BM=bm, BN=bn, BD=pad_d, PIECE=piece(pad_d, q.element_size()), BDV=pad_dv,
        ALIGN=align, FIRST=first is not None, WINDOW=window > 0, SOFTCAP=softcap > 0, SLOPES=slopes is not None,
        WHOLE=whole, PDL=hopper, PRECISION="ieee" if exact else None, UNIT=unit, BS=block if cluster else 0,
        cluster=parts if cluster else 1, shared=half if alone else 0, num_warps=warps, num_stages=stages, **options,
    )  # fmt: skip
    if whole or cluster:
        return _Plan(split, None, size)
    combine = triton_bind(
        _combine_kernel, (b * h * t,),
        scratch, out, h_kv, parts, *out_strides,
        T=t, G=group, DV=d_v, BP=min(block, 32, 2048 * _COMBINE_WARPS // pad_dv), BDV=pad_dv, PDL=hopper, UNIT=unit,
        num_warps=_COMBINE_WARPS, **options,
    )  # fmt: skip
    return _Plan(split, combine, size)


_PLANS: dict[tuple[Any, ...], _Plan] = {}


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    first: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    slopes: torch.Tensor | None,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Arguments as of the op; ``out``: ``[B, H, T, D_v]`` with any strides but the last. ``config`` for benchmarks."""
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    tensors = [q, k, v, length]
    if first is not None:
        tensors.append(first)
    if slopes is not None:
        tensors.append(slopes)
    key = (
        q.device, q.shape, q.stride(), k.stride(), v.shape, v.stride(), out.stride(), scale, window, softcap,
        first is None, slopes is None, config, out.data_ptr() & 15,
        *[(x.dtype, x.data_ptr() & 15) for x in tensors],
    )  # fmt: skip
    plan = _PLANS.get(key)
    if plan is None:
        plan = _plan(q, k, v, length, first, scale, window, softcap, slopes, out, config)
        if len(_PLANS) >= _MOST_PLANS:  # a cache that grows token by token has a shape each
            _PLANS.clear()
        if not ahead.active():
            _PLANS[key] = plan
    scratch = torch.empty(plan.scratch, dtype=torch.float32, device=q.device)
    plan.split(*tensors, out, scratch)
    if plan.combine is not None:
        plan.combine(scratch, out)
