"""Triton kernel of ``quant_blockwise``, imported at the first call on a GPU. One pass, bound by bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from onegpu.kernels.launch import triton_launch


@triton.jit
def reciprocal(b_x):
    """1/x as the GPU's approximate instruction gives it.

    bitsandbytes is compiled with fast math: an exact quotient moves one code in ten million to a neighbour, and codes
    are compared bit by bit.
    """
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [b_x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _quantize_kernel(p_in, p_code, p_out, p_absmax, n, BLOCK: tl.constexpr):
    i_block = tl.program_id(0).to(tl.int64)
    o_in = i_block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_in = o_in < n
    b_in = tl.load(p_in + o_in, mask=m_in, other=0.0).to(tl.float32)
    b_absmax = tl.max(tl.abs(b_in), axis=0)
    b_absmax = tl.where(tl.max((b_in != b_in).to(tl.int32), axis=0) > 0, float("nan"), b_absmax)
    tl.store(p_absmax + i_block, b_absmax)
    b_x = b_in * reciprocal(tl.full([BLOCK], 0.0, tl.float32) + b_absmax)
    # Bisection of the ascending map, then the nearer of the last two entries. A tie, and NaN (an all-zero block),
    # falls as the format's reference kernel lets it fall.
    b_pivot = tl.full([BLOCK], 127, tl.int32)
    b_lower = tl.full([BLOCK], 0, tl.int32)
    b_upper = tl.full([BLOCK], 255, tl.int32)
    for step in tl.static_range(7):
        b_above = b_x > tl.load(p_code + b_pivot)
        b_lower = tl.where(b_above, b_pivot, b_lower)
        b_upper = tl.where(b_above, b_upper, b_pivot)
        b_pivot += tl.where(b_above, 64 >> step, -(64 >> step))
    b_value = tl.load(p_code + b_pivot)
    b_up = (tl.load(p_code + b_upper) + b_value) * 0.5
    b_down = (tl.load(p_code + b_lower) + b_value) * 0.5
    b_right = tl.where(b_x > b_up, b_upper, b_pivot)
    b_left = tl.where(b_x < b_down, b_lower, b_pivot)
    tl.store(p_out + o_in, tl.where(b_x > b_value, b_right, b_left).to(tl.uint8), mask=m_in)


def quantize(flat: torch.Tensor, code: torch.Tensor, blocksize: int, out: torch.Tensor, absmax: torch.Tensor) -> None:
    """flat: contiguous floats ``[n]``; code: ascending float32 ``[256]``; out: uint8 ``[n]``; absmax: one a block.

    blocksize: a power of two.
    """
    triton_launch(_quantize_kernel, (absmax.numel(),), flat, code, out, absmax, flat.numel(), BLOCK=blocksize)
