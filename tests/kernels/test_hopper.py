"""The pieces of the Hopper kernels, each in a kernel of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from onegpu.kernels.launch import triton_launch
from onegpu.kernels.triton_kernel import TritonKernel
from tests.triton_tools import needs_triton


def kernels() -> Any:
    from tests.kernels import hopper_kernels

    return hopper_kernels


@needs_triton
def test_pieces_compile() -> None:
    x = torch.zeros(64, 128, dtype=torch.float16)
    made, _ = TritonKernel(kernels().cleared).compile(90, (x, x, 37), {"num_warps": 4})
    assert "fence.proxy.async" in made.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("n", [-5, 0, 1, 16, 37, 64, 70])
def test_cleared_rows(n: int) -> None:
    x = torch.randn(64, 128, device="cuda").half()
    x[max(n, 0) :] = math.nan
    y = torch.empty_like(x)
    triton_launch(kernels().cleared, (1,), x, y, n, num_warps=4)
    assert torch.equal(y[: max(n, 0)], x[: max(n, 0)]) and not y[max(n, 0) :].any()
