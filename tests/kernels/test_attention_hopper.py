"""What the Hopper attention takes, and its descriptors; that it is right is shown in test_attention.py."""

from __future__ import annotations

import pytest
import torch

from tests.triton_tools import needs_triton


@needs_triton
def test_descriptors_see_any_strides() -> None:
    from onegpu.kernels.attention_hopper import descriptor

    x = torch.zeros(3, 4, 50, 96, dtype=torch.float16).transpose(1, 2)  # memory: batch, head, row
    made = descriptor(x, 64)
    assert (made.shape, made.strides) == ([3, 4, 50, 96], [19200, 4800, 96, 1])
    assert made.block_shape == [1, 1, 64, 128] and made.base is x
    packed = descriptor(torch.zeros(70, 2, 64, dtype=torch.float16), 128)
    assert (packed.shape, packed.strides, packed.block_shape) == ([1, 2, 70, 64], [8, 64, 128, 1], [1, 1, 128, 64])


@needs_triton
@pytest.mark.parametrize("case", ["turned", "sliced", "odd base", "short rows", "stride 0", "one row"])
def test_what_tma_takes(case: str) -> None:
    from onegpu.kernels.attention_hopper import _for_tma

    x = torch.zeros(2, 6, 4, 64, dtype=torch.bfloat16)
    tensor, taken = {
        "turned": (x.transpose(1, 2), True),
        "sliced": (x[:, :, 1:3], True),
        "odd base": (torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape), False),
        "short rows": (torch.zeros(2, 6, 4, 60, dtype=x.dtype), False),
        "stride 0": (x[:, :1].expand(2, 6, 4, 64), False),
        "one row": (torch.zeros(1, 1, 1, 64, dtype=x.dtype).as_strided((1, 1, 1, 64), (3, 3, 3, 1)), True),
    }[case]
    assert _for_tma(tensor) is taken


@needs_triton
def test_serves_nothing_elsewhere() -> None:
    from onegpu.kernels.attention_hopper import boxed, serves

    assert [boxed(d) for d in (33, 64, 72, 128, 160, 256)] == [64, 64, 128, 128, 256, 256]
    assert not serves(*(torch.zeros(1, 8, 2, 64) for _ in range(3)))


@needs_triton
def test_short_sequences_are_dealt_out() -> None:
    from onegpu.kernels.attention_hopper import _dense

    dealt = {"DRAW": False}
    assert _dense(128, True, True, 4, 512, 132) == (dealt | {"ROTATE": 1}, 33)
    assert _dense(128, True, True, 1, 512, 132) == (dealt | {"ROTATE": 0}, 512)
    assert _dense(64, False, True, 4, 64, 132) == (dealt | {"ROTATE": 0}, 64)
    assert _dense(128, True, True, 8, 64, 132) == ({}, 16)
    assert _dense(64, True, True, 32, 8, 132) == ({"ST": 3}, 8)
    assert _dense(256, True, True, 4, 8, 132) == _dense(128, True, False, 4, 8, 132) == ({}, 8)  # not measured
