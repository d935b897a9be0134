"""Inputs of our ops follow autocast as those of `F.linear` do."""

from __future__ import annotations

import pytest
import torch

from onegpu.kernels.autocast import autocast_input
from tests.matrices import FLOATS


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_are_cast_where_autocast_is_on(device: str, dtype: torch.dtype) -> None:
    x = torch.ones(2, 3, dtype=dtype, device=device)
    assert autocast_input(x) is x
    for target in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype=target):
            assert autocast_input(x).dtype == target
            with torch.autocast(device, enabled=False):
                assert autocast_input(x) is x


def test_integers_and_other_devices_are_left_alone(device: str) -> None:
    codes, elsewhere = torch.ones(3, dtype=torch.int8, device=device), torch.ones(3, device="meta")
    with torch.autocast(device, dtype=torch.bfloat16):
        assert autocast_input(codes) is codes
        assert autocast_input(elsewhere) is elsewhere


def test_gradients_pass_the_cast(device: str) -> None:
    x = torch.ones(3, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        autocast_input(x).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32 and x.grad.eq(1).all()
