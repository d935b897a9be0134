"""Triton kernels of ``quant_int8``, imported at the first call on a GPU. Both are one pass, bound by bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from onegpu.kernels.launch import triton_launch

_BLOCK = 2048


@triton.jit
def _quantize_kernel(p_in, p_codes, p_absmax, p_mask, K, threshold, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_column = tl.arange(0, BLOCK)  # [BLOCK]
    b_max = tl.zeros([BLOCK], tl.float32)
    b_bad = tl.zeros([BLOCK], tl.int32)
    for i_column in range(0, K, BLOCK):
        m_column = i_column + o_column < K
        b_in = tl.load(p_in + i_row * K + i_column + o_column, mask=m_column, other=0.0).to(tl.float32)
        b_size = tl.abs(b_in)
        if SPLIT:
            b_outlier = b_size >= threshold
            tl.store(p_mask + i_column + o_column, b_outlier, mask=m_column & b_outlier)  # every row stores the same
            b_size = tl.where(b_outlier, 0.0, b_size)
        b_max = tl.maximum(b_max, b_size)
        b_bad = tl.maximum(b_bad, (b_in != b_in).to(tl.int32))  # max drops NaN: keep it visible in the scale
    b_absmax = tl.where(tl.max(b_bad, axis=0) > 0, float("nan"), tl.max(b_max, axis=0))
    tl.store(p_absmax + i_row, b_absmax)
    # The approximate quotient, as bitsandbytes takes it: an exact one moves a code in some millions to a neighbour.
    b_scale = tl.inline_asm_elementwise(
        "div.approx.ftz.f32 $0, 0f42FE0000, $1;", "=f,f", [tl.zeros([BLOCK], tl.float32) + b_absmax], dtype=tl.float32,
        is_pure=True, pack=1,
    )  # fmt: skip
    for i_column in range(0, K, BLOCK):
        m_column = i_column + o_column < K
        b_in = tl.load(p_in + i_row * K + i_column + o_column, mask=m_column, other=0.0).to(tl.float32)
        if SPLIT:
            b_in = tl.where(tl.abs(b_in) >= threshold, 0.0, b_in)
        # To the nearest, ties to even; NaN (a row of zeros, one with NaN or infinity) becomes 0.
        b_code = tl.inline_asm_elementwise(
            "cvt.rni.s32.f32 $0, $1;", "=r,f", [b_in * b_scale], dtype=tl.int32, is_pure=True, pack=1
        )
        tl.store(p_codes + i_row * K + i_column + o_column, b_code.to(tl.int8), mask=m_column)


@triton.jit
def _dequantize_kernel(p_codes, p_absmax, p_out, K, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_column = o_column < K
    b_codes = tl.load(p_codes + i_row * K + o_column, mask=m_column, other=0).to(tl.float32)
    b_out = b_codes * tl.load(p_absmax + i_row) * (1.0 / 127.0)  # in the definition's order: the same last digit
    tl.store(p_out + i_row * K + o_column, b_out.to(p_out.dtype.element_ty), mask=m_column)


def dequantize(codes: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> None:
    """codes: contiguous int8 ``[..., K]``; absmax: contiguous float32 ``[...]``; out: contiguous floats as codes."""
    k = codes.shape[-1]
    grid = (codes.numel() // k, triton.cdiv(k, _BLOCK))
    triton_launch(_dequantize_kernel, grid, codes, absmax, out, k, BLOCK=_BLOCK)


def quantize(
    rows: torch.Tensor, threshold: float, codes: torch.Tensor, absmax: torch.Tensor, mask: torch.Tensor
) -> None:
    """rows: contiguous ``[R, K]``; codes: int8 ``[R, K]``; absmax: float32 ``[R]``; mask: bool ``[K]``, all False."""
    r, k = rows.shape
    flags = mask.view(torch.int8)
    triton_launch(_quantize_kernel, (r,), rows, codes, absmax, flags, k, threshold, SPLIT=threshold > 0.0, BLOCK=_BLOCK)
