"""Value tables for blockwise quantisation: bitsandbytes' own, where it has them in order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onegpu import functional as F
from onegpu.kernels.codebooks import codebook_4bit
from tests.oracle import Oracle

THEIRS = "result = getattr(bnb.functional, name)(*arguments)"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *[("create_linear_map", (True, bits)) for bits in range(2, 9)],
        ("create_linear_map", (True, 8, False)),
        ("create_linear_map", (False, 8)),
        *[("create_dynamic_map", (True, bits, bits)) for bits in range(2, 9)],
        *[("create_dynamic_map", (True, exponent, 8)) for exponent in range(3, 8)],
        *[("create_dynamic_map", (False, bits - 1, bits)) for bits in range(2, 9)],
        *[("create_fp8_map", (True, exponent, 7 - exponent)) for exponent in range(1, 7)],
        ("create_fp8_map", (False, 4, 4)),
        ("create_fp8_map", (True, 2, 1, 4)),
        ("create_fp8_map", (True, 1, 0, 2)),
    ],
)
def test_tables_are_bitsandbytes(bitsandbytes: Oracle, name: str, arguments: tuple[Any, ...]) -> None:
    ours, theirs = getattr(F, name)(*arguments), bitsandbytes.run(THEIRS, name=name, arguments=list(arguments))
    assert ours.dtype == torch.float32 and ours.shape == (256,)
    if name == "create_linear_map":  # theirs misses zero by 3e-8, and so is out of order there
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    else:
        assert torch.equal(ours, theirs)  # which calls the two zeros the same: theirs has some minus zeros
    assert ours.diff().ge(0).all()


def test_the_normal_map_holds_nf4() -> None:
    table = F.create_normal_map()
    values = torch.cat((table[:8], table[-8:]))
    torch.testing.assert_close(values, codebook_4bit("nf4", torch.device("cpu")), rtol=0, atol=1e-6)
    assert table[8:-8].count_nonzero() == 0
    even = F.create_normal_map(use_extra_value=False)
    assert torch.equal(even, -even.flip(0)) and even.count_nonzero() == 14


def test_a_changed_table_stays_the_callers() -> None:
    F.create_dynamic_map()[0] = 5.0
    assert F.create_dynamic_map()[0] < 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.create_linear_map(True, 9), "total_bits=9 .*2 to 8"),
        (lambda: F.create_dynamic_map(True, 9, 8), "max_exponent_bits=9 .*1 to 7"),
        (lambda: F.create_dynamic_map(False, 8, 8), "max_exponent_bits=8"),
        (lambda: F.create_fp8_map(True, 5, 3), "total_bits=8 is not the sum"),
        (lambda: F.create_normal_map(1.5), "offset=1.5"),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
