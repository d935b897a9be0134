"""Row-wise int8 quantisation: ``q[r, c] = round(127 * A[r, c] / max|A[r, :]|)``.

The vector-wise scheme of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339, section 2.1). With a threshold, entries
at or above it do not enter the row's maximum, and every column that holds one is zero in the result: the caller
multiplies those columns in higher precision. Bound by bytes: 2 read and 1 written per element.
"""

from __future__ import annotations

import torch

from onegpu.kernels.library import define, has_triton

# Elements of one slab: the 10 or so bytes of scratch that each takes stay below 64 MiB, whatever the matrix.
_SLAB = 1 << 22


def _quantize(A: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = A.reshape(-1, A.shape[-1])
    mask = torch.zeros(rows.shape[1], dtype=torch.bool, device=A.device)
    absmax = torch.empty(rows.shape[0], dtype=torch.float32, device=A.device)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=A.device)
    step = max(1, _SLAB // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        slab = rows[start : start + step]
        if threshold > 0.0:
            outliers = slab.abs() >= threshold
            mask |= outliers.any(dim=0)
            slab = slab.masked_fill(outliers, 0.0)
        peaks = slab.abs().amax(dim=1).float()
        absmax[start : start + step] = peaks
        # An all-zero row divides by zero. Its codes are zeros; a row with NaN keeps NaN in absmax, where it is visible.
        codes[start : start + step] = (slab * (127.0 / peaks)[:, None]).round_().nan_to_num_(nan=0.0)
    if threshold > 0.0:
        codes.masked_fill_(mask, 0)
    return codes.view(A.shape), absmax, mask


def _quantize_cuda(A: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not has_triton() or not A.numel() or not A.is_contiguous():
        return _quantize(A, threshold)
    from onegpu.kernels import quant_int8_triton

    rows = A.view(-1, A.shape[-1])
    mask = torch.zeros(rows.shape[1], dtype=torch.bool, device=A.device)
    absmax = torch.empty(rows.shape[0], dtype=torch.float32, device=A.device)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=A.device)
    quant_int8_triton.quantize(rows, threshold, codes, absmax, mask)
    if threshold > 0.0:
        codes.masked_fill_(mask, 0)
    return codes.view(A.shape), absmax, mask


def _quantize_fake(A: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = A.numel() // A.shape[-1]
    codes = torch.empty(A.shape, dtype=torch.int8, device=A.device)
    return codes, A.new_empty((rows,), dtype=torch.float32), A.new_empty((A.shape[-1],), dtype=torch.bool)


define(
    "int8_vectorwise_quant(Tensor A, float threshold) -> (Tensor, Tensor, Tensor)",
    _quantize,
    _quantize_fake,
    cuda=_quantize_cuda,
)


def _dequantize(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes * absmax[..., None]).mul_(1.0 / 127.0).to(dtype)  # in bitsandbytes' order: the same last digit


def _dequantize_cuda(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not has_triton() or not codes.numel() or not codes.is_contiguous():
        return _dequantize(codes, absmax, dtype)
    from onegpu.kernels import quant_int8_triton

    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    quant_int8_triton.dequantize(codes, absmax.contiguous(), out)
    return out


def _dequantize_fake(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


define(
    "int8_vectorwise_dequant(Tensor codes, Tensor absmax, ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
    cuda=_dequantize_cuda,
)


def dequantize_rows(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``codes * absmax / 127`` in ``dtype``: codes int8 ``[..., K]``, absmax float32 ``[...]``."""
    values: torch.Tensor = torch.ops.onegpu.int8_vectorwise_dequant(codes, absmax, dtype)
    return values


def cost(rows: int, columns: int, itemsize: int) -> tuple[int, int]:
    """Bytes moved and FLOPs."""
    return rows * columns * (itemsize + 1) + 4 * rows, 2 * rows * columns
