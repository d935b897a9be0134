"""Few-row products with quantised weights, in Triton: ``y[M, N] = x[M, K] @ dequantise(W[N, K]).T + bias``.

The portable counterpart of few_rows.py, up to 16 rows. The weights are read once, as they are stored, and decoded in
registers: int8 is bound by its bytes, 4 bits by the look-ups. One row is a dot product in float32, more go through the
tensor cores (int8 is exact in either 16-bit dtype; 4-bit weights are rounded to it, as the definition does). Imported
at the first call on a GPU. Compiled with Triton 3.6 and 3.7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from onegpu.kernels.codebooks import codebook_4bit

if TYPE_CHECKING:
    from onegpu.kernels.linear_4bit import Packed4bit

MAX_ROWS = 16  # of int8; past that the dequantised product is as fast


@triton.jit
def _row_4bit(p_x, p_w, p_absmax, p_code, p_bias, p_y, N, K, BIAS: tl.constexpr, BLOCK: tl.constexpr,
              BN: tl.constexpr, G: tl.constexpr):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    m_n = o_n < N
    o_in = tl.arange(0, BLOCK // 2)  # bytes of a block
    n_blocks = K // BLOCK
    b_acc = tl.zeros([BN, G], tl.float32)
    for i_block in range(0, n_blocks, G):
        o_g = i_block + tl.arange(0, G)  # [G]
        m_g = o_g < n_blocks
        m_w = m_n[:, None] & m_g[None, :]  # [BN, G]
        o_scale = o_n[:, None] * n_blocks + o_g[None, :]
        b_scale = tl.load(p_absmax + o_scale, mask=m_w, other=0.0)
        o_w = o_scale[:, :, None] * (BLOCK // 2) + o_in[None, None, :]  # [BN, G, BLOCK // 2]
        b_w = tl.load(p_w + o_w, mask=m_w[:, :, None], other=0).to(tl.int32)
        o_x = o_g[:, None] * BLOCK + o_in[None, :] * 2  # [G, BLOCK // 2]
        b_even = tl.load(p_x + o_x, mask=m_g[:, None], other=0.0).to(tl.float32)
        b_odd = tl.load(p_x + o_x + 1, mask=m_g[:, None], other=0.0).to(tl.float32)
        b_part = tl.load(p_code + (b_w >> 4)) * b_even[None, :, :] + tl.load(p_code + (b_w & 15)) * b_odd[None, :, :]
        b_acc += tl.sum(b_part, axis=2) * b_scale
    b_y = tl.sum(b_acc, axis=1)
    if BIAS:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_y + o_n, b_y.to(p_y.dtype.element_ty), mask=m_n)


@triton.jit
def _rows_4bit(p_x, p_w, p_absmax, p_code, p_bias, p_y, M, N, K, BLOCK, BIAS: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr, BB: tl.constexpr):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    o_m = tl.arange(0, BM).to(tl.int64)  # [BM]
    m_n, m_m = o_n < N, o_m < M
    b_acc = tl.zeros([BM, BN], tl.float32)
    for i_b in range(0, K // 2, BB):
        o_b = i_b + tl.arange(0, BB)  # [BB] bytes of a row
        m_b = o_b < K // 2
        m_w = m_n[:, None] & m_b[None, :]  # [BN, BB]
        o_w = o_n[:, None] * (K // 2) + o_b[None, :]
        b_w = tl.load(p_w + o_w, mask=m_w, other=0).to(tl.int32)
        b_scale = tl.load(p_absmax + o_w * 2 // BLOCK, mask=m_w, other=0.0)  # both weights of a byte are in one block
        b_even = (tl.load(p_code + (b_w >> 4)) * b_scale).to(p_x.dtype.element_ty)
        b_odd = (tl.load(p_code + (b_w & 15)) * b_scale).to(p_x.dtype.element_ty)
        m_x = m_m[:, None] & m_b[None, :]
        o_x = o_m[:, None] * K + o_b[None, :] * 2  # [BM, BB]
        b_acc = tl.dot(tl.load(p_x + o_x, mask=m_x, other=0.0), tl.trans(b_even), b_acc)
        b_acc = tl.dot(tl.load(p_x + o_x + 1, mask=m_x, other=0.0), tl.trans(b_odd), b_acc)
    if BIAS:
        b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_y = o_m[:, None] * N + o_n[None, :]
    tl.store(p_y + o_y, b_acc.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def _row_int8(p_x, p_w, p_scale, p_bias, p_y, N, K, BIAS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    m_n = o_n < N
    b_acc = tl.zeros([BN, BK], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)  # [BK]
        m_k = o_k < K
        b_w = tl.load(p_w + o_n[:, None] * K + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0)  # [BN, BK]
        b_x = tl.load(p_x + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_acc += b_w.to(tl.float32) * b_x[None, :]
    b_y = tl.sum(b_acc, axis=1) * (tl.load(p_scale + o_n, mask=m_n, other=0.0) * (1.0 / 127.0))
    if BIAS:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_y + o_n, b_y.to(p_y.dtype.element_ty), mask=m_n)


@triton.jit
def _rows_int8(p_x, p_w, p_scale, p_bias, p_y, M, N, K, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
               BK: tl.constexpr):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    o_m = tl.arange(0, BM).to(tl.int64)  # [BM]
    m_n, m_m = o_n < N, o_m < M
    b_acc = tl.zeros([BM, BN], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)  # [BK]
        m_k = o_k < K
        b_w = tl.load(p_w + o_n[:, None] * K + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0)  # [BN, BK]
        b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_acc = tl.dot(b_x, tl.trans(b_w.to(p_x.dtype.element_ty)), b_acc)  # int8 is exact in either 16-bit dtype
    b_acc *= (tl.load(p_scale + o_n, mask=m_n, other=0.0) * (1.0 / 127.0))[None, :]
    if BIAS:
        b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_y = o_m[:, None] * N + o_n[None, :]
    tl.store(p_y + o_y, b_acc.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


# (BN, blocks or columns a step, warps, stages); measured on an H200, see docs/worklog.md.
_ROW_4BIT = (8, 16, 4, 3)
_ROW_INT8_NARROW, _ROW_INT8_WIDE = (2, 2048, 4, 3), (4, 1024, 4, 3)
_ROWS_INT8 = (32, 256, 4, 4)
_ROWS_4BIT = (32, 32, 4, 3)


def row_4bit(
    x: torch.Tensor,
    weight: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    config: tuple[int, int, int, int] | None = None,
) -> None:
    """x: 16-bit ``[K]``, K a multiple of the block; weight: uint8 ``[N*K/2]``; absmax: float32; y: ``[N]``."""
    k, n = x.numel(), y.numel()
    bn, blocks, warps, stages = config or _ROW_4BIT
    blocks = max(1, blocks * 64 // blocksize)
    with torch.cuda.device(x.device):
        _row_4bit[(triton.cdiv(n, bn),)](
            x, weight, absmax, codebook_4bit(quant_type, x.device), bias, y, n, k, BIAS=bias is not None,
            BLOCK=blocksize, BN=bn, G=blocks, num_warps=warps, num_stages=stages,
        )  # fmt: skip


def linear_4bit(x: torch.Tensor, packed: Packed4bit, bias: torch.Tensor | None) -> torch.Tensor:
    """x: contiguous 16-bit ``[M, K]``, M <= 16, K even; any block size. Returns ``[M, N]``."""
    (m, k), n, blocksize = x.shape, packed.shape[0], packed.blocksize
    y = x.new_empty((m, n))
    weight, absmax = packed.weight.reshape(-1).view(torch.uint8), packed.scales()
    if m == 1 and k % blocksize == 0 and blocksize <= 128:
        row_4bit(x.view(-1), weight, absmax, blocksize, packed.quant_type, bias, y.view(-1))
        return y
    bn, step, warps, stages = _ROWS_4BIT
    code = codebook_4bit(packed.quant_type, x.device)
    with torch.cuda.device(x.device):
        _rows_4bit[(triton.cdiv(n, bn),)](
            x, weight, absmax, code, bias, y, m, n, k, blocksize, BIAS=bias is not None, BM=MAX_ROWS, BN=bn, BB=step,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return y


def linear_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    SCB: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    config: tuple[int, int, int, int] | None = None,
) -> None:
    """x: contiguous 16-bit ``[M, K]``, M <= 16; weight: int8 ``[N, K]``; SCB: float32 ``[N]``; y: ``[M, N]``."""
    (m, k), n = x.shape, y.shape[1]
    has_bias = bias is not None
    bn, step, warps, stages = config or (_ROWS_INT8 if m > 1 else _ROW_INT8_NARROW if n < 8192 else _ROW_INT8_WIDE)
    grid, options = (triton.cdiv(n, bn),), {"BN": bn, "BK": step, "num_warps": warps, "num_stages": stages}
    with torch.cuda.device(x.device):
        if m == 1:
            _row_int8[grid](x, weight, SCB, bias, y, n, k, BIAS=has_bias, **options)
        else:
            _rows_int8[grid](x, weight, SCB, bias, y, m, n, k, BIAS=has_bias, BM=MAX_ROWS, **options)
