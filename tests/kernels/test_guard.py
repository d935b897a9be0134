"""What a launch asks of torch; rule (g) of DESIGN.md, "Launching"."""

from __future__ import annotations

import pytest
import torch

from onegpu.kernels.launch import aligned


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(8, 16), True),
        (torch.zeros(8, 16).t(), True),
        (torch.zeros(129)[1:], False),  # base
        (torch.zeros(129)[4:], True),
        (torch.zeros(8, 17)[:, :16], False),  # row stride
        (torch.zeros(8, 20, dtype=torch.float16)[:, :16], False),
        (torch.zeros(8, 24, dtype=torch.float16)[:, :16], True),
        (torch.zeros(1, 16).expand(8, 16), False),  # stride 0
        (torch.zeros(1, 17)[:, :16], True),  # one row has no row stride
        (torch.zeros(0, 16), True),
    ],
)
def test_g_what_may_be_read_16_bytes_at_once(tensor: torch.Tensor, expected: bool) -> None:
    assert aligned(tensor) is expected
    assert aligned(torch.zeros(4), None, tensor) is expected
