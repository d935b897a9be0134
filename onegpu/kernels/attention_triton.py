"""The portable attention forward, in Triton: compute capability 8.0 and up, every feature, any head dim up to 256.

One program attends for BM queries of one head; keys come in blocks of BN. Blocks that a window, the diagonal or padding
hides are not visited, blocks that it cuts carry a mask, the others none. A head dim is covered by two powers of two
(96 = 64 + 32), so that little of the work is on zeros. Compiled with Triton 3.6 and 3.7.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from onegpu.kernels.launch import triton_launch

LOG2E = tl.constexpr(1.4426950408889634)


def split(d: int) -> tuple[int, int]:
    """Two powers of two of at least 16 (the second may be 0) that cover ``d`` with little to spare."""
    first = max(16, 1 << (d.bit_length() - 1))
    if d <= first:
        return first, 0
    second = max(16, triton.next_power_of_2(d - first))
    return (first, second) if second < first else (2 * first, 0)


@triton.jit
def lengths(p_q_range, p_k_range, p_cu_q, p_cu_k, i_b, S_q, S_k):
    """(first row, rows) of the queries and of the keys of sequence i_b; of packed ones within the whole tensor."""
    i_q = i_b * 0
    i_k = i_b * 0
    n_q = i_q + S_q
    n_k = i_k + S_k
    if p_cu_q is not None:
        i_q = tl.load(p_cu_q + i_b)
        i_k = tl.load(p_cu_k + i_b)
        n_q = tl.load(p_cu_q + i_b + 1) - i_q
        n_k = tl.load(p_cu_k + i_b + 1) - i_k
    else:
        if p_q_range is not None:
            i_q = tl.load(p_q_range + 2 * i_b)
            n_q = tl.load(p_q_range + 2 * i_b + 1)
        if p_k_range is not None:
            i_k = tl.load(p_k_range + 2 * i_b)
            n_k = tl.load(p_k_range + 2 * i_b + 1)
    return i_q, tl.minimum(n_q, S_q - i_q), i_k, tl.minimum(n_k, S_k - i_k)


@triton.jit
def positions(o, i_first, n, S, PACKED: tl.constexpr):
    """Rows of the tensor for the rows ``o`` of a sequence, and which of them this sequence writes.

    A padded row is a ring: its padding follows the last real row, so that the last programs fill it with zeros.
    """
    o_s = i_first + o
    if PACKED:
        return o_s, o < n
    return tl.where(o_s >= S, o_s - S, o_s), o < S


@triton.jit
def load(p, o_s, stride, o_d, m_s, D, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """``p[o_s, o_d]`` with row stride ``stride``; zeros where m_s is false (if ROWS) and past D (unless EVEN)."""
    p_x = p + o_s[:, None] * stride + o_d[None, :]
    if ROWS:
        if EVEN:
            return tl.load(p_x, mask=m_s[:, None], other=0.0)
        return tl.load(p_x, mask=m_s[:, None] & (o_d < D)[None, :], other=0.0)
    if EVEN:
        return tl.load(p_x)
    return tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def units(s):
    """A batch or head stride, told in units of 8 elements: so the compiler knows that rows begin on 16 bytes."""
    return tl.cast(s, tl.int64) * 8


@triton.jit
def visible(o_i, o_j, n_k, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether the query at key position o_i sees key o_j; the two broadcast."""
    m = o_j < n_k
    if RIGHT:
        m = m & (o_j <= o_i + right)
    if LEFT:
        m = m & (o_j >= o_i - left)
    return m


