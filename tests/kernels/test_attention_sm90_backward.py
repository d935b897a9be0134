"""The Hopper backward compiles within the limits of a block; that it is right is shown in test_attention.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.test_attention_sm90 import HOPPER_SHARED, compile_gluon, meta_descriptor
from tests.triton_tools import needs_triton, spills


@needs_triton
@pytest.mark.parametrize(
    ("d", "options"),
    [
        (128, {}),
        (64, {"RQ": 2, "RK": 2, "EVEN": False, "SWAP": True, "SPLIT": True}),
        (128, {"DRAW": 2, "ORDER": True, "SWAP": True}),
    ],
)
def test_compiles_within_the_limits(d: int, options: dict[str, Any]) -> None:
    from onegpu.kernels import attention_hopper, attention_sm90_backward

    m = 8192 // d
    constants = {"HEAD": d, "HEAD_V": d, "ST": 2, "LEFT": False, "RIGHT": True, "EVEN": True, "RQ": 0, "RK": 0}
    constants |= {"DRAW": 1, "SWAP": False, "SPLIT": False, "ORDER": False} | options
    descriptors = [meta_descriptor(rows, d) for rows in (m, 64, 64, m, 64, 64)]
    descriptors += attention_hopper.scratch(torch.zeros(2, 2 * m), torch.zeros(2 * m, d))
    made = compile_gluon(attention_sm90_backward.backward_kernel, descriptors, **constants)
    assert made.metadata.shared <= HOPPER_SHARED
    assert spills(made) <= 2048
