"""The portable attention backward, in Triton: three kernels without atomics, so the same bits on every run.

`rows_kernel` makes of each row its log-sum-exp in base 2 and ``delta = rowsum(O * dO)``; `keys_kernel` walks the
queries that see a block of keys and sums dK and dV, over the query heads of a group too; `queries_kernel` walks the
keys that a block of queries sees and sums dQ. All sums are float32. The scores are made twice: 7 products for 5, and
nothing is added up in memory. Compiled with Triton 3.6 and 3.7.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from onegpu.kernels.attention_triton import (
    _COUNTS,
    LOG2E,
    config_of,
    constants,
    key_bounds,
    lengths,
    load,
    positions,
    strides,
    units,
    visible,
)
from onegpu.kernels.launch import triton_launch


@triton.jit
def store(p, o_s, stride, m_s, b_x, b_x2, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Write (b_x, b_x2) to the columns [0, D1) and [D1, D1 + D2) of the rows o_s."""
    o_d = tl.arange(0, D1)
    p_x = p + o_s[:, None] * stride
    tl.store(p_x + o_d[None, :], b_x.to(p.dtype.element_ty), mask=m_s[:, None] & (o_d < D)[None, :])
    if D2:
        o_d2 = D1 + tl.arange(0, D2)
        tl.store(p_x + o_d2[None, :], b_x2.to(p.dtype.element_ty), mask=m_s[:, None] & (o_d2 < D)[None, :])


@triton.jit(do_not_specialize=["H", "S", "n"])
def rows_kernel(p_o, p_do, p_lse, p_dlse, p_rows, do_b, do_s, do_h, H, S, n, DV: tl.constexpr, D1: tl.constexpr,
                BM: tl.constexpr):  # fmt: skip
    """p_rows[0]: lse / ln 2, +inf where nothing is seen, which makes P zero; p_rows[1]: delta. n: the size of lse."""
    do_b, do_s, do_h = units(do_b), do_s * 8, units(do_h)
    i_bh = tl.program_id(0) // tl.cdiv(S, BM)
    o_m = tl.program_id(0) % tl.cdiv(S, BM) * BM + tl.arange(0, BM)
    m_m = o_m < S
    o_d = tl.arange(0, D1)
    o_row = i_bh.to(tl.int64) * S + o_m
    b_lse = tl.load(p_lse + o_row, mask=m_m, other=0.0)
    real = b_lse != -float("inf")  # what is padding is not read: it may be NaN
    m_x = (m_m & real)[:, None] & (o_d < DV)[None, :]
    o_b, o_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_o = ((o_b * S + o_m)[:, None] * H + o_h) * DV + o_d[None, :]
    b_o = tl.load(p_o + o_o, mask=m_x, other=0.0).to(tl.float32)
    o_do = o_b * do_b + o_m[:, None].to(tl.int64) * do_s + o_h * do_h + o_d[None, :]
    b_do = tl.load(p_do + o_do, mask=m_x, other=0.0).to(tl.float32)
    b_delta = tl.sum(b_o * b_do, 1)
    if p_dlse is not None:
        b_delta -= tl.load(p_dlse + o_row, mask=m_m & real, other=0.0)
    tl.store(p_rows + o_row, tl.where(real, b_lse * LOG2E, float("inf")), mask=m_m)
    tl.store(p_rows + n + o_row, b_delta, mask=m_m)


