"""The Hopper forward for few tiles: within half a processor's limits, and the bits of the kernel for many."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onegpu.kernels.attention import attention
from tests.kernels.test_attention import inputs, int32
from tests.kernels.test_attention_sm90 import HOPPER_SHARED, compile_gluon, meta_descriptor
from tests.triton_tools import needs_triton, spills


def compile_few(d: int, d_v: int, left: bool) -> Any:
    from onegpu.kernels import attention_sm90_few

    bn = 64 if max(d, d_v) > 128 else 128
    boxes = [meta_descriptor(rows, width) for rows, width in ((64, d), (bn, d), (bn, d_v), (64, d_v))]
    return compile_gluon(attention_sm90_few.few_kernel, boxes, LEFT=left)


@needs_triton
@pytest.mark.parametrize(
    ("d", "d_v", "left"), [(128, 128, False), (64, 64, True), (256, 256, True), (256, 64, False), (128, 256, False)]
)
def test_compiles_without_spills_to_a_third_of_the_code(d: int, d_v: int, left: bool) -> None:
    """What it is for: the PTX of the kernel for many tiles has 350 KB. Two blocks of it share a processor."""
    made = compile_few(d, d_v, left)
    assert 2 * made.metadata.shared <= HOPPER_SHARED and not spills(made)
    assert len(made.asm["ptx"]) < 120_000


_CAUSAL, _WINDOW = {"causal": True}, {"causal": True, "window": (200, -1)}
_ALL: list[dict[str, Any]] = [_CAUSAL, {}, {"window": (100, -1)}, _WINDOW]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("d", "d_v", "dtype", "mask"),
    [
        *((64, 64, torch.float16, mask) for mask in _ALL),
        *((128, 128, torch.bfloat16, mask) for mask in _ALL),
        (256, 256, torch.bfloat16, _CAUSAL),
        (256, 256, torch.bfloat16, _WINDOW),
        (72, 136, torch.bfloat16, _CAUSAL),
    ],
)
def test_a_sequence_alone_has_the_bits_that_it_has_among_many_on_gpu(
    d: int, d_v: int, dtype: torch.dtype, mask: dict[str, Any]
) -> None:
    """Among so many that each processor has several tiles, and packed: both are the other kernel's."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Hopper's")
    options: dict[str, Any] = {"implementation": "hopper", "return_lse": True, **mask}
    lengths = [(128, 128), (1, 300), (1, 1), (100, 100), (300, 300), (1000, 1000), (200, 713), (60, 124), (300, 90)]
    for s_q, s_k in lengths:
        q, k, v = inputs(s_q, s_k, 6, 2, d, d_v, device="cuda", dtype=dtype)
        out, lse = attention(q, k, v, **options)
        for _ in range(5):
            assert all(map(torch.equal, attention(q, k, v, **options), (out, lse))), (s_q, s_k)
        ends = [int32(0, n, 2 * n, device="cuda") for n in (s_q, s_k)]
        packed = [x.flatten(0, 1) for x in (q, k, v)]
        out_packed, lse_packed = attention(*packed, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], **options)
        assert torch.equal(out_packed.view(out.shape), out), (s_q, s_k)
        assert torch.equal(lse_packed, lse.transpose(0, 1).flatten(1)), (s_q, s_k)
        if (s_q, s_k) in ((300, 300), (200, 713)):  # more would only compile more
            many = [x.repeat(23, 1, 1, 1) for x in (q, k, v)]
            out_many, lse_many = attention(*many, **options)
            assert torch.equal(out_many, out.repeat(23, 1, 1, 1)), (s_q, s_k)
            assert torch.equal(lse_many, lse.repeat(23, 1, 1)), (s_q, s_k)
