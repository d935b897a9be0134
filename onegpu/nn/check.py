"""Checks of loaded quantised weights: a kernel trusts these numbers, a short absmax would be read past its end."""

from __future__ import annotations

import torch

from onegpu.functional import check_4bit
from onegpu.kernels.codebooks import codebook_4bit, dynamic_map
from onegpu.kernels.quant_4bit import packed_bytes
from onegpu.nn.bytes_of import nbytes
from onegpu.nn.params_4bit import Params4bit


def check_state(weight: Params4bit, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless codes, scales, tables and shape of a loaded weight fit each other and ``shape``."""
    state = weight.quant_state
    if state is None or state.shape is None or state.code is None:
        raise ValueError("no quant_state: the 4-bit statistics are missing")
    check_4bit(state.blocksize or 0, state.quant_type or "")
    numel = state.shape.numel()
    blocks = -(-numel // (state.blocksize or 64))
    if tuple(state.shape) != tuple(shape):
        raise ValueError(f"quant_state.shape={tuple(state.shape)} is not the layer's {tuple(shape)}")
    needed = packed_bytes(numel, weight.dtype)
    if nbytes(weight) != needed:
        raise ValueError(f"packed weight has {nbytes(weight)} bytes, {tuple(shape)} needs {needed}")
    if state.absmax.numel() != blocks:
        raise ValueError(
            f"absmax has {state.absmax.numel()} entries, the layer's blocks of {state.blocksize} need {blocks}"
        )
    if state.code.is_meta:
        return
    _check_table("quant_map", state.code, codebook_4bit(state.quant_type or "", state.code.device))
    if state.state2 is None:
        _check_scales("absmax", state.absmax)
        return
    if state.absmax.dtype != torch.uint8:
        raise ValueError(f"absmax has dtype {state.absmax.dtype}, double quantised scales are uint8")
    groups = -(-blocks // 256)
    if state.state2.blocksize != 256:
        raise ValueError(f"nested_blocksize={state.state2.blocksize} is not the format's 256")
    if state.state2.absmax.numel() != groups:
        raise ValueError(f"nested_absmax has {state.state2.absmax.numel()} entries, {blocks} scales need {groups}")
    _check_scales("nested_absmax", state.state2.absmax)
    if state.offset is None or not torch.isfinite(state.offset):
        raise ValueError(f"nested_offset={state.offset} is not a finite number")
    if state.state2.code is None:
        raise ValueError("nested_quant_map is missing")
    _check_table("nested_quant_map", state.state2.code, dynamic_map(state.state2.code.device))


def _check_scales(name: str, scales: torch.Tensor) -> None:
    if scales.dtype != torch.float32:
        raise ValueError(f"{name} has dtype {scales.dtype}, the format says float32")
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(f"{name} holds NaN or infinity")


def _check_table(name: str, table: torch.Tensor, expected: torch.Tensor) -> None:
    # Within rounding: FP4's table was written as decimals by old versions.
    if table.shape != expected.shape or not torch.allclose(table.float(), expected, rtol=0, atol=1e-4):
        raise ValueError(f"{name} is not the table of this format (reversed, foreign or damaged)")