@triton.jit
def _queries(b_dk, b_dk2, b_dv, b_dv2, b_k, b_k2, b_v, b_v2, p_q, p_do, p_rows, n, q_s, do_s, i_lo, i_hi, n_q, n_k, o_j,
             i_off, scale_log2, left, right, MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
             D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr,
             DV2: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """Add what the queries [i_lo, i_hi) of one head give to the keys o_j; everything transposed, [BN, BM]."""
    o_m = tl.arange(0, BM)
    for i_m in range(i_lo, i_hi, BM):
        m_m = i_m + o_m < n_q
        p_qm = p_q + tl.cast(i_m, tl.int64) * q_s
        p_dom = p_do + tl.cast(i_m, tl.int64) * do_s
        b_q = load(p_qm, o_m, q_s, tl.arange(0, D1), m_m, D, MASK, D1 <= D)  # [BM, D1]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BN, BM]
        if D2:
            b_q2 = load(p_qm, o_m, q_s, D1 + tl.arange(0, D2), m_m, D, MASK, D1 + D2 <= D)
            b_s = tl.dot(b_k2, tl.trans(b_q2), b_s, input_precision="ieee")
        b_lse = tl.load(p_rows + i_m + o_m, mask=m_m, other=float("inf"))
        b_p = tl.math.exp2(b_s * scale_log2 - b_lse[None, :])
        if MASK:
            seen = visible((i_m + o_m + i_off)[None, :], o_j[:, None], n_k, left, right, LEFT, RIGHT)
            b_p = tl.where(seen, b_p, 0.0)
        b_do = load(p_dom, o_m, do_s, tl.arange(0, DV1), m_m, DV, MASK, DV1 <= DV)  # [BM, DV1]
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")  # [BN, BM]
        b_p16 = b_p.to(b_do.dtype)
        b_dv = tl.dot(b_p16, b_do, b_dv, input_precision="ieee")
        if DV2:
            b_do2 = load(p_dom, o_m, do_s, DV1 + tl.arange(0, DV2), m_m, DV, MASK, DV1 + DV2 <= DV)
            b_dp = tl.dot(b_v2, tl.trans(b_do2), b_dp, input_precision="ieee")
            b_dv2 = tl.dot(b_p16, b_do2, b_dv2, input_precision="ieee")
        b_delta = tl.load(p_rows + n + i_m + o_m, mask=m_m, other=0.0)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee")
        if D2:
            b_dk2 = tl.dot(b_ds, b_q2, b_dk2, input_precision="ieee")
    return b_dk, b_dk2, b_dv, b_dv2


@triton.jit
def _query_bounds(i_n, n_q, n_k, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr):  # fmt: skip
    """Bounds of the query blocks that see keys [i_n, i_n + BN): [lo, a) and [b, hi) need a mask, [a, b) none."""
    i_at = i_n - (n_k - n_q)  # the query at the position of the first key
    i_lo = i_at * 0
    i_a = i_lo
    i_hi = tl.maximum(n_q, 0)
    i_b = i_hi // BM * BM
    if LEFT:
        i_hi = tl.minimum(i_hi, tl.maximum(i_at + BN + left, 0))
        i_b = tl.minimum(i_b, tl.maximum(i_at + left + 1, 0) // BM * BM)
    if RIGHT:
        i_lo = tl.maximum(i_at - right, 0) // BM * BM
        i_a = tl.minimum((tl.maximum(i_at + BN - 1 - right, 0) + BM - 1) // BM * BM, (i_hi + BM - 1) // BM * BM)
        i_a = tl.maximum(i_a, i_lo)
    if i_n + BN > n_k:  # keys past the end: their P is exp(-lse), which may be infinite
        i_a = tl.maximum(i_hi, i_lo)
        i_b = i_a
    i_b = tl.maximum(i_b, i_a)
    if i_n >= n_k:
        i_lo, i_a, i_b, i_hi = 0, 0, 0, 0
    return i_lo, i_a, i_b, i_hi


@triton.jit(do_not_specialize=[*_COUNTS, "n"])
def keys_kernel(p_q, p_k, p_v, p_do, p_rows, p_dk, p_dv, p_q_range, p_k_range, p_cu_q, p_cu_k, q_b, q_s, q_h, k_b, k_s,
                k_h, v_b, v_s, v_h, do_b, do_s, do_h, B, H, G, S_q, S_k, n_m, n, scale, scale_log2, left, right,
                LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
                DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr):  # fmt: skip
    PACKED: tl.constexpr = p_cu_q is not None
    q_b, q_s, q_h = units(q_b), q_s * 8, units(q_h)
    k_b, k_s, k_h = units(k_b), k_s * 8, units(k_h)
    v_b, v_s, v_h = units(v_b), v_s * 8, units(v_h)
    do_b, do_s, do_h = units(do_b), do_s * 8, units(do_h)
    HK = H // G
    i_n = tl.program_id(0) % n_m * BN
    i_hk = tl.program_id(0) // n_m % HK
    i_b = tl.program_id(0) // n_m // HK
    i_row = i_b.to(tl.int64) * (0 if PACKED else 1)
    i_q, n_q, i_k, n_k = lengths(p_q_range, p_k_range, p_cu_q, p_cu_k, i_b, S_q, S_k)
    if PACKED and i_n >= n_k:
        return
    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < n_k
    o_s, m_store = positions(o_n, i_k, n_k, S_k, PACKED)
    o_s = o_s.to(tl.int64)
    i_q = i_q.to(tl.int64)
    p_k += i_row * k_b + i_hk.to(tl.int64) * k_h
    p_v += i_row * v_b + i_hk.to(tl.int64) * v_h
    b_k = load(p_k, o_s, k_s, tl.arange(0, D1), m_n, D, True, D1 <= D)  # [BN, D1]
    b_v = load(p_v, o_s, v_s, tl.arange(0, DV1), m_n, DV, True, DV1 <= DV)  # [BN, DV1]
    b_k2 = b_k
    b_v2 = b_v
    if D2:
        b_k2 = load(p_k, o_s, k_s, D1 + tl.arange(0, D2), m_n, D, True, D1 + D2 <= D)
    if DV2:
        b_v2 = load(p_v, o_s, v_s, DV1 + tl.arange(0, DV2), m_n, DV, True, DV1 + DV2 <= DV)
    b_dk = tl.zeros([BN, D1], tl.float32)
    b_dk2 = tl.zeros([BN, D2 if D2 else 1], tl.float32)
    b_dv = tl.zeros([BN, DV1], tl.float32)
    b_dv2 = tl.zeros([BN, DV2 if DV2 else 1], tl.float32)
    i_lo, i_a, i_z, i_hi = _query_bounds(i_n, n_q, n_k, left, right, LEFT, RIGHT, BM, BN)
    for i_g in range(0, G):
        i_h = i_hk.to(tl.int64) * G + i_g
        p_qh = p_q + i_row * q_b + i_h * q_h + i_q * q_s
        p_doh = p_do + i_row * do_b + i_h * do_h + i_q * do_s
        p_rowsh = p_rows + (i_row * H + i_h) * S_q + i_q
        b_dk, b_dk2, b_dv, b_dv2 = _queries(
            b_dk, b_dk2, b_dv, b_dv2, b_k, b_k2, b_v, b_v2, p_qh, p_doh, p_rowsh, n, q_s, do_s, i_lo, i_a, n_q, n_k,
            o_n, n_k - n_q, scale_log2, left, right, True, LEFT, RIGHT, D, D1, D2, DV, DV1, DV2, BM)  # fmt: skip
        b_dk, b_dk2, b_dv, b_dv2 = _queries(
            b_dk, b_dk2, b_dv, b_dv2, b_k, b_k2, b_v, b_v2, p_qh, p_doh, p_rowsh, n, q_s, do_s, i_a, i_z, n_q, n_k, o_n,
            n_k - n_q, scale_log2, left, right, False, LEFT, RIGHT, D, D1, D2, DV, DV1, DV2, BM)  # fmt: skip
        b_dk, b_dk2, b_dv, b_dv2 = _queries(
            b_dk, b_dk2, b_dv, b_dv2, b_k, b_k2, b_v, b_v2, p_qh, p_doh, p_rowsh, n, q_s, do_s, i_z, i_hi, n_q, n_k,
            o_n, n_k - n_q, scale_log2, left, right, True, LEFT, RIGHT, D, D1, D2, DV, DV1, DV2, BM)  # fmt: skip
    p_dk += (i_row * S_k * HK + i_hk) * D
    p_dv += (i_row * S_k * HK + i_hk) * DV
    store(p_dk, o_s, HK * D, m_store, b_dk * scale, b_dk2 * scale, D, D1, D2)
    store(p_dv, o_s, HK * DV, m_store, b_dv, b_dv2, DV, DV1, DV2)


@triton.jit
def _keys(b_dq, b_dq2, b_q, b_q2, b_do, b_do2, b_lse, b_delta, p_k, p_v, k_s, v_s, i_lo, i_hi, n_k, o_i, scale_log2,
          left, right, MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
          D2: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Add to dQ what the keys [i_lo, i_hi) give."""
    o_n = tl.arange(0, BN)
    for i_n in range(i_lo, i_hi, BN):
        m_n = i_n + o_n < n_k
        p_kn = p_k + tl.cast(i_n, tl.int64) * k_s
        p_vn = p_v + tl.cast(i_n, tl.int64) * v_s
        b_k = load(p_kn, o_n, k_s, tl.arange(0, D1), m_n, D, MASK, D1 <= D)  # [BN, D1]
        b_v = load(p_vn, o_n, v_s, tl.arange(0, DV1), m_n, DV, MASK, DV1 <= DV)  # [BN, DV1]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BN]
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        if D2:
            b_k2 = load(p_kn, o_n, k_s, D1 + tl.arange(0, D2), m_n, D, MASK, D1 + D2 <= D)
            b_s = tl.dot(b_q2, tl.trans(b_k2), b_s, input_precision="ieee")
        if DV2:
            b_v2 = load(p_vn, o_n, v_s, DV1 + tl.arange(0, DV2), m_n, DV, MASK, DV1 + DV2 <= DV)
            b_dp = tl.dot(b_do2, tl.trans(b_v2), b_dp, input_precision="ieee")
        b_p = tl.math.exp2(b_s * scale_log2 - b_lse[:, None])
        if MASK:
            seen = visible(o_i[:, None], (i_n + o_n)[None, :], n_k, left, right, LEFT, RIGHT)
            b_p = tl.where(seen, b_p, 0.0)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision="ieee")
        if D2:
            b_dq2 = tl.dot(b_ds, b_k2, b_dq2, input_precision="ieee")
    return b_dq, b_dq2


@triton.jit(do_not_specialize=[*_COUNTS, "n"])
def queries_kernel(p_q, p_k, p_v, p_do, p_rows, p_dq, p_q_range, p_k_range, p_cu_q, p_cu_k, q_b, q_s, q_h, k_b, k_s,
                   k_h, v_b, v_s, v_h, do_b, do_s, do_h, B, H, G, S_q, S_k, n_m, n, scale, scale_log2, left, right,
                   LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
                   DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr):  # fmt: skip
    PACKED: tl.constexpr = p_cu_q is not None
    q_b, q_s, q_h = units(q_b), q_s * 8, units(q_h)
    k_b, k_s, k_h = units(k_b), k_s * 8, units(k_h)
    v_b, v_s, v_h = units(v_b), v_s * 8, units(v_h)
    do_b, do_s, do_h = units(do_b), do_s * 8, units(do_h)
    i_m = tl.program_id(0) % n_m
    if RIGHT:
        i_m = n_m - 1 - i_m  # the longest first
    i_m = i_m * BM
    i_h = tl.program_id(0) // n_m % H
    i_b = tl.program_id(0) // n_m // H
    i_row = i_b.to(tl.int64) * (0 if PACKED else 1)
    i_q, n_q, i_k, n_k = lengths(p_q_range, p_k_range, p_cu_q, p_cu_k, i_b, S_q, S_k)
    if PACKED and i_m >= n_q:
        return
    o_m = i_m + tl.arange(0, BM)
    m_m = o_m < n_q
    o_s, m_store = positions(o_m, i_q, n_q, S_q, PACKED)
    o_s = o_s.to(tl.int64)
    p_q += i_row * q_b + i_h.to(tl.int64) * q_h
    p_do += i_row * do_b + i_h.to(tl.int64) * do_h
    p_k += i_row * k_b + (i_h // G).to(tl.int64) * k_h + i_k.to(tl.int64) * k_s
    p_v += i_row * v_b + (i_h // G).to(tl.int64) * v_h + i_k.to(tl.int64) * v_s
    p_rows += (i_row * H + i_h) * S_q
    b_q = load(p_q, o_s, q_s, tl.arange(0, D1), m_m, D, True, D1 <= D)  # [BM, D1]
    b_do = load(p_do, o_s, do_s, tl.arange(0, DV1), m_m, DV, True, DV1 <= DV)  # [BM, DV1]
    b_q2 = b_q
    b_do2 = b_do
    if D2:
        b_q2 = load(p_q, o_s, q_s, D1 + tl.arange(0, D2), m_m, D, True, D1 + D2 <= D)
    if DV2:
        b_do2 = load(p_do, o_s, do_s, DV1 + tl.arange(0, DV2), m_m, DV, True, DV1 + DV2 <= DV)
    b_lse = tl.load(p_rows + o_s, mask=m_m, other=float("inf"))
    b_delta = tl.load(p_rows + n + o_s, mask=m_m, other=0.0)
    b_dq = tl.zeros([BM, D1], tl.float32)
    b_dq2 = tl.zeros([BM, D2 if D2 else 1], tl.float32)
    o_i = o_m + (n_k - n_q)
    i_lo, i_a, i_z, i_hi = key_bounds(i_m, n_q, n_k, left, right, LEFT, RIGHT, BM, BN)
    if LEFT:
        b_dq, b_dq2 = _keys(b_dq, b_dq2, b_q, b_q2, b_do, b_do2, b_lse, b_delta, p_k, p_v, k_s, v_s, i_lo, i_a, n_k,
                            o_i, scale_log2, left, right, True, LEFT, RIGHT, D, D1, D2, DV, DV1, DV2, BN)  # fmt: skip
    b_dq, b_dq2 = _keys(b_dq, b_dq2, b_q, b_q2, b_do, b_do2, b_lse, b_delta, p_k, p_v, k_s, v_s, i_a, i_z, n_k, o_i,
                        scale_log2, left, right, False, LEFT, RIGHT, D, D1, D2, DV, DV1, DV2, BN)  # fmt: skip
    b_dq, b_dq2 = _keys(b_dq, b_dq2, b_q, b_q2, b_do, b_do2, b_lse, b_delta, p_k, p_v, k_s, v_s, i_z, i_hi, n_k, o_i,
                        scale_log2, left, right, True, LEFT, RIGHT, D, D1, D2, DV, DV1, DV2, BN)  # fmt: skip
    p_dq += (i_row * S_q * H + i_h) * D
    store(p_dq, o_s, H * D, m_store, b_dq * scale, b_dq2 * scale, D, D1, D2)


_Table = dict[int, tuple[int, int, int, int]]
# Padded head dim up to: (BM, BN, warps, stages) within 99 KB, of keys_kernel and of queries_kernel.
_KEYS = {32: (64, 128, 4, 2), 64: (32, 128, 8, 3), 128: (32, 128, 8, 1), 192: (32, 32, 4, 1), 256: (32, 32, 8, 1)}
_QUERIES = {32: (128, 64, 4, 2), 64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 192: (64, 32, 8, 2), 256: (64, 16, 8, 2)}
# Where a block may have 227 KB, as measured on an H100. On an A100, some of these spill much.
_ROOM = 227 * 1024
_ROOMY_KEYS = _KEYS | {192: (64, 64, 8, 1), 256: (64, 64, 8, 1)}
_ROOMY_QUERIES = _QUERIES | {192: (128, 64, 8, 1), 256: (128, 32, 8, 1)}
_FP32 = {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)}


@lru_cache
def _shared_memory(device: int) -> int:
    """Bytes that a block may have."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def tables(x: torch.Tensor) -> tuple[_Table, _Table]:
    """The configurations of keys_kernel and of queries_kernel for inputs like x, where it is."""
    if x.dtype == torch.float32:
        return _FP32, _FP32
    roomy = x.is_cuda and _shared_memory(x.get_device()) >= _ROOM
    return (_ROOMY_KEYS, _ROOMY_QUERIES) if roomy else (_KEYS, _QUERIES)


def whole(made: dict[str, int | bool], first: str, second: str) -> dict[str, int | bool]:
    """For keys_kernel: 96 = 64 + 32 columns as 128.

    Of 64 + 32, what Triton 3.6 made gave wrong dK and dV on an H100 (the interpreter's are right), as it did not of
    64 + 16 and of 128.
    """
    return {first: 128, second: 0} if (made[first], made[second]) == (64, 32) else {}


def backward(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scale: float,
    left: int, right: int, q_range: torch.Tensor | None, k_range: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
    configs: tuple[tuple[int, int, int, int], tuple[int, int, int, int]] | None = None,
) -> None:  # fmt: skip
    """As the op; out and the gradients (dq, dk, dv) contiguous. Of packed ones, rows of no sequence are not written.

    configs: (BM, BN, warps, stages) of keys_kernel and of queries_kernel.
    """
    (s_q, heads, d), (s_k, heads_kv, d_v) = q.shape[-3:], v.shape[-3:]
    dq, dk, dv = gradients
    made = constants(d, d_v, left, right)
    widths = made["D1"] + made["D2"], made["DV1"] + made["DV2"]
    if configs is None:
        keys, queries = tables(q)
        configs = config_of(keys, *widths), config_of(queries, *widths)
    packed = cu_seqlens_q is not None
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    rows = torch.empty((2, *lse.shape), dtype=torch.float32, device=q.device)
    parts = made | whole(made, "D1", "D2") | whole(made, "DV1", "DV2")
    tensors = q_range, k_range, cu_seqlens_q, cu_seqlens_k, *(s for x in (q, k, v, grad) for s in strides(x))
    counts = batch, heads, heads // heads_kv, s_q, s_k
    numbers = lse.numel(), scale, scale * LOG2E.value, left, right
    triton_launch(
        rows_kernel, (triton.cdiv(s_q, 64) * (lse.numel() // s_q),), out, grad, lse, grad_lse, rows, *strides(grad),
        heads, s_q, lse.numel(), DV=d_v, D1=triton.next_power_of_2(d_v), BM=64, num_warps=4,
    )  # fmt: skip
    n_k = triton.cdiv(max_seqlen_k if packed else s_k, configs[0][1])
    n_q = triton.cdiv(max_seqlen_q if packed else s_q, configs[1][0])
    for kernel, outputs, (bm, bn, warps, stages), n_m, n_h, fixed in (
        (keys_kernel, (dk, dv), configs[0], n_k, heads_kv, parts),
        (queries_kernel, (dq,), configs[1], n_q, heads, made),
    ):
        triton_launch(
            kernel, (n_m * n_h * batch,), q, k, v, grad, rows, *outputs, *tensors, *counts, n_m, *numbers, **fixed,
            BM=bm, BN=bn, num_warps=warps, num_stages=stages,
        )  # fmt: skip
