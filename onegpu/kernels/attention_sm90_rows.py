"""What stands around the Hopper backward's main kernel, in Triton: bound by bytes.

`before_kernel` makes of each row its log-sum-exp in base 2 and ``delta = rowsum(O * dO)``, in blocks of M queries of
one head as the main kernel loads them, and clears the sum of dQ; `after_kernel` scales that sum and writes dQ.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _block(p_q_rows, i_b, i_h, H, SQ, NB, M: tl.constexpr, RQ: tl.constexpr):
    """(first row, rows, row of the tensors, first block in the scratch memory) of a head of a sequence."""
    i_q = i_b * 0
    n_q = i_q + SQ
    i_row = i_b.to(tl.int64)
    block = (i_row * H + i_h) * NB
    if RQ == 1:
        i_q = tl.load(p_q_rows + 2 * i_b)
        n_q = tl.minimum(tl.load(p_q_rows + 2 * i_b + 1), SQ - i_q)
    if RQ == 2:
        i_q = tl.load(p_q_rows + i_b)
        n_q = tl.load(p_q_rows + i_b + 1) - i_q
        block = i_h.to(tl.int64) * NB + i_q // M + i_b
        i_row = i_row * 0
    return i_q, n_q, i_row, block


@triton.jit(do_not_specialize=["H", "SQ", "NB", "NM"])
def before_kernel(p_o, p_do, p_lse, p_dlse, p_rows, p_sum, p_q_rows, do_b, do_s, do_h, H, SQ, NB, NM,
                  HEAD: tl.constexpr, D: tl.constexpr, M: tl.constexpr, RQ: tl.constexpr):  # fmt: skip
    i_m = tl.program_id(0) % NM
    i_h = tl.program_id(0) // NM % H
    i_b = tl.program_id(0) // NM // H
    i_q, n_q, i_row, block = _block(p_q_rows, i_b, i_h, H, SQ, NB, M, RQ)
    if i_m * M >= n_q:
        return
    o_m = i_m * M + tl.arange(0, M)
    m_m = o_m < n_q
    o_s = (i_q + o_m).to(tl.int64)
    o_d = tl.arange(0, D)
    m_x = m_m[:, None] & (o_d < HEAD)[None, :]
    p_x = p_o + ((i_row * SQ + o_s) * H + i_h)[:, None] * HEAD + o_d[None, :]
    b_o = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)  # [M, D]
    p_x = p_do + i_row * do_b + i_h.to(tl.int64) * do_h + o_s[:, None] * do_s + o_d[None, :]
    b_do = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    b_delta = tl.sum(b_o * b_do, 1)
    o_lse = (i_row * H + i_h) * SQ + o_s
    b_lse = tl.load(p_lse + o_lse, mask=m_m, other=-float("inf"))
    if p_dlse is not None:
        b_delta -= tl.load(p_dlse + o_lse, mask=m_m, other=0.0)
    # +inf where nothing is seen and past the end: P is zero there
    b_lse = tl.where(b_lse == -float("inf"), float("inf"), b_lse * LOG2E)
    p_r = p_rows + (block + i_m) * (2 * M) + tl.arange(0, M)
    tl.store(p_r, b_lse)
    tl.store(p_r + M, b_delta)
    tl.store(p_sum + (block + i_m) * (M * D) + tl.arange(0, M * D), tl.zeros([M * D], tl.float32))


@triton.jit(do_not_specialize=["H", "SQ", "NB", "NM"])
def after_kernel(p_sum, p_dq, p_q_rows, H, SQ, NB, NM, scale, HEAD: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
                 RQ: tl.constexpr):  # fmt: skip
    """A 64 x 64 tile of dQ; NM counts these tiles here."""
    i_t = tl.program_id(0) % NM
    i_h = tl.program_id(0) // NM % H
    i_b = tl.program_id(0) // NM // H
    i_q, n_q, i_row, block = _block(p_q_rows, i_b, i_h, H, SQ, NB, M, RQ)
    o_m = i_t // (D // 64) * 64 + tl.arange(0, 64)
    o_d = i_t % (D // 64) * 64 + tl.arange(0, 64)
    if RQ == 2 and i_t // (D // 64) * 64 >= n_q:
        return
    p_x = p_sum + block * (M * D)
    b_x = tl.load(p_x + o_m[:, None].to(tl.int64) * D + o_d[None, :], mask=(o_m < n_q)[:, None], other=0.0)
    b_x = tl.where((o_m < n_q)[:, None], b_x * scale, 0.0)
    o_s = i_q + o_m
    m_s = o_m < n_q
    if RQ != 2:  # a padded row is a ring, whose padding comes after its last real row
        o_s = tl.where(o_s >= SQ, o_s - SQ, o_s)
        m_s = o_m < SQ
    p_x = p_dq + ((i_row * SQ + o_s) * H + i_h)[:, None] * HEAD + o_d[None, :]
    tl.store(p_x, b_x.to(p_dq.dtype.element_ty), mask=m_s[:, None] & (o_d < HEAD)[None, :])
