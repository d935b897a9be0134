"""Triton kernels of ``quant_4bit``, imported at the first call on a GPU: the CPU build of torch brings no Triton.

Both are one pass over the weights and bound by bytes. Compiled with Triton 3.6 and 3.7. Bytes are counted as
``n - n // 2``: ``n + 1`` would be past an int32 for the largest n that is one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from onegpu.kernels.codebooks import codebook_4bit
from onegpu.kernels.launch import triton_launch
from onegpu.kernels.quant_blockwise_triton import reciprocal

_BYTES = 1024  # packed bytes a program when dequantising: 2,048 weights, 4 KiB written in 16 bits
# When quantising: weights a program, at least one block, and its warps. optimize(quantize=...) waits until this is
# compiled: with twice the weights a thread that took 2.6 times as long.
_VALUES, _WARPS = 4096, 8


@triton.jit
def _dequantize_kernel(p_packed, p_absmax, p_code, p_out, n_bytes, n, LOG_BLOCK: tl.constexpr, BYTES: tl.constexpr):
    i_program = tl.program_id(0).to(tl.int64)
    o_byte = i_program * BYTES + tl.arange(0, BYTES)  # [BYTES]
    m_byte = o_byte < n_bytes
    b_packed = tl.load(p_packed + o_byte, mask=m_byte, other=0).to(tl.int32)
    # Blocks are even: both weights of a byte share their scale. Flat on purpose: as tiles of [blocks, bytes], blocks of
    # 256 in float16 ended in a misaligned access on an H200 with Triton 3.6 (docs/worklog.md).
    b_scale = tl.load(p_absmax + ((o_byte * 2) >> LOG_BLOCK), mask=m_byte, other=0.0)
    b_high = tl.load(p_code + (b_packed >> 4)) * b_scale
    b_low = tl.load(p_code + (b_packed & 15)) * b_scale
    b_out = tl.interleave(b_high, b_low)  # [2 * BYTES]
    o_out = i_program * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=o_out < n)


@triton.jit
def _quantize_kernel(p_in, p_packed, p_absmax, n, NF4: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS], blocks of the format
    o_in = i_row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [ROWS, BLOCK]
    b_in = tl.load(p_in + o_in, mask=o_in < n, other=0.0).to(tl.float32)
    b_absmax = tl.max(tl.abs(b_in), axis=1)  # [ROWS]
    b_bad = tl.max((b_in != b_in).to(tl.int32), axis=1)  # max drops NaN: keep it visible in the scale
    b_absmax = tl.where(b_bad > 0, float("nan"), b_absmax)
    tl.store(p_absmax + i_row, b_absmax, mask=i_row * BLOCK < n)
    b_scaled = b_in * reciprocal(b_absmax)[:, None]
    # The pivots as a C compiler rounds their decimals to float32: three of NF4's lie next to the middle of two floats,
    # where going through a double rounds the other way.
    if NF4:
        b_code = (b_scaled > -0.8480964303016663).to(tl.int32)
        b_code += (b_scaled > -0.6106329262256622).to(tl.int32)
        b_code += (b_scaled > -0.4599952697753906).to(tl.int32)
        b_code += (b_scaled > -0.33967943489551544).to(tl.int32)
        b_code += (b_scaled > -0.23460740596055984).to(tl.int32)
        b_code += (b_scaled > -0.13791173323988914).to(tl.int32)
        b_code += (b_scaled > -0.045525018125772476).to(tl.int32)
        b_code += (b_scaled > 0.03979014977812767).to(tl.int32)
        b_code += (b_scaled > 0.1202552542090416).to(tl.int32)
        b_code += (b_scaled > 0.2035212516784668).to(tl.int32)
        b_code += (b_scaled > 0.2920137718319893).to(tl.int32)
        b_code += (b_scaled > 0.3893125355243683).to(tl.int32)
        b_code += (b_scaled > 0.5016633868217468).to(tl.int32)
        b_code += (b_scaled > 0.6427869200706482).to(tl.int32)
        b_code += (b_scaled > 0.8614784178118011).to(tl.int32)
    else:
        b_size = tl.abs(b_scaled)
        b_rank = (b_size > 0.00260417).to(tl.int32)
        b_rank += (b_size > 0.0859375).to(tl.int32)
        b_rank += (b_size > 0.20833333).to(tl.int32)
        b_rank += (b_size > 0.29166667).to(tl.int32)
        b_rank += (b_size > 0.4166667).to(tl.int32)
        b_rank += (b_size > 0.583333).to(tl.int32)
        b_rank += (b_size > 0.8333333).to(tl.int32)
        # By magnitude the codes run 0 1 6 7 4 5 2 3: from the second pair on, pairs descend.
        b_code = tl.where(b_rank < 2, b_rank, (8 - (b_rank & 6)) + (b_rank & 1))
        b_code += tl.where(b_scaled <= -1.1754943508222875e-38, 8, 0)  # with fast math, what is smaller is zero
    b_pairs = tl.reshape(b_code, [ROWS, BLOCK // 2, 2])
    b_high, b_low = tl.split(b_pairs)  # [ROWS, BLOCK // 2] each
    o_out = i_row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(p_packed + o_out, ((b_high << 4) | b_low).to(tl.uint8), mask=o_out < n - n // 2)


def dequantize(packed: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, out: torch.Tensor) -> None:
    """packed: uint8 ``[(n + 1) // 2]``; absmax: float32 ``[ceil(n / blocksize)]``; out: contiguous, n elements."""
    n = out.numel()
    n_bytes = (n + 1) // 2
    code = codebook_4bit(quant_type, out.device)
    triton_launch(
        _dequantize_kernel, (triton.cdiv(n_bytes, _BYTES),),
        packed, absmax, code, out, n_bytes, n, LOG_BLOCK=blocksize.bit_length() - 1, BYTES=_BYTES,
    )  # fmt: skip


def quantize(flat: torch.Tensor, blocksize: int, quant_type: str, packed: torch.Tensor, absmax: torch.Tensor) -> None:
    """flat: contiguous floats ``[n]``; packed: uint8 ``[(n + 1) // 2]``; absmax: float32 ``[ceil(n / blocksize)]``."""
    n = flat.numel()
    rows = max(1, _VALUES // blocksize)
    triton_launch(
        _quantize_kernel, (triton.cdiv(n, rows * blocksize),),
        flat, packed, absmax, n, NF4=quant_type == "nf4", BLOCK=blocksize, ROWS=rows, num_warps=_WARPS,
    )  # fmt: skip
