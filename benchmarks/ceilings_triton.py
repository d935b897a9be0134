"""A kernel that only reads: the ceiling of products whose weights are streamed once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from onegpu.kernels.launch import triton_launch


@triton.jit
def _read(p_x, p_sums, BLOCK: tl.constexpr):
    i_program = tl.program_id(0).to(tl.int64)
    b_x = tl.load(p_x + i_program * BLOCK + tl.arange(0, BLOCK))  # [BLOCK]
    tl.store(p_sums + i_program, tl.sum(b_x, axis=0))


def read(x: torch.Tensor, sums: torch.Tensor, block: int) -> None:
    """x: int32, a multiple of `block` elements; sums: int32, one a block."""
    triton_launch(_read, (x.numel() // block,), x, sums, BLOCK=block, num_warps=8)
