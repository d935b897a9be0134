"""The int8 Triton kernels compile everywhere within limits; the way back gives the definition's values to the digit."""

from __future__ import annotations

import pytest
import torch

from onegpu.kernels import quant_int8
from tests.triton_tools import ARCHITECTURES, SHARED_MEMORY_LIMIT, compiled, interpret, needs_triton


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_within_the_limits(architecture: int) -> None:
    from onegpu.kernels import quant_int8_triton as kernels

    arguments = {"p_codes": "*i8", "p_absmax": "*fp32", "p_out": "*bf16", "K": "i32"}
    kernel = compiled(kernels._dequantize_kernel, arguments, {"BLOCK": 2048}, architecture)
    assert kernel.metadata.shared <= SHARED_MEMORY_LIMIT


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("split", [False, True])
def test_quantising_compiles_within_the_limits(architecture: int, split: bool) -> None:
    from onegpu.kernels import quant_int8_triton as kernels

    pointers = {"p_in": "*fp16", "p_codes": "*i8", "p_absmax": "*fp32", "p_mask": "*i8"}
    arguments = {**pointers, "K": "i32", "threshold": "fp32"}
    kernel = compiled(kernels._quantize_kernel, arguments, {"SPLIT": split, "BLOCK": 2048}, architecture)
    assert kernel.metadata.shared <= SHARED_MEMORY_LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_on_a_gpu_it_quantises_within_a_tie_of_the_definition(dtype: torch.dtype, threshold: float) -> None:
    A = torch.randn(300, 2100, device="cuda").to(dtype)
    ours, wanted = torch.ops.onegpu.int8_vectorwise_quant(A, threshold), quant_int8._quantize(A, threshold)
    assert torch.equal(ours[1], wanted[1]) and torch.equal(ours[2], wanted[2])
    different = ours[0] != wanted[0]
    exact = (A.double() * 127 / ours[1][:, None].double())[different]
    assert ((exact - exact.floor() - 0.5).abs() < 1e-4).all()  # the approximate quotient, next to a tie
    assert ((exact - ours[0][different]).abs() < 0.5001).all()


@needs_triton
def test_dequantises_what_the_definition_does() -> None:
    interpret(
        """
        from onegpu.kernels import quant_int8, quant_int8_triton
        for dtype in (torch.float16, torch.float32):
            for shape in ((5, 2100), (1, 1), (3, 4, 64)):
                codes, maxima, _ = quant_int8._quantize(torch.randn(shape).half(), 0.0)
                maxima = maxima.view(shape[:-1])
                out = torch.full(shape, float("nan"), dtype=dtype)
                quant_int8_triton.dequantize(codes, maxima, out)
                assert torch.equal(out, quant_int8._dequantize(codes, maxima, dtype)), (dtype, shape)
        """
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_it_dequantises_what_the_definition_does(dtype: torch.dtype) -> None:
    codes, maxima, _ = quant_int8._quantize(torch.randn(300, 2100, device="cuda").half(), 0.0)
    values = quant_int8.dequantize_rows(codes, maxima, dtype)
    assert torch.equal(values, quant_int8._dequantize(codes, maxima, dtype))
