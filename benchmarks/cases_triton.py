"""Triton kernels of benchmark cases."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale(p_x, p_bias, p_y, p_a, p_b, n, stride, offset, factor, BLOCK: tl.constexpr):
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_x = (o_x < n) & (offset >= 0)
    tl.store(p_y + o_x, tl.load(p_x + o_x * stride, mask=m_x) * factor + tl.load(p_bias + o_x, mask=m_x), mask=m_x)
