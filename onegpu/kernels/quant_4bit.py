"""Blockwise 4-bit quantisation: ``code[i] = nearest(w[i] / absmax[block(i)])``, two codes a byte, high nibble first.

Blocks run over the flattened matrix and cross its rows where the row length is no multiple of the block. Both
directions are bound by bytes: 2 or 4 read (or written) and 0.5 written (or read) per weight.

Codes are those of bitsandbytes bit for bit *on the same kind of device*: its CPU and CUDA code differ in the code they
give to zeros (FP4 has two, an all-zero NF4 block has none) and in how a last, short block is divided; the values agree.
"""

from __future__ import annotations

import math

import torch

from onegpu.kernels.codebooks import codebook_4bit, pair_table_4bit
from onegpu.kernels.library import define, has_triton

# Quantising needs about 16 bytes of scratch per weight; slabs keep that below 64 MiB whatever the matrix, so that
# loading a model peaks at the model plus one layer.
_SLAB = 1 << 22

# FP4's decision points on CUDA, by magnitude, as bitsandbytes rounds them; the code of each interval follows.
_FP4_PIVOTS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
_FP4_CODES = (0, 1, 6, 7, 4, 5, 2, 3)


def _nearest_codes(scaled: torch.Tensor, quant_type: str) -> torch.Tensor:
    """Codes of values in [-1, 1]: uint8, same shape."""
    if quant_type == "fp4" and scaled.device.type != "cpu":
        pivots = torch.tensor(_FP4_PIVOTS, dtype=torch.float32, device=scaled.device)
        codes = torch.tensor(_FP4_CODES, dtype=torch.uint8, device=scaled.device)
        scaled = scaled.nan_to_num(nan=0.0)
        magnitude = codes[torch.bucketize(scaled.abs(), pivots, out_int32=True)]
        return magnitude + (scaled < 0).to(torch.uint8) * 8
    values, order = codebook_4bit(quant_type, scaled.device).sort(stable=True)
    middles = (values[:-1] + values[1:]) / 2
    if scaled.device.type != "cpu":
        scaled = scaled.nan_to_num(nan=-1.0)  # 0/0 of an all-zero block: its first code, as the CUDA kernel gives
    rank = torch.bucketize(scaled, middles, out_int32=True)
    if quant_type == "nf4":  # stored in ascending order: rank and code coincide
        return rank.to(torch.uint8)
    # index_select takes ranks as int32; `order[rank]` would first widen all of them to int64.
    return order.to(torch.uint8).index_select(0, rank.view(-1)).view(rank.shape)


