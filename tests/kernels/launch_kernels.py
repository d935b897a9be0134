"""Triton kernels of the launcher's tests."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def scale(p_x, p_y, p_bias, n, factor, stride, BIAS: tl.constexpr, BLOCK: tl.constexpr = 128):
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_x = o_x < n
    b_x = tl.load(p_x + o_x * stride, mask=m_x, other=0.0) * factor
    if BIAS:
        b_x += tl.load(p_bias + o_x, mask=m_x, other=0.0)
    tl.store(p_y + o_x, b_x, mask=m_x)


@triton.jit
def through_descriptor(descriptor, p_y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    b_x = descriptor.load([0, 0])  # [ROWS, COLUMNS]
    o_y = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(p_y + o_y, b_x)


@triton.jit
def device_descriptor(p_x, p_y, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    made = tl.make_tensor_descriptor(p_x, [n, COLUMNS], [COLUMNS, 1], [ROWS, COLUMNS])
    b_x = made.load([0, 0])  # [ROWS, COLUMNS]
    o_y = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(p_y + o_y, b_x)
