"""The blockwise 8-bit ops below `functional`, whose tests compare their codes with bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from onegpu.kernels.codebooks import dynamic_map
from onegpu.kernels.quant_blockwise import cost
from tests.matrices import FLOATS, SHAPES, weights

OPS = torch.ops.onegpu


@pytest.mark.parametrize("blocksize", [64, 256])
def test_opcheck(device: str, blocksize: int) -> None:
    A, code = weights((24, 66), torch.float32, device), dynamic_map(torch.device(device))
    torch.library.opcheck(OPS.quantize_blockwise.default, (A, code, blocksize))
    codes, absmax = OPS.quantize_blockwise(A, code, blocksize)
    torch.library.opcheck(OPS.dequantize_blockwise.default, (codes, absmax, code, blocksize, torch.bfloat16))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_table_entry_times_scale(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    A, code = weights(shape, dtype, device), dynamic_map(torch.device(device))
    codes, absmax = OPS.quantize_blockwise(A, code, 64)
    wanted = code[codes.long()].view(-1) * absmax.repeat_interleave(64)[: A.numel()]
    values = OPS.dequantize_blockwise(codes, absmax, code, 64, dtype)
    assert values.dtype == dtype and torch.equal(values, wanted.view(shape).to(dtype))


def test_every_entry_of_the_table_is_reached_and_kept(device: str) -> None:
    code = dynamic_map(torch.device(device))
    codes, absmax = OPS.quantize_blockwise(code, code, 256)
    assert absmax.tolist() == [1.0]
    values = OPS.dequantize_blockwise(codes, absmax, code, 256, torch.float32)
    # The CPU rounds to 65,536 steps first, as bitsandbytes does: entries closer to zero than a step fall together.
    error = (values - code).abs().max()
    assert error <= (2 / 65535 if device == "cpu" else 0.0)


def test_a_nan_stays_in_its_block(device: str) -> None:
    A, code = weights((4, 64), torch.float32, device), dynamic_map(torch.device(device))
    A[1, 3] = float("nan")
    codes, absmax = OPS.quantize_blockwise(A, code, 64)
    assert absmax.isnan().tolist() == [False, True, False, False]
    values = OPS.dequantize_blockwise(codes, absmax, code, 64, torch.float32)
    assert values[1].isnan().all() and values[[0, 2, 3]].isfinite().all()


def test_nothing_gives_nothing(device: str) -> None:
    A, code = torch.empty(0, 3, device=device), dynamic_map(torch.device(device))
    codes, absmax = OPS.quantize_blockwise(A, code, 64)
    assert codes.shape == (0, 3) and absmax.shape == (0,)
    assert OPS.dequantize_blockwise(codes, absmax, code, 64, torch.float16).shape == (0, 3)


def test_cost_counts_values_codes_and_scales() -> None:
    assert cost(numel=512, blocksize=256) == (512 * 5 + 8, 1024)
