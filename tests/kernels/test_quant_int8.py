"""The row-wise int8 op below `functional`, whose tests compare its codes with bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from onegpu.kernels import quant_int8
from onegpu.kernels.quant_int8 import cost, dequantize_rows
from tests.matrices import FLOATS, activations
from tests.memory import peak_bytes

OPS = torch.ops.onegpu
MIB = 1 << 20


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_opcheck(device: str, threshold: float) -> None:
    A = activations((3, 5, 64), torch.float16, device)
    torch.library.opcheck(OPS.int8_vectorwise_quant.default, (A, threshold))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_codes_are_by_the_formula(device: str, dtype: torch.dtype, threshold: float) -> None:
    A = activations((7, 9, 48), dtype, device)
    codes, absmax, mask = OPS.int8_vectorwise_quant(A, threshold)
    rows = A.view(63, 48)
    outliers = rows.abs() >= threshold if threshold else torch.zeros_like(rows, dtype=torch.bool)
    assert torch.equal(mask, outliers.any(dim=0)) and bool(mask.any()) == bool(threshold)
    wanted_max = rows.masked_fill(outliers, 0).abs().amax(dim=1).float()
    assert torch.equal(absmax, wanted_max)
    wanted = (rows.double() * 127 / wanted_max[:, None].double()).masked_fill(mask, 0)
    assert codes.shape == A.shape and (codes.view(63, 48) - wanted).abs().max() < 0.5001
    assert codes.view(63, 48)[:, mask].count_nonzero() == 0


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_slabs_change_nothing(device: str, monkeypatch: pytest.MonkeyPatch, threshold: float) -> None:
    A = activations((113, 203), torch.float16, device)
    wanted = OPS.int8_vectorwise_quant(A, threshold)
    monkeypatch.setattr(quant_int8, "_SLAB", 1000)
    for ours, whole in zip(OPS.int8_vectorwise_quant(A, threshold), wanted, strict=True):
        assert torch.equal(ours, whole)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_quantising_takes_64_mib_beside_input_and_output(device: str, threshold: float) -> None:
    A = torch.randn(4096, 4096, device=device).half()
    extra = peak_bytes(device, lambda: OPS.int8_vectorwise_quant(A, threshold)) - A.numel()
    assert extra < 64 * MIB, f"{extra / MIB:.0f} MiB"


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_nan_and_infinity_stay_visible_in_their_row(device: str, threshold: float) -> None:
    A = activations((4, 64), torch.float16, device)
    A[1, 5], A[2, 6] = float("nan"), float("inf")
    codes, absmax, mask = OPS.int8_vectorwise_quant(A, threshold)
    assert absmax[[0, 3]].isfinite().all() and absmax[1].isnan()
    # With a threshold an infinity is an outlier: its column is multiplied in full precision.
    assert bool(mask[6]) if threshold else bool(absmax[2].isinf())
    assert codes[0].count_nonzero() > 10


def test_a_row_of_zeros_has_codes_of_zero(device: str) -> None:
    A = torch.zeros(3, 16, dtype=torch.float16, device=device)
    A[1] = 1
    codes, absmax, _ = OPS.int8_vectorwise_quant(A, 0.0)
    assert absmax.tolist() == [0, 1, 0] and codes.sum(dim=1).tolist() == [0, 127 * 16, 0]
    assert dequantize_rows(codes, absmax, torch.float32).tolist() == A.tolist()


def test_no_rows(device: str) -> None:
    codes, absmax, mask = OPS.int8_vectorwise_quant(torch.empty(0, 16, dtype=torch.float16, device=device), 6.0)
    assert codes.shape == (0, 16) and absmax.shape == (0,) and not mask.any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_dequantise_by_the_formula(device: str, dtype: torch.dtype) -> None:
    codes = torch.randint(-127, 128, (2, 5, 16), dtype=torch.int8, device=device)
    absmax = torch.rand(2, 5, device=device)
    values = dequantize_rows(codes, absmax, dtype)
    wanted = codes.double() * absmax[..., None].double() / 127
    assert values.dtype == dtype and (values - wanted).abs().max() <= torch.finfo(dtype).eps
    assert dequantize_rows(codes[0, 0], absmax[0, 0], dtype).tolist() == values[0, 0].tolist()


def test_cost_counts_values_codes_and_scales() -> None:
    assert cost(rows=4, columns=16, itemsize=2) == (4 * 16 * 3 + 16, 128)
