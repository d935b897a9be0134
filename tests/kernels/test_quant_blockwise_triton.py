"""The blockwise Triton kernel compiles everywhere within limits. tests/functional compares its codes on a GPU."""

from __future__ import annotations

import pytest
import torch

import onegpu.functional as F
from tests.triton_tools import ARCHITECTURES, SHARED_MEMORY_LIMIT, compiled, needs_triton


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_compiles_within_the_limits(architecture: int, blocksize: int) -> None:
    from onegpu.kernels import quant_blockwise_triton as kernels

    arguments = {"p_in": "*fp32", "p_code": "*fp32", "p_out": "*u8", "p_absmax": "*fp32", "n": "i32"}
    kernel = compiled(kernels._quantize_kernel, arguments, {"BLOCK": blocksize}, architecture)
    assert kernel.metadata.shared <= SHARED_MEMORY_LIMIT
    assert "rcp.approx.ftz.f32" in kernel.asm["ptx"], "an exact quotient gives other codes than bitsandbytes"


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 24, 256, 70001])
def test_on_a_gpu_values_come_back_within_the_maps_step(n: int) -> None:
    A = torch.randn(n, device="cuda")
    codes, state = F.quantize_blockwise(A, blocksize=256)
    back = F.dequantize_blockwise(codes, state)
    peaks = state.absmax.repeat_interleave(256)[:n]
    assert ((back - A).abs() <= 0.0085 * peaks).all()  # half the map's widest step is 0.0071