@triton.jit
def _keys(b_o, b_o2, b_l, b_m, b_q, b_q2, p_k, p_v, k_s, v_s, i_lo, i_hi, n_k, o_i, scale_log2, left, right,
          MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
          D2: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Attend to the keys [i_lo, i_hi); p_k and p_v point at the sequence's first."""
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, D1)
    o_v = tl.arange(0, DV1)
    for i_n in range(i_lo, i_hi, BN):
        m_n = i_n + o_n < n_k
        p_kn = p_k + tl.cast(i_n, tl.int64) * k_s
        p_vn = p_v + tl.cast(i_n, tl.int64) * v_s
        b_k = load(p_kn, o_n, k_s, o_d, m_n, D, MASK, D1 <= D)  # [BN, D1]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BN]
        if D2:
            b_k2 = load(p_kn, o_n, k_s, D1 + tl.arange(0, D2), m_n, D, MASK, D1 + D2 <= D)  # [BN, D2]
            b_s = tl.dot(b_q2, tl.trans(b_k2), b_s, input_precision="ieee")
        if MASK:
            seen = visible(o_i[:, None], (i_n + o_n)[None, :], n_k, left, right, LEFT, RIGHT)
            b_s = tl.where(seen, b_s, -float("inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        # a row that has seen nothing yet: exp2(-inf - 0) = 0 and not exp2(-inf + inf)
        b_top = tl.where(b_new == -float("inf"), 0.0, b_new) if MASK else b_new
        b_p = tl.math.exp2(b_s * scale_log2 - (b_top * scale_log2)[:, None])
        b_alpha = tl.math.exp2((b_m - b_top) * scale_log2)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_m = b_new
        b_v = load(p_vn, o_n, v_s, o_v, m_n, DV, MASK, DV1 <= DV)  # [BN, DV1]
        b_p = b_p.to(b_v.dtype)
        b_o = tl.dot(b_p, b_v, b_o * b_alpha[:, None], input_precision="ieee")
        if DV2:
            b_v2 = load(p_vn, o_n, v_s, DV1 + tl.arange(0, DV2), m_n, DV, MASK, DV1 + DV2 <= DV)  # [BN, DV2]
            b_o2 = tl.dot(b_p, b_v2, b_o2 * b_alpha[:, None], input_precision="ieee")
    return b_o, b_o2, b_l, b_m


@triton.jit
def key_bounds(i_m, n_q, n_k, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr):  # fmt: skip
    """Bounds of the key blocks that queries [i_m, i_m + BM) see: [lo, a) and [b, hi) need a mask, [a, b) none."""
    i_at = i_m + n_k - n_q
    i_lo = i_at * 0
    i_a = i_lo
    i_hi = tl.maximum(n_k, 0)
    i_b = i_hi // BN * BN
    if RIGHT:
        i_hi = tl.minimum(i_hi, tl.maximum(i_at + BM + right, 0))
        i_b = tl.minimum(i_b, tl.maximum(i_at + right + 1, 0) // BN * BN)
    if LEFT:
        i_lo = tl.maximum(i_at - left, 0) // BN * BN
        i_a = tl.minimum((tl.maximum(i_at + BM - 1 - left, 0) + BN - 1) // BN * BN, (i_hi + BN - 1) // BN * BN)
        i_a = tl.maximum(i_a, i_lo)
        i_b = tl.maximum(i_b, i_a)
    if i_m >= n_q:
        i_lo, i_a, i_b, i_hi = 0, 0, 0, 0
    return i_lo, i_a, i_b, i_hi


_COUNTS = ["B", "H", "G", "S_q", "S_k", "n_m", "left", "right"]  # change from call to call


@triton.jit(do_not_specialize=_COUNTS)
def forward_kernel(p_q, p_k, p_v, p_o, p_lse, p_q_range, p_k_range, p_cu_q, p_cu_k, q_b, q_s, q_h, k_b, k_s, k_h,
                   v_b, v_s, v_h, B, H, G, S_q, S_k, n_m, scale_log2, left, right, LEFT: tl.constexpr,
                   RIGHT: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr,
                   DV1: tl.constexpr, DV2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    PACKED: tl.constexpr = p_cu_q is not None
    q_b, q_s, q_h = units(q_b), q_s * 8, units(q_h)
    k_b, k_s, k_h = units(k_b), k_s * 8, units(k_h)
    v_b, v_s, v_h = units(v_b), v_s * 8, units(v_h)
    i_m = tl.program_id(0) % n_m
    if RIGHT:
        i_m = n_m - 1 - i_m  # the longest first
    i_m = i_m * BM
    i_h = tl.program_id(0) // n_m % H
    i_b = tl.program_id(0) // n_m // H
    i_row = i_b.to(tl.int64)  # of the tensors
    o_m = i_m + tl.arange(0, BM)
    if PACKED:
        i_row = i_row * 0
        if i_b == B:  # no sequence: what is before the first and after the last
            i_end = tl.load(p_cu_q + B)
            i_first = tl.load(p_cu_q)
            for i in range(i_m, i_first + S_q - i_end, n_m * BM):
                o_s = i + tl.arange(0, BM)
                m_s = o_s < i_first + S_q - i_end
                o_s = tl.where(o_s < i_first, o_s, o_s - i_first + i_end)
                p_z = p_o + i_h.to(tl.int64) * DV + o_s[:, None].to(tl.int64) * (H * DV)
                for i_d in tl.static_range(0, DV, DV1):
                    o_d = i_d + tl.arange(0, DV1)
                    m_z = m_s[:, None] & (o_d < DV)[None, :]
                    tl.store(p_z + o_d[None, :], tl.zeros([BM, DV1], p_o.dtype.element_ty), mask=m_z)
                tl.store(p_lse + i_h.to(tl.int64) * S_q + o_s, tl.full([BM], -float("inf"), tl.float32), mask=m_s)
            return
    i_q, n_q, i_k, n_k = lengths(p_q_range, p_k_range, p_cu_q, p_cu_k, i_b, S_q, S_k)
    if PACKED and i_m >= n_q:
        return
    o_s, m_store = positions(o_m, i_q, n_q, S_q, PACKED)
    o_s = o_s.to(tl.int64)
    m_m = o_m < n_q
    p_q += i_row * q_b + i_h.to(tl.int64) * q_h
    p_k += i_row * k_b + (i_h // G).to(tl.int64) * k_h + i_k.to(tl.int64) * k_s
    p_v += i_row * v_b + (i_h // G).to(tl.int64) * v_h + i_k.to(tl.int64) * v_s
    b_q = load(p_q, o_s, q_s, tl.arange(0, D1), m_m, D, True, D1 <= D)  # [BM, D1]
    b_q2 = b_q
    if D2:
        b_q2 = load(p_q, o_s, q_s, D1 + tl.arange(0, D2), m_m, D, True, D1 + D2 <= D)  # [BM, D2]
    b_o = tl.zeros([BM, DV1], tl.float32)
    b_o2 = tl.zeros([BM, DV2 if DV2 else 1], tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_m = tl.full([BM], -float("inf"), tl.float32)
    o_i = o_m + (n_k - n_q)
    i_lo, i_a, i_z, i_hi = key_bounds(i_m, n_q, n_k, left, right, LEFT, RIGHT, BM, BN)
    if LEFT:
        b_o, b_o2, b_l, b_m = _keys(b_o, b_o2, b_l, b_m, b_q, b_q2, p_k, p_v, k_s, v_s, i_lo, i_a, n_k, o_i, scale_log2,
                                    left, right, True, LEFT, RIGHT, D, D1, D2, DV, DV1, DV2, BN)  # fmt: skip
    b_o, b_o2, b_l, b_m = _keys(b_o, b_o2, b_l, b_m, b_q, b_q2, p_k, p_v, k_s, v_s, i_a, i_z, n_k, o_i, scale_log2,
                                left, right, False, LEFT, RIGHT, D, D1, D2, DV, DV1, DV2, BN)  # fmt: skip
    b_o, b_o2, b_l, b_m = _keys(b_o, b_o2, b_l, b_m, b_q, b_q2, p_k, p_v, k_s, v_s, i_z, i_hi, n_k, o_i, scale_log2,
                                left, right, True, LEFT, RIGHT, D, D1, D2, DV, DV1, DV2, BN)  # fmt: skip
    seen = m_m & (b_l != 0)
    b_inv = tl.where(seen, 1.0 / b_l, 0.0)
    b_lse = tl.where(seen, (b_m * scale_log2 + tl.math.log2(b_l)) / LOG2E, -float("inf"))
    tl.store(p_lse + (i_row * H + i_h) * S_q + o_s, b_lse, mask=m_store)
    p_o += i_row * S_q * H * DV + i_h.to(tl.int64) * DV
    o_d = tl.arange(0, DV1)
    b_o = tl.where(seen[:, None], b_o * b_inv[:, None], 0.0).to(p_o.dtype.element_ty)
    tl.store(p_o + o_s[:, None] * (H * DV) + o_d[None, :], b_o, mask=m_store[:, None] & (o_d < DV)[None, :])
    if DV2:
        o_d = DV1 + tl.arange(0, DV2)
        b_o2 = tl.where(seen[:, None], b_o2 * b_inv[:, None], 0.0).to(p_o.dtype.element_ty)
        tl.store(p_o + o_s[:, None] * (H * DV) + o_d[None, :], b_o2, mask=m_store[:, None] & (o_d < DV)[None, :])


# Padded head dim up to: (BM, BN, warps, stages) within 99 KB of shared memory.
_CONFIGS = {32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 96: (128, 64, 8, 2), 128: (128, 64, 8, 2), 192: (128, 32, 8, 2),
            256: (64, 32, 8, 2)}  # fmt: skip
_CONFIGS_FP32 = {64: (64, 32, 4, 2), 128: (32, 32, 4, 2), 256: (32, 16, 4, 1)}


def config_of(configs: dict[int, tuple[int, int, int, int]], *widths: int) -> tuple[int, int, int, int]:
    """The first configuration that serves the widest of the padded head dims."""
    return configs[min(width for width in configs if width >= max(widths))]


def constants(d: int, d_v: int, left: int, right: int) -> dict[str, int | bool]:
    """The arguments that every kernel is compiled for."""
    (d1, d2), (dv1, dv2) = split(d), split(d_v)
    window = {"LEFT": left >= 0, "RIGHT": right >= 0}
    return {**window, "D": d, "D1": d1, "D2": d2, "DV": d_v, "DV1": dv1, "DV2": dv2}


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, scale: float, left: int,
    right: int, q_range: torch.Tensor | None, k_range: torch.Tensor | None, cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None, max_seqlen_q: int,
    config: tuple[int, int, int, int] | None = None,
) -> None:  # fmt: skip
    """As the op, for inputs as `attention._readable` makes them. config: (BM, BN, warps, stages)."""
    (s_q, heads, d), (s_k, heads_kv, d_v) = q.shape[-3:], v.shape[-3:]
    made = constants(d, d_v, left, right)
    configs = _CONFIGS_FP32 if q.dtype == torch.float32 else _CONFIGS
    bm, bn, warps, stages = config or config_of(configs, made["D1"] + made["D2"], made["DV1"] + made["DV2"])
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    n_m = triton.cdiv(s_q if cu_seqlens_q is None else max_seqlen_q, bm)
    programs = n_m * heads * (batch + (cu_seqlens_q is not None))
    triton_launch(
        forward_kernel, (programs,), q, k, v, out, lse, q_range, k_range, cu_seqlens_q, cu_seqlens_k, *strides(q),
        *strides(k), *strides(v), batch, heads, heads // heads_kv, s_q, s_k, n_m, scale * LOG2E.value, left, right,
        **made, BM=bm, BN=bn, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def strides(x: torch.Tensor) -> tuple[int, ...]:
    """(batch, row, head) strides in units of 8 elements; the batch stride of a packed tensor is 0.

    Those of dimensions of one element, which are multiplied by 0, may be anything.
    """
    batch, row, head = (0, *x.stride()[:2]) if x.ndim == 3 else x.stride()[:3]
    return batch // 8, row // 8, head // 8
