"""Blockwise 8-bit quantisation against a 256-entry map: double quantisation's second stage.

``code[i] = nearest(map, A[i] / absmax[block(i)])``. Bound by bytes: 4 read and 1 written per element.
"""

from __future__ import annotations

import torch

from onegpu.kernels.library import define, has_triton

_CPU_BINS = 65535


def _nearest(scaled: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Index of the nearest entry of an ascending ``code`` ``[256]`` for values in [-1, 1]: uint8, same shape.

    On the CPU the value is first rounded to one of 65,536 steps, as bitsandbytes' CPU table does, so that double
    quantised checkpoints written there and here are the same bytes.
    """
    if scaled.device.type == "cpu":
        step = ((scaled + 1.0) * 0.5 * _CPU_BINS + 0.5).to(torch.int32)
        scaled = -1.0 + (2.0 * step.float()) / _CPU_BINS
    middles = (code[:-1] + code[1:]) * 0.5
    return torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8)


def _quantize(A: torch.Tensor, code: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    flat = A.reshape(-1).float()
    n = flat.numel()
    padded = torch.nn.functional.pad(flat, (0, -n % blocksize)).view(-1, blocksize)
    absmax = padded.abs().amax(dim=1) if n else flat.new_empty(0)
    scaled = (padded * (1.0 / absmax)[:, None]).clamp_(-1, 1)
    codes = _nearest(scaled, code)
    # An all-zero block divides by zero; bitsandbytes writes code 0 there on either device.
    codes = torch.where((absmax == 0)[:, None], 0, codes).to(torch.uint8)
    flat_codes = codes.view(-1)
    if n < flat_codes.numel():
        flat_codes = flat_codes[:n].clone()  # a view would keep the padding in memory, and be counted with it in a file
    return flat_codes.view(A.shape), absmax


def _quantize_cuda(A: torch.Tensor, code: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    if not has_triton() or not A.numel() or blocksize & (blocksize - 1) or blocksize > 4096:
        return _quantize(A, code, blocksize)
    from onegpu.kernels import quant_blockwise_triton

    out = torch.empty(A.shape, dtype=torch.uint8, device=A.device)
    absmax = torch.empty(-(-A.numel() // blocksize), dtype=torch.float32, device=A.device)
    quant_blockwise_triton.quantize(A.reshape(-1).contiguous(), code.contiguous(), blocksize, out, absmax)
    return out, absmax


def _quantize_fake(A: torch.Tensor, code: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(A.shape, dtype=torch.uint8, device=A.device)
    return codes, A.new_empty((-(-A.numel() // blocksize),), dtype=torch.float32)


def _dequantize(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    flat = A.reshape(-1)
    n = flat.numel()
    values = torch.nn.functional.pad(code[flat.int()], (0, -n % blocksize)).view(-1, blocksize) * absmax[:, None]
    return values.view(-1)[:n].view(A.shape).to(dtype)


def _dequantize_fake(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty(A.shape, dtype=dtype, device=A.device)


define(
    "quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    _quantize,
    _quantize_fake,
    cuda=_quantize_cuda,
)
define(
    "dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)


def cost(numel: int, blocksize: int) -> tuple[int, int]:
    """Bytes moved and FLOPs of either direction for ``numel`` float32 elements."""
    return 5 * numel + 4 * -(-numel // blocksize), 2 * numel
