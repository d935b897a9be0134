"""Attention: the definition against sums written out, its gradients, and every kernel against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from onegpu.errors import ArgumentError
from onegpu.kernels.attention import attention, cost

SHAPES = [(5, 7, 4, 2, 8, 8), (7, 5, 2, 2, 8, 6), (1, 1, 3, 1, 4, 4), (6, 6, 4, 1, 6, 10)]  # S_q, S_k, H, H_kv, D, D_v
MASKS: list[dict[str, Any]] = [{}, {"causal": True}, {"window": (2, 1)}, {"causal": True, "window": (1, -1)}]


def inputs(
    s_q: int, s_k: int, heads: int, heads_kv: int, d: int, d_v: int, batch: int = 2, **options: Any
) -> tuple[torch.Tensor, ...]:
    shapes = (batch, s_q, heads, d), (batch, s_k, heads_kv, d), (batch, s_k, heads_kv, d_v)
    return tuple(torch.randn(shape, **options) for shape in shapes)


def int32(*values: Any, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def naive(q, k, v, causal=False, window=(-1, -1), ranges=None):
    """Row by row, key by key: (out, lse) of padded batches in float64."""
    q, k, v = q.double(), k.double(), v.double()
    batch, s_q, heads, d = q.shape
    out, lse = torch.zeros(batch, s_q, heads, v.shape[-1]).double(), torch.full((batch, heads, s_q), -math.inf).double()
    group = heads // k.shape[2]
    for b in range(batch):
        (q0, n), (k0, m) = ranges[b] if ranges else ((0, s_q), (0, k.shape[1]))
        for i in range(n):
            at = i + m - n
            left = 0 if window[0] < 0 else at - window[0]
            right = m if window[1] < 0 else at + window[1]
            seen = [k0 + j for j in range(m) if left <= j <= (min(at, right) if causal else right)]
            for h in range(heads if seen else 0):
                scores = k[b, seen, h // group] @ q[b, q0 + i, h] / math.sqrt(d)
                lse[b, h, q0 + i] = scores.logsumexp(0)
                out[b, q0 + i, h] = scores.softmax(0) @ v[b, seen, h // group]
    return out, lse


RANGES = [((1, 3), (2, 4)), ((0, 4), (0, 1))]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_definition(shape: tuple[int, ...], mask: dict[str, Any]):
    q, k, v = inputs(*shape, dtype=torch.float64)
    out, lse = attention(q, k, v, return_lse=True, **mask)
    expected, expected_lse = naive(q, k, v, **mask)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("mask", MASKS)
def test_padding_is_not_read_and_packing_is_the_same(mask: dict[str, Any]):
    q, k, v = inputs(5, 7, 4, 2, 8, 6, dtype=torch.float64)
    expected, expected_lse = naive(q, k, v, ranges=RANGES, **mask)
    q_range, k_range = int32(*(r[0] for r in RANGES)), int32(*(r[1] for r in RANGES))
    for x, rows in ((q, q_range), (k, k_range), (v, k_range)):
        for b, (first, length) in enumerate(rows.tolist()):
            x[b, :first] = x[b, first + length :] = math.nan
    padded = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*padded, q_range=q_range, k_range=k_range, return_lse=True, **mask)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)

    def real(x: torch.Tensor, side: int) -> torch.Tensor:
        return torch.cat([x[b, r[side][0] : r[side][0] + r[side][1]] for b, r in enumerate(RANGES)])

    packed = [real(x.detach(), side).requires_grad_() for x, side in zip(padded, (0, 1, 1), strict=True)]
    out_packed = attention(*packed, cu_seqlens_q=int32(0, 3, 7), cu_seqlens_k=int32(0, 4, 5), **mask)
    torch.testing.assert_close(out_packed, real(out, 0))
    upstream = torch.randn_like(out)
    out.backward(upstream)
    out_packed.backward(real(upstream, 0))
    for x, y, side in zip(padded, packed, (0, 1, 1), strict=True):
        torch.testing.assert_close(real(x.grad, side), y.grad)
        assert x.grad.count_nonzero() == y.grad.count_nonzero()  # zeros, not NaN, in the padding


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_definition(shape: tuple[int, ...], mask: dict[str, Any]):
    tensors = inputs(*shape, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda *x: attention(*x, **mask), tensors, fast_mode=True)
    if "window" not in mask and shape[0] <= shape[1]:  # no empty rows: -inf has no difference quotient
        torch.autograd.gradcheck(lambda *x: attention(*x, return_lse=True, **mask)[1], tensors, fast_mode=True)


def test_opcheck():
    q, k, v = inputs(5, 7, 4, 2, 8, 6)
    options = (0.3, 2, 1, int32((0, 3), (1, 4)), None, None, None, 5, 7, "auto")
    out, lse = torch.ops.onegpu.attention_forward(q, k, v, *options)
    torch.library.opcheck(torch.ops.onegpu.attention_forward, (q, k, v, *options))
    arguments = (torch.randn_like(out), None, q, k, v, out, lse, False, *options)
    torch.library.opcheck(torch.ops.onegpu.attention_backward, arguments)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.library.opcheck(torch.ops.onegpu.attention_forward, (*turned, *options))


def test_empty():
    for s_q, s_k, batch in ((0, 3, 2), (3, 0, 2), (3, 3, 0)):
        q, k, v = inputs(s_q, s_k, 2, 1, 8, 4, batch=batch, requires_grad=True)
        out, lse = attention(q, k, v, return_lse=True)
        out.sum().backward()
        assert not out.any() and (lse == -math.inf).all() and q.grad.shape == q.shape


def test_nan_and_infinity_stay_visible():
    q, k, v = inputs(4, 4, 2, 2, 8, 8)
    q[0, 1, 0, 0] = math.nan
    v[1, 3] = math.inf
    out = attention(q, k, v, causal=True)
    assert out[0, 1, 0].isnan().all() and out[0, 2:].isfinite().all() and (out[1, 3] == math.inf).all()


def test_autocast_and_fp32():
    q, k, v = inputs(4, 4, 2, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v).dtype == torch.bfloat16
    assert attention(q, k, v).dtype == torch.float32


def test_torch_compile_keeps_one_graph():
    tensors = inputs(4, 6, 2, 2, 8, 8, requires_grad=True)
    expected = torch.autograd.grad(attention(*tensors, causal=True).square().sum(), tensors)
    compiled = torch.compile(lambda *x: attention(*x, causal=True), fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(*tensors).square().sum(), tensors), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 7, 3, 8)}, "does not divide"),
        ({"k": torch.zeros(2, 7, 2, 6)}, "does not fit q"),
        ({"v": torch.zeros(2, 6, 2, 6)}, "other rows or heads than k"),
        ({"v": torch.zeros(2, 7, 2, 6).half()}, "not the floating dtype"),
        ({"q": torch.zeros(5, 4, 8)}, "number of dimensions"),
        ({"cu_seqlens_q": int32(0, 5)}, "needed for packed"),
        ({"q_range": torch.zeros(2, 2)}, r"not int32 \[B, 2\]"),
        ({"implementation": "fast"}, "is not known"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str):
    q, k, v = inputs(5, 7, 4, 2, 8, 6)
    with pytest.raises(ArgumentError, match=message):
        attention(**({"q": q, "k": k, "v": v} | change))


def test_cost():
    assert cost(1, 4, 4, 2, 1, 8, 8, 2)[1] == 4 * 16 * 2 * 8
    assert cost(1, 4, 6, 1, 1, 8, 8, 2, causal=True)[1] == 4 * (3 + 4 + 5 + 6) * 8
    assert cost(1, 6, 4, 1, 1, 8, 8, 2, causal=True)[1] == 4 * (1 + 2 + 3 + 4) * 8
    assert cost(1, 4, 4, 2, 1, 8, 8, 2, backward=True)[1] == 2.5 * cost(1, 4, 4, 2, 1, 8, 8, 2)[1]
