"""The Hopper forward compiles within the limits of a block; that it is right is shown in test_attention.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.triton_tools import needs_triton, spills

HOPPER_SHARED = 227 * 1024


def meta_descriptor(rows: int, d: int) -> Any:
    from onegpu.kernels.attention_hopper import descriptor

    return descriptor(torch.zeros(2, 256, 2, d, dtype=torch.bfloat16), rows)


def compile_gluon(kernel: Any, descriptors: list[Any], **constants: Any) -> Any:
    """A Gluon kernel for sm_90, told what its pointers and numbers are by their names."""
    from onegpu.kernels.triton_kernel import TritonKernel

    pointers = {"p_o": torch.bfloat16, "p_dk": torch.bfloat16, "p_dv": torch.bfloat16}
    args: list[Any] = []
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            continue
        if name.endswith("_desc"):
            args.append(descriptors.pop(0))
        elif name.startswith("p_"):
            kind = torch.float32 if name in ("p_lse", "p_sum") else pointers.get(name, torch.int32)
            args.append(torch.zeros(64, dtype=kind))
        else:
            args.append(1.5 if name.startswith("scale") else 2)
    return TritonKernel(kernel).compile(90, tuple(args), {**constants, "num_warps": 4})[0]


@needs_triton
@pytest.mark.parametrize(
    ("d", "options"),
    [
        (128, {}),
        (128, {"DRAW": False, "ROTATE": 1, "HALF": 1}),
        (128, {"RQ": 1, "RK": 1, "ALIGNED": False}),
        (64, {"RQ": 2, "RK": 2, "ALIGNED": False, "LEFT": True}),
        (256, {"BN": 64, "ALIAS": True, "RIGHT": False}),
    ],
)
def test_compiles_within_the_limits(d: int, options: dict[str, Any]) -> None:
    made = compile_forward(d, **options)
    assert made.metadata.shared <= HOPPER_SHARED
    assert spills(made) <= 512  # outside the loop over whole blocks


def compile_forward(d: int, **options: Any) -> Any:
    from onegpu.kernels import attention_sm90

    constants = {"HEAD": d, "BN": 128, "ST": 2, "LEFT": False, "RIGHT": True, "ALIGNED": True}
    constants |= {
        "WIDE": False,
        "RQ": 0,
        "RK": 0,
        "DRAW": True,
        "ROTATE": 0,
        "ALIAS": False,
        "AHEAD": False,
        "HALF": 0,
    }
    constants |= options
    bn = constants["BN"]
    descriptors = [meta_descriptor(rows, d) for rows in (64, bn, bn, 64)]
    return compile_gluon(attention_sm90.forward_kernel, descriptors, **constants)
