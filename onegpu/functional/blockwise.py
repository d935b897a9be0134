"""Quantising in blocks: 4 bits (NF4, FP4) with plain or double quantised scales, and 8 bits against a table."""

from __future__ import annotations

import torch

from onegpu.functional.quant_state import QuantState
from onegpu.kernels import quant_4bit, quant_blockwise  # noqa: F401  (define the ops)
from onegpu.kernels.codebooks import BLOCK_SIZES, QUANT_TYPES, codebook_4bit, dynamic_map

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NESTED_BLOCKSIZE = 256


def _check_float(A: torch.Tensor, what: str) -> None:
    if A.dtype not in _FLOATS:
        raise ValueError(f"{what} takes float16, bfloat16 or float32, got A.dtype={A.dtype}; cast A first")


def check_4bit(blocksize: int, quant_type: str) -> None:
    """Raise ``ValueError`` naming argument, value and choices unless both are of the 4-bit format."""
    if blocksize not in BLOCK_SIZES:
        raise ValueError(f"blocksize={blocksize} is not supported; use one of {', '.join(map(str, BLOCK_SIZES))}")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type={quant_type!r} is not supported; use one of {', '.join(QUANT_TYPES)}")


def quantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """Quantise ``A`` (float, any shape, flattened) to 4 bits in blocks.

    Args:
        A: float16, bfloat16 or float32.
        absmax, out: filled with the scales and the codes where given.
        blocksize: 32 to 4096, a power of two; 64 by default.
        compress_statistics: quantise the scales too, in blocks of 256 to 8 bits (double quantisation).
        quant_type: "nf4" or "fp4".
        quant_storage: dtype that the packed bytes are viewed as.

    Returns:
        Packed codes ``[(n+1)//2 / quant_storage.itemsize, 1]`` and the state that undoes it.
    """
    blocksize = 64 if blocksize is None else blocksize
    check_4bit(blocksize, quant_type)
    _check_float(A, "quantize_4bit")
    packed, scales = torch.ops.onegpu.quantize_4bit(A, blocksize, quant_type, quant_storage)
    offset = state2 = None
    if compress_statistics:
        offset = scales.mean()
        scales, state2 = quantize_blockwise(scales - offset, blocksize=_NESTED_BLOCKSIZE)
    if out is not None:
        packed = out.copy_(packed)
    if absmax is not None:
        scales = absmax.copy_(scales)
    code = codebook_4bit(quant_type, A.device)
    return packed, QuantState(scales, A.shape, code, blocksize, quant_type, A.dtype, offset, state2)


def dequantize_4bit(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> torch.Tensor:
    """Undo :func:`quantize_4bit`: packed codes and their state (or absmax, out, blocksize, type) to the original."""
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit needs quant_state, or both absmax and out (for shape and dtype)")
        quant_state = QuantState(absmax, out.shape, None, blocksize or 64, quant_type, out.dtype)
    check_4bit(quant_state.blocksize or 0, quant_state.quant_type or "")
    dtype = quant_state.dtype or torch.float32
    if dtype not in _FLOATS:
        raise ValueError(f"dequantize_4bit gives float16, bfloat16 or float32, got quant_state.dtype={dtype}")
    values = quant_state.packed(A).dequantize(dtype)
    if out is not None:
        values = out.copy_(values)
    # bitsandbytes' convention: codes passed transposed, [1, n], come back transposed.
    return values.t() if A.shape[0] == 1 and values.dim() == 2 else values


def quantize_nf4(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """:func:`quantize_4bit` with ``quant_type="nf4"``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def quantize_fp4(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """:func:`quantize_4bit` with ``quant_type="fp4"``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def dequantize_nf4(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
) -> torch.Tensor:
    """:func:`dequantize_4bit` with ``quant_type="nf4"``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_fp4(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
) -> torch.Tensor:
    """:func:`dequantize_4bit` with ``quant_type="fp4"``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def quantize_blockwise(
    A: torch.Tensor,
    code: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[torch.Tensor, QuantState]:
    """Quantise ``A`` (float, any shape) to uint8 indices into ``code`` (ascending ``[256]``; the dynamic map).

    Returns codes of A's shape and their state; ``nested`` quantises the scales as well.
    """
    if blocksize <= 0:
        raise ValueError(f"blocksize={blocksize} must be positive; 256 and 4096 are usual")
    _check_float(A, "quantize_blockwise")
    code = dynamic_map(A.device) if code is None else code.to(A.device)
    codes, scales = torch.ops.onegpu.quantize_blockwise(A, code, blocksize)
    offset = state2 = None
    if nested:
        offset = scales.mean()
        scales, state2 = quantize_blockwise(scales - offset, blocksize=blocksize)
    if out is not None:
        codes = out.copy_(codes)
    if absmax is not None:
        scales = absmax.copy_(scales)
    return codes, QuantState(scales, None, code, blocksize, None, A.dtype, offset, state2)


def dequantize_blockwise(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    code: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> torch.Tensor:
    """Undo :func:`quantize_blockwise`: uint8 codes to floats of the same shape, in the state's dtype."""
    if A.dtype != torch.uint8:
        raise ValueError(f"dequantize_blockwise takes uint8 codes, got A.dtype={A.dtype}")
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise needs quant_state or absmax; pass what quantize_blockwise returned")
        code = dynamic_map(A.device) if code is None else code
        quant_state = QuantState(absmax, None, code, blocksize, None, torch.float32)
    scales = quant_state.absmax
    if quant_state.state2 is not None and quant_state.offset is not None:
        scales = dequantize_blockwise(scales, quant_state.state2).float() + quant_state.offset
    table = (quant_state.code if quant_state.code is not None else dynamic_map(A.device)).to(A.device)
    size, dtype = quant_state.blocksize or blocksize, quant_state.dtype or torch.float32
    if size <= 0:
        raise ValueError(f"blocksize={size} must be positive; 256 and 4096 are usual")
    values: torch.Tensor = torch.ops.onegpu.dequantize_blockwise(A, scales, table, size, dtype)
    return values if out is None else out.copy_(values)
