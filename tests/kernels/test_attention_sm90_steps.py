"""The steps of the Hopper forward: what each variant of them compiles to, and that all of them give the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onegpu.kernels.attention import attention
from tests.kernels.test_attention import check_on_gpu, inputs, int32
from tests.kernels.test_attention_sm90 import HOPPER_SHARED, compile_forward
from tests.triton_tools import needs_triton, spills


@needs_triton
@pytest.mark.parametrize(
    ("d", "options"),
    [
        (64, {"ST": 3, "RIGHT": False}),
        (64, {"ST": 4, "AHEAD": True}),
        (64, {"ST": 3, "AHEAD": True, "RIGHT": False}),
        (64, {"ST": 4, "HALF": 1}),
        (128, {"HALF": 2}),
        (128, {"HALF": 1, "LEFT": True, "WIDE": True}),
    ],
)
def test_steps_keep_their_sums_in_registers(d: int, options: dict[str, Any]) -> None:
    made = compile_forward(d, **options)
    assert made.metadata.shared <= HOPPER_SHARED
    assert spills(made) <= (256 if "LEFT" in options else 0 if d == 64 else 64)


@needs_triton
@pytest.mark.parametrize("options", [{"ST": 2}, {"ST": 3, "LEFT": True}, {"ST": 3, "ALIGNED": False}])
def test_s_ahead_is_not_for_every_mask(options: dict[str, Any]) -> None:
    """Two stages would wait forever, masks past the first block are not in its steps."""
    from triton.compiler.errors import CompilationError

    with pytest.raises(CompilationError) as raised:
        compile_forward(64, AHEAD=True, **options)
    causes: list[BaseException] = [raised.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert "three stages" in str(causes[-1])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("d", "dtype", "lengths", "heads", "mask"),
    [
        (64, torch.bfloat16, [(4096, 4096), (384, 384), (1024, 1024)], 64, {"causal": True}),  # ahead, half, half
        (64, torch.float16, [(1024, 1024), (1280, 1280)], 20, {}),  # ahead
        (128, torch.bfloat16, [(1024, 1024), (448, 1024), (1024, 448), (512, 512)], 40, {"causal": True}),  # half 1, 2
        (128, torch.float16, [(512, 512)], 250, {"causal": True}),  # half, and dealt out beforehand
    ],
)
def test_the_same_bits_whatever_the_steps_on_gpu(
    d: int, dtype: torch.dtype, lengths: list[tuple[int, int]], heads: int, mask: dict[str, Any]
) -> None:
    """Dense rows, whose first block may be half of one and whose S may be ahead, and packed ones, where neither is."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Hopper's")
    options: dict[str, Any] = {"implementation": "hopper", "return_lse": True, **mask}
    for s_q, s_k in lengths:
        tensors = inputs(s_q, s_k, heads, heads, d, d, device="cuda", dtype=dtype)
        ends = [int32(0, n, 2 * n, device="cuda") for n in (s_q, s_k)]
        out, lse = attention(*tensors, **options)
        packed = [x.flatten(0, 1) for x in tensors]
        out_packed, lse_packed = attention(*packed, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], **options)
        assert torch.equal(out_packed.view(out.shape), out), (s_q, s_k)
        assert torch.equal(lse_packed, lse.transpose(0, 1).flatten(1)), (s_q, s_k)
        for _ in range(5):
            assert all(map(torch.equal, attention(*tensors, **options), (out, lse))), (s_q, s_k)
        few = [x[:1, :, :4] for x in tensors]  # of all heads, what float64 has the memory for
        whole = attention(*few, **options)[0]
        assert torch.equal(whole, out[:1, :, :4]), (s_q, s_k)
        check_on_gpu(*few, "hopper", gradients=False, **mask)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dims", "mask"), [((128, 128), {"causal": True, "window": (300, -1)}), ((192, 128), {"causal": True})]
)
def test_half_a_block_in_windows_and_wide_queries_on_gpu(dims: tuple[int, int], mask: dict[str, Any]) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Hopper's")
    for s_q, s_k in ((1024, 1024), (448, 1024), (700, 700)):
        tensors = inputs(s_q, s_k, 40, 40, *dims, batch=1, device="cuda", dtype=torch.bfloat16)
        check_on_gpu(*tensors, "hopper", gradients=False, **mask)
