"""The 4-bit Triton kernels: they compile everywhere within limits, and decode what the definition decodes."""

from __future__ import annotations

import pytest
import torch

import onegpu.functional as F
from onegpu.kernels import quant_4bit
from tests.triton_tools import ARCHITECTURES, SHARED_MEMORY_LIMIT, compiled, interpret, needs_triton


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_compiles_within_the_limits(architecture: int, dtype: str) -> None:
    from onegpu.kernels import quant_4bit_triton as kernels

    arguments = {"p_packed": "*u8", "p_absmax": "*fp32", "p_code": "*fp32", "p_out": f"*{dtype}"}
    arguments |= {"n_bytes": "i32", "n": "i32"}
    way_back = compiled(kernels._dequantize_kernel, arguments, {"LOG_BLOCK": 6, "BYTES": 1024}, architecture)
    arguments = {"p_in": f"*{dtype}", "p_packed": "*u8", "p_absmax": "*fp32", "n": "i32"}
    constants = {"NF4": architecture == 90, "BLOCK": 64, "ROWS": 64}
    way_there = compiled(kernels._quantize_kernel, arguments, constants, architecture)
    for kernel in (way_back, way_there):
        assert kernel.metadata.shared <= SHARED_MEMORY_LIMIT
    assert "rcp.approx.ftz.f32" in way_there.asm["ptx"], "an exact quotient gives other codes than bitsandbytes"


@needs_triton
def test_dequantises_what_the_definition_does() -> None:
    interpret(
        """
        from onegpu.kernels import quant_4bit_triton
        for dtype in (torch.float16, torch.float32):
            for blocksize in (32, 64, 256, 4096):
                for n in (33 * 67, 6144, 1):
                    packed, state = F.quantize_4bit(torch.randn(n).to(dtype), blocksize=blocksize, quant_type="nf4")
                    out = torch.full((n,), float("nan"), dtype=dtype)
                    quant_4bit_triton.dequantize(packed.view(-1), state.absmax, blocksize, "nf4", out)
                    assert torch.equal(out, F.dequantize_4bit(packed, state).view(-1)), (dtype, blocksize, n)
        """
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_on_a_gpu_it_dequantises_what_the_definition_does(blocksize: int, quant_type: str, dtype: torch.dtype) -> None:
    for shape in ((24, 256), (113, 203), (1, 1), (4096, 4096)):
        A = torch.randn(shape, device="cuda").to(dtype)
        packed, state = F.quantize_4bit(A, blocksize=blocksize, quant_type=quant_type)
        expected = quant_4bit._dequantize(packed, state.absmax, blocksize, quant_type, list(shape), dtype)
        values = F.dequantize_4bit(packed, state)
        assert torch.equal(values.t() if packed.shape[0] == 1 else values, expected)
