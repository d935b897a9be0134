"""Triton kernel of ``quant_int8``'s way back, imported at the first call on a GPU. Bytes: 1 read, 2 written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from onegpu.kernels.launch import triton_launch

_BLOCK = 2048


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