def _quantize_slab(flat: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8 ``[n]``) and absmax (float32 ``[ceil(n / blocksize)]``) of a flat float tensor ``[n]``."""
    full = flat.numel() - flat.numel() % blocksize
    blocks = flat[:full].float().view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    on_cpu = flat.device.type == "cpu"
    divisor = absmax.clamp(min=1e-38) if on_cpu else absmax
    scaled = (blocks * (1.0 / divisor)[:, None]).clamp_(-1, 1).view(-1)
    if full < flat.numel():
        rest = flat[full:].float()
        peak = rest.abs().amax()
        if on_cpu:
            peak = peak.clamp(min=1e-38)
            tail = (rest / peak).clamp_(-1, 1)
        else:
            tail = (rest * (1.0 / peak)).clamp_(-1, 1)
        absmax = torch.cat((absmax, peak[None]))
        scaled = torch.cat((scaled, tail))
    return _nearest_codes(scaled, quant_type), absmax


def _quantize(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    flat = A.reshape(-1)
    n = flat.numel()
    packed = torch.empty(packed_bytes(n, quant_storage), dtype=torch.uint8, device=A.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=A.device)
    packed[(n + 1) // 2 :] = 0
    for start in range(0, n, _SLAB):
        codes, peaks = _quantize_slab(flat[start : start + _SLAB], blocksize, quant_type)
        if codes.numel() % 2:  # only the last slab: the missing partner is coded as a zero
            zero = _nearest_codes(torch.zeros(1, device=A.device), quant_type)
            codes = torch.cat((codes, zero))
        first, block = start // 2, start // blocksize
        packed[first : first + codes.numel() // 2] = (codes[::2] << 4) | codes[1::2]
        absmax[block : block + peaks.numel()] = peaks
    return packed.view(quant_storage).unsqueeze(1), absmax


def _quantize_cuda(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    if not has_triton() or not A.numel():
        return _quantize(A, blocksize, quant_type, quant_storage)
    from onegpu.kernels import quant_4bit_triton

    flat = A.reshape(-1).contiguous()  # of every other column, reshape makes a view with a stride of two
    packed = torch.empty(packed_bytes(flat.numel(), quant_storage), dtype=torch.uint8, device=A.device)
    if packed.numel() > (flat.numel() + 1) // 2:
        packed[(flat.numel() + 1) // 2 :] = 0
    absmax = torch.empty(-(-flat.numel() // blocksize), dtype=torch.float32, device=A.device)
    quant_4bit_triton.quantize(flat, blocksize, quant_type, packed, absmax)
    return packed.view(quant_storage).unsqueeze(1), absmax


def packed_bytes(numel: int, quant_storage: torch.dtype) -> int:
    """Bytes that ``numel`` weights take: half a byte each, rounded up to whole elements of ``quant_storage``."""
    return -(-((numel + 1) // 2) // quant_storage.itemsize) * quant_storage.itemsize


def _quantize_fake(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    n = A.numel()
    packed = A.new_empty((packed_bytes(n, quant_storage) // quant_storage.itemsize, 1), dtype=quant_storage)
    return packed, A.new_empty((-(-n // blocksize),), dtype=torch.float32)


def _dequantize(
    A: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> torch.Tensor:
    n = math.prod(shape)
    packed = A.contiguous().view(torch.uint8).view(-1)
    table = pair_table_4bit(quant_type, A.device)
    out = torch.empty(n, dtype=dtype, device=A.device)
    for start in range(0, n, _SLAB):
        stop = min(start + _SLAB, n)
        pairs = packed[start // 2 : (stop + 1) // 2].int()
        values = table.index_select(0, pairs).view(torch.float32)[: stop - start]
        first = start // blocksize
        full = (stop - start) - (stop - start) % blocksize
        last = first + full // blocksize
        torch.mul(
            values[:full].view(-1, blocksize),
            absmax[first:last, None],
            out=out[start : start + full].view(-1, blocksize),
        )
        if start + full < stop:
            torch.mul(values[full:], absmax[last], out=out[start + full : stop])
    return out.view(shape)


def _dequantize_cuda(
    A: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> torch.Tensor:
    if not has_triton() or not math.prod(shape):
        return _dequantize(A, absmax, blocksize, quant_type, shape, dtype)
    from onegpu.kernels import quant_4bit_triton

    out = torch.empty(list(shape), dtype=dtype, device=A.device)
    packed = A.contiguous().view(torch.uint8).view(-1)
    quant_4bit_triton.dequantize(packed, absmax.contiguous(), blocksize, quant_type, out)
    return out


def _dequantize_fake(
    A: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> torch.Tensor:
    return A.new_empty(shape, dtype=dtype)


define(
    "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    _quantize,
    _quantize_fake,
    cuda=_quantize_cuda,
)
define(
    "dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, SymInt[] shape, ScalarType dtype)"
    " -> Tensor",
    _dequantize,
    _dequantize_fake,
    cuda=_dequantize_cuda,
)


def cost(numel: int, itemsize: int, blocksize: int) -> tuple[int, int]:
    """Bytes moved and FLOPs of either direction for ``numel`` weights of ``itemsize`` bytes."""
    return numel * itemsize + (numel + 1) // 2 + 4 * -(-numel // blocksize), 2 * numel
