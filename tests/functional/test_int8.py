"""Row-wise int8 is bitsandbytes', and the steps of LLM.int8() fit together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onegpu import functional as F
from tests.matrices import activations, weights
from tests.oracle import Oracle


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (63, 1), (113, 203), (5, 64)])
def test_int8_is_bitsandbytes(bitsandbytes: Oracle, device: str, shape: tuple[int, int], threshold: float) -> None:
    A = activations(shape, torch.float16, device)
    if shape[0] > 4:
        A[2] = 0
    theirs = bitsandbytes.run(
        """
        codes, absmax, columns = bnb.functional.int8_vectorwise_quant(A.to(device), threshold)
        result = [codes.cpu(), absmax.cpu(), None if columns is None else columns.cpu()]
        """,
        A=A.cpu(),
        device=device,
        threshold=threshold,
    )
    codes, absmax, columns = F.int8_vectorwise_quant(A, threshold)
    assert torch.equal(codes.cpu(), theirs[0]) and torch.equal(absmax.cpu(), theirs[1])
    assert (columns is None) == (theirs[2] is None)
    if columns is not None:
        assert columns.tolist() == theirs[2].tolist()
        assert shape != (113, 203) or columns.numel() > 5, "the input has no outliers: this tests nothing"
        assert codes[:, columns].count_nonzero() == 0


def test_int8_dequantises_to_half_a_step(device: str) -> None:
    A = weights((113, 203), torch.float16, device)
    codes, absmax, _ = F.int8_vectorwise_quant(A)
    error = (F.int8_vectorwise_dequant(codes, absmax) - A).abs().amax(dim=1)
    assert error.le(absmax / 254 * 1.01).all() and codes.abs().amax(dim=1).eq(127).all()


@pytest.mark.parametrize(("m", "n", "k"), [(3, 5, 7), (1, 1, 1), (24, 16, 64), (5, 9, 3001)])
def test_the_integer_product_is_exact(device: str, m: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (rows, k), generator=generator, dtype=torch.int8) for rows in (m, n))
    a[0], b[0] = 127, 127  # 3001 such products are past what float32 holds exactly
    wanted = a.double() @ b.double().t()
    got = F.int8_linear_matmul(a.to(device), b.to(device))
    assert got.dtype == torch.int32 and torch.equal(got.cpu().double(), wanted)
    out = torch.empty(1, m, n, dtype=torch.int32, device=device)
    assert F.int8_linear_matmul(a[None].to(device), b.to(device), out=out) is out and torch.equal(out[0], got)


def test_the_slices_of_a_long_product_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.full((2, 3001), 127, dtype=torch.int8), torch.full((3, 3001), -127, dtype=torch.int8)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert F.int8_linear_matmul(a, b).unique().item() == -3001 * 127 * 127


def test_a_product_scaled_back_is_the_product_of_the_scaled(device: str) -> None:
    A, B = weights((5, 64), torch.float16, device), weights((24, 64), torch.float16, device, seed=1)
    bias = torch.ones(24, dtype=torch.float16, device=device)
    (a, row, _), (b, col, _) = F.int8_vectorwise_quant(A), F.int8_vectorwise_quant(B)
    got = F.int8_mm_dequant(F.int8_linear_matmul(a, b), row, col, bias=bias)
    wanted = F.int8_vectorwise_dequant(a, row) @ F.int8_vectorwise_dequant(b, col).t() + 1
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), wanted, rtol=1e-3, atol=1e-3)
    out = torch.empty_like(got)
    assert F.int8_mm_dequant(F.int8_linear_matmul(a, b), row[:, None], col[:, None], out, bias) is out
    assert torch.equal(out, got)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_double_quant_is_both_ways_by_themselves(device: str, threshold: float) -> None:
    """By hand: bitsandbytes has it on a GPU only."""
    A = activations((113, 203), torch.float16, device)
    by_row, by_column, row, column, outliers = F.int8_double_quant(A, threshold=threshold)
    codes, maxima, columns = F.int8_vectorwise_quant(A, threshold)
    assert torch.equal(by_row, codes) and torch.equal(row, maxima)
    assert outliers is columns is None or torch.equal(outliers, columns)
    inliers = A if threshold == 0 else A.where(A.abs() < threshold, 0)
    assert torch.equal(column, inliers.abs().amax(dim=0).float())
    assert by_column.is_contiguous() and torch.equal(by_column, (inliers * (127.0 / column)).round().char())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda A: F.int8_vectorwise_quant(A, -1.0), "threshold=-1.0"),
        (lambda A: F.int8_linear_matmul(A, A.char()), "A.dtype=torch.float32"),
        (lambda A: F.int8_linear_matmul(A.char(), A[:, :3].char()), r"B.shape=\(64, 3\)"),
        (lambda A: F.int8_double_quant(A, out_row=A), "out_row: .*leave it out"),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(64, 64))
