"""PyTorch's flash attention in the place of the definition on a CPU: the same answers, gradients and edges."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from onegpu.kernels import attention_cpu
from onegpu.kernels.attention import attention
from tests.compare import assert_close

MASKS: list[dict[str, Any]] = [{}, {"causal": True}, {"window": (9, 3)}, {"causal": True, "window": (5, -1)}]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(n: int, m: int, d_v: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, n, 8, 16), (2, m, 2, 16), (2, m, 2, d_v))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def by_pytorch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: Any, mask: dict[str, Any]) -> torch.Tensor:
    """Row by row, the matrix of scores and all, in the dtype of the inputs."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    left, right = mask.get("window", (-1, -1))
    right = 0 if mask.get("causal") else right
    for b, ((first, n), (begin, m)) in enumerate(ranges):
        distance = torch.arange(m) - torch.arange(m - n, m)[:, None]
        seen = (distance >= -left if left >= 0 else distance == distance) & (distance <= (right if right >= 0 else m))
        row = (q[b : b + 1, first : first + n], k[b : b + 1, begin : begin + m], v[b : b + 1, begin : begin + m])
        with sdpa_kernel(SDPBackend.MATH):
            turned = (x.transpose(1, 2) for x in row)
            answer = torch.nn.functional.scaled_dot_product_attention(*turned, attn_mask=seen, enable_gqa=True)
        out[b, first : first + n] = answer[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("n", "m", "d_v"), [(40, 40, 16), (17, 64, 8), (1, 64, 16)])
def test_it_is_the_definition(n: int, m: int, d_v: int, mask: dict[str, Any], dtype: torch.dtype) -> None:
    ranges = [((0, n), (0, m)), ((n // 5, n - n // 5), (m - 32, 32))]
    q_range, k_range = (torch.tensor([row[i] for row in ranges], dtype=torch.int32) for i in (0, 1))
    given = {"q_range": q_range, "k_range": k_range, "return_lse": True, **mask}
    tensors = inputs(n, m, d_v, dtype)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    with mock.patch.object(attention_cpu, "forward", wraps=attention_cpu.forward) as flash:
        out, lse = attention(*tensors, **given)
        assert flash.call_count == 2
        expected, expected_lse = attention(*wide, implementation="definition", **given)
        assert flash.call_count == 2
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=2e-4)  # a fast exp in 16 bits
    other = by_pytorch(*tensors, ranges, mask)
    assert_close(out, expected, other)
    upstream = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    sides = ((out, tensors), (expected, wide), (other, tensors))
    for ours, reference, reordered in zip(
        *(torch.autograd.grad(x, y, upstream.to(x.dtype)) for x, y in sides), strict=True
    ):
        assert_close(ours, reference, reordered)


@pytest.mark.parametrize("case", ["NaN", "more queries than keys", "wide values", "no keys"])
def test_what_it_would_answer_otherwise_is_left_to_the_definition(case: str) -> None:
    tensors = inputs(
        8, 5 if case == "more queries than keys" else 8, 24 if case == "wide values" else 16, torch.float32
    )
    q, k, v = (x.detach() for x in tensors)
    if case == "NaN":
        q[:, 0] = float("nan")
    if case == "no keys":
        k, v = k[:, :0], v[:, :0]
    with mock.patch.object(attention_cpu, "forward") as flash:
        out = attention(q, k, v, causal=True)
    assert not flash.called
    assert torch.equal(out.nan_to_num(7), attention(q, k, v, causal=True, implementation="definition").nan_to_num(7))


def test_the_matrix_of_scores_is_not_made() -> None:
    q, k, v = (torch.randn(1, 4096, 4, 16, requires_grad=True) for _ in range(3))
    with torch.profiler.profile(profile_memory=True) as trace:
        attention(q, k, v, causal=True).sum().backward()
    largest = max(abs(event.cpu_memory_usage) for event in trace.events())
    assert largest < 4096 * 4096  # a quarter of one head's matrix


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_head_dim_that_is_not_side_by_side(which: int) -> None:
    tensors = [torch.randn(1, 9, 2, 8) for _ in range(3)]
    expected = attention(*tensors, causal=True)
    tensors[which] = torch.stack((tensors[which], torch.randn(1, 9, 2, 8)), -1)[..., 0]
    torch.testing.assert_close(attention(*tensors, causal=True), expected)
