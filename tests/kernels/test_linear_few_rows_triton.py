"""Few-row products: they compile everywhere within limits, and agree with the product of the dequantised matrix."""

from __future__ import annotations

import pytest
import torch

import onegpu.functional as F
from onegpu.kernels.linear_4bit import linear_4bit
from onegpu.kernels.linear_int8 import linear_int8
from onegpu.kernels.quant_int8 import dequantize_rows
from tests.triton_tools import ARCHITECTURES, SHARED_MEMORY_LIMIT, compiled, interpret, needs_triton

POINTERS = {"p_bias": "*bf16", "p_y": "*bf16"}


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_within_the_limits(architecture: int) -> None:
    from onegpu.kernels import linear_few_rows_triton as kernels

    int8 = {"p_x": "*bf16", "p_w": "*i8", "p_scale": "*fp32", **POINTERS}
    four = {"p_x": "*bf16", "p_w": "*u8", "p_absmax": "*fp32", "p_code": "*fp32", **POINTERS, "N": "i32", "K": "i32"}
    made = []
    for bn, step, warps, stages in (kernels._ROW_INT8_NARROW, kernels._ROW_INT8_WIDE):
        constants = {"BIAS": True, "BN": bn, "BK": step}
        options = {"num_warps": warps, "num_stages": stages}
        made.append(compiled(kernels._row_int8, {**int8, "N": "i32", "K": "i32"}, constants, architecture, **options))
    bn, step, warps, stages = kernels._ROWS_INT8
    constants, sizes = {"BIAS": True, "BM": kernels.MAX_ROWS, "BN": bn, "BK": step}, dict.fromkeys("MNK", "i32")
    options = {"num_warps": warps, "num_stages": stages}
    made.append(compiled(kernels._rows_int8, {**int8, **sizes}, constants, architecture, **options))
    bn, blocks, warps, stages = kernels._ROW_4BIT
    constants, options = {"BIAS": True, "BLOCK": 64, "BN": bn, "G": blocks}, {"num_warps": warps, "num_stages": stages}
    made.append(compiled(kernels._row_4bit, four, constants, architecture, **options))
    assert all(kernel.metadata.shared <= SHARED_MEMORY_LIMIT for kernel in made)


@needs_triton
def test_products_are_those_of_the_dequantised_matrix() -> None:
    interpret(
        """
        from onegpu.kernels import linear_few_rows_triton as kernels
        for n, k in ((37, 192), (5, 64)):
            bias = torch.randn(n).half()
            weight = torch.randn(n, k)
            packed, state = F.quantize_4bit(weight, quant_type="nf4")
            codes, maxima, _ = F.int8_vectorwise_quant(weight.half())
            for m in (1, 3):
                x = torch.randn(m, k).half()
                y = torch.full((m, n), float("nan")).half()
                kernels.linear_int8(x, codes, maxima, bias, y, (4, 64, 4, 1))
                expected = x.float() @ (codes * maxima[:, None] / 127).T + bias
                torch.testing.assert_close(y.float(), expected, rtol=2e-3, atol=2e-2)
            y = torch.full((n,), float("nan")).half()
            kernels.row_4bit(x[0], packed.view(-1), state.absmax, 64, "nf4", bias, y, (4, 2, 4, 1))
            expected = x[0].float() @ F.dequantize_4bit(packed, state).T + bias
            torch.testing.assert_close(y.float(), expected, rtol=2e-3, atol=2e-2)
        """
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 2, 16, 17])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (100, 896), (37, 192), (64, 4544)])
def test_on_a_gpu(n: int, k: int, m: int, dtype: torch.dtype) -> None:
    weight = torch.randn(n, k, device="cuda").to(dtype)
    x, bias = torch.randn(m, k, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
    packed, state = F.quantize_4bit(weight, quant_type="nf4")
    codes, maxima, _ = F.int8_vectorwise_quant(weight.half())
    four = linear_4bit(x, state.packed(packed), bias)
    eight = linear_int8(x, codes, maxima, bias, threshold=6.0)
    for y, matrix in (
        (four, F.dequantize_4bit(packed, state).float()),
        (eight, dequantize_rows(codes, maxima, torch.float32)),
    ):
        expected = x.float() @ matrix.T + bias.float()
        assert (y.float() - expected).norm() <= 4e-3 * expected.norm()
