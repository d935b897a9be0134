"""Attention: the definition against sums written out, its gradients, and every kernel against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from onegpu.errors import ArgumentError
from onegpu.kernels.attention import attention, cost
from tests.compare import assert_close
from tests.host_time import least

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
        ({"window": 3}, r"window=3 is not \(left, right\)"),
        ({"window": (-5, 0)}, r"window=\(-5, 0\) is not \(left, right\)"),
        ({"window": (1.5, 0)}, r"window=\(1.5, 0\) is not \(left, right\)"),
        ({"window": (None, 0)}, r"window=\(None, 0\) is not \(left, right\)"),
        ({"k": torch.zeros(2, 7, 2, 8, device="meta")}, "k='meta' is not the device of q, cpu"),
        ({"k_range": [[0, 3], [0, 3]]}, r"k_range=\[\[0, 3\], \[0, 3\]\] is not int32 \[B, 2\]"),
        ({"implementation": "fast"}, "is not known"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str):
    q, k, v = inputs(5, 7, 4, 2, 8, 6)
    with pytest.raises(ArgumentError, match=message):
        attention(**({"q": q, "k": k, "v": v} | change))


@pytest.mark.parametrize(
    ("ends_q", "ends_k", "message"),
    [
        (int32(0, 6, 4, 9), int32(0, 3, 6, 9), r"cu_seqlens_q=\[0, 6, 4, 9\] does not rise from 0 to at most 9"),
        (int32(0, 9), int32(0, 12), r"cu_seqlens_k=\[0, 12\] does not rise"),
        (int32(-3, 9), int32(0, 9), r"cu_seqlens_q=\[-3, 9\] does not rise"),
        (int32(0, 4, 9), int32(0, 9), "cu_seqlens_k=.* does not go with the 2 sequences of cu_seqlens_q"),
        (int32(), int32(), "cu_seqlens_q=.* is not an int32 vector"),
        ([0, 9], [0, 9], r"cu_seqlens_q=\[0, 9\] is not an int32 vector"),
    ],
)
def test_ends_that_are_none(ends_q: Any, ends_k: Any, message: str):
    q = torch.zeros(9, 2, 8)
    with pytest.raises(ArgumentError, match=message):
        attention(q, q, q, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k)


@pytest.mark.gpu
def test_ends_of_other_sequences_are_not_read_on_a_gpu():
    q = torch.zeros(9, 2, 64, dtype=torch.bfloat16, device="cuda")
    ends = int32(0, 4, 9).cuda()
    attention(q, q, q, cu_seqlens_q=ends, cu_seqlens_k=ends)
    with pytest.raises(ArgumentError, match="does not go with the 2 sequences of cu_seqlens_q"):
        attention(q, q, q, cu_seqlens_q=ends, cu_seqlens_k=ends[:2])


def test_cost():
    assert cost(1, 4, 4, 2, 1, 8, 8, 2)[1] == 4 * 16 * 2 * 8
    assert cost(1, 4, 6, 1, 1, 8, 8, 2, causal=True)[1] == 4 * (3 + 4 + 5 + 6) * 8
    assert cost(1, 6, 4, 1, 1, 8, 8, 2, causal=True)[1] == 4 * (1 + 2 + 3 + 4) * 8
    assert cost(1, 4, 4, 2, 1, 8, 8, 2, backward=True)[1] == 2.5 * cost(1, 4, 4, 2, 1, 8, 8, 2)[1]


# On a GPU: every kernel against PyTorch's own operations, in float64 and, in another order, in the dtype of the inputs.

IMPLEMENTATIONS = ["portable", None]


def plain(q, k, v, causal=False, window=(-1, -1)):
    """(B, S, H, D) in whatever dtype, through one matrix of scores; rows that see nothing give zeros."""
    group, (s_q, s_k) = q.shape[2] // k.shape[2], (q.shape[1], k.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    at = torch.arange(s_k, device=q.device) - torch.arange(s_k - s_q, s_k, device=q.device)[:, None]
    seen = torch.ones_like(at, dtype=torch.bool)
    if causal:
        seen &= at <= 0
    if window[0] >= 0:
        seen &= at >= -window[0]
    if window[1] >= 0:
        seen &= at <= window[1]
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    empty = ~seen.any(-1, keepdim=True)
    p = scores.masked_fill(~seen & ~empty, -math.inf).softmax(-1).masked_fill(empty, 0)
    return (p @ v).transpose(1, 2)


def check_on_gpu(q, k, v, implementation, gradients=True, deterministic=None, **mask):
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*tensors, implementation=implementation, deterministic=deterministic, **mask)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    other = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    reference, reordered = plain(*wide, **mask), plain(*other, **mask)
    assert_close(out, reference, reordered, what="out")
    if gradients:
        upstream = torch.randn_like(out)
        got = torch.autograd.grad(out, tensors, upstream)
        expected = torch.autograd.grad(reference, wide, upstream.double())
        allowed = torch.autograd.grad(reordered, other, upstream)
        for name, x, y, z in zip(("dq", "dk", "dv"), got, expected, allowed, strict=True):
            assert_close(x, y, z, what=name)
    return out


# Each kernel is compiled for a head dim, a dtype, a kind of window and more, which takes seconds: every value of each
# stands here, and only some of the combinations.
UNEVEN = [(113, 203), (1, 1), (203, 113), (1, 300), (300, 1)]
EVEN = [(1023, 1024), (256, 256), (64, 2048)]  # whole blocks of keys
BAND, SLIDING = {"window": (100, 7)}, {"causal": True, "window": (70, -1)}
_ALL_LENGTHS = [
    ("portable", 64, torch.float16, SLIDING, UNEVEN + EVEN),
    ("portable", 128, torch.bfloat16, {"causal": True}, UNEVEN + EVEN),
    (None, 64, torch.float16, BAND, UNEVEN),
    (None, 64, torch.bfloat16, {}, EVEN),
    (None, 128, torch.bfloat16, {"causal": True}, UNEVEN + EVEN),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("implementation", "d", "dtype", "mask", "all_lengths"), _ALL_LENGTHS)
def test_lengths_on_gpu(implementation, d, dtype, mask, all_lengths):
    for lengths in all_lengths:
        for heads, heads_kv in ((10, 10), (6, 2), (4, 1)) if d == 128 else ((2, 2), (6, 2)):  # 10: more than the blocks
            q, k, v = inputs(*lengths, heads, heads_kv, d, d, device="cuda", dtype=dtype)
            check_on_gpu(q, k, v, implementation, **mask)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("implementation", "dims", "dtype", "mask"),
    [
        ("portable", (8, 8), torch.bfloat16, BAND),
        ("portable", (59, 40), torch.float32, SLIDING),
        ("portable", (96, 96), torch.bfloat16, {"causal": True}),
        ("portable", (192, 128), torch.bfloat16, {}),
        ("portable", (192, 192), torch.bfloat16, SLIDING),
        (None, (72, 72), torch.bfloat16, {"causal": True}),
        (None, (112, 112), torch.float16, SLIDING),
        (None, (192, 128), torch.bfloat16, {"causal": True}),  # DeepSeek's
        (None, (64, 128), torch.bfloat16, BAND),
        (None, (256, 256), torch.float16, {"causal": True}),
    ],
)
def test_head_dims_on_gpu(implementation, dims, dtype, mask):
    q, k, v = inputs(213, 303, 6, 2, *dims, device="cuda", dtype=dtype)
    check_on_gpu(q, k, v, implementation, **mask)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("implementation", "d", "deterministic"),
    [("portable", 80, True), (None, 128, False), (None, 128, True), (None, 192, True)],
)
def test_padded_and_packed_are_unpadded_on_gpu(implementation: str | None, d: int, deterministic: bool):
    """Bit for bit, whatever the padding holds, and the same on every run."""
    ranges = [((100, 200), (50, 250)), ((0, 300), (0, 300)), ((299, 1), (37, 100)), ((7, 150), (8, 150))]
    sides = 0, 1, 1
    q_range, k_range = (int32(*(r[side] for r in ranges), device="cuda") for side in (0, 1))
    tensors = inputs(300, 310, 4, 2, d, d, batch=4, device="cuda", dtype=torch.bfloat16)
    for x, side in zip(tensors, sides, strict=True):
        for b, r in enumerate(ranges):
            x[b, : r[side][0]] = x[b, sum(r[side]) :] = math.nan
    real = [[x[b : b + 1, r[s][0] : sum(r[s])] for x, s in zip(tensors, sides, strict=True)]
            for b, r in enumerate(ranges)]  # fmt: skip
    packed = [torch.cat([row[i][0] for row in real]).requires_grad_() for i in range(3)]
    ends = [int32(0, *torch.tensor([r[s][1] for r in ranges]).cumsum(0), device="cuda") for s in (0, 1)]
    padded = [x.requires_grad_() for x in tensors]
    options = {"implementation": implementation, "deterministic": deterministic, "return_lse": True, "causal": True}
    out, lse = attention(*padded, q_range=q_range, k_range=k_range, **options)
    out_packed, _ = attention(*packed, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], **options)
    assert not out.isnan().any() and not lse.isnan().any()
    upstream = torch.randn_like(out)
    upstream_packed = torch.cat([upstream[b, r[0][0] : sum(r[0])] for b, r in enumerate(ranges)])
    got = torch.autograd.grad(out, padded, upstream)
    got_packed = torch.autograd.grad(out_packed, packed, upstream_packed)
    first = 0, 0
    for b, r in enumerate(ranges):
        alone = [x.detach().requires_grad_() for x in real[b]]
        out_alone, _ = attention(*alone, **options)
        rows = slice(r[0][0], sum(r[0]))
        stop = first[0] + r[0][1], first[1] + r[1][1]
        assert torch.equal(out[b, rows], out_alone[0]) and torch.equal(out_packed[first[0] : stop[0]], out_alone[0])
        assert not out[b, : rows.start].any() and not out[b, rows.stop :].any()
        grads = torch.autograd.grad(out_alone, alone, upstream[b : b + 1, rows])
        for i, s in enumerate(sides):
            at = slice(r[s][0], sum(r[s]))
            same = torch.equal if deterministic or i else lambda x, y: torch.allclose(x, y, 2e-2, 2e-2)
            assert same(got[i][b, at], grads[i][0]) and same(got_packed[i][first[s] : stop[s]], grads[i][0])
            assert not got[i][b, : at.start].any() and not got[i][b, at.stop :].any()
        first = stop


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_on_gpu(implementation: str | None):
    q, k, v = inputs(130, 140, 4, 2, 64, 64, device="cuda", dtype=torch.float16)
    expected = attention(q, k, v, implementation=implementation, causal=True)
    fused = torch.cat((k, v), 2)  # views of a projection of k and v together
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    apart = [torch.stack((x, x), -1)[..., 0] for x in (q, k, v)]  # head dim not side by side
    odd = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in (q, k, v)]  # base off by one element
    for case in ((q, fused[:, :, :2], fused[:, :, 2:]), turned, apart, odd, (q[:, :, :1].expand_as(q), k, v)):
        out = attention(*case, implementation=implementation, causal=True)
        if case[0].stride(2):
            assert_close(out, expected.float(), expected)
        else:
            assert_close(out, plain(*(x.float() for x in case), causal=True), plain(*case, causal=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("implementation", "d", "mask"),
    [("portable", 128, {"causal": True}), (None, 128, {"causal": True}), (None, 64, {}), (None, 64, SLIDING)],
)
def test_the_same_bits_on_every_run(implementation: str | None, d: int, mask: dict[str, Any]):
    """And the right ones, of more tiles than a GPU has processors, which wait for each other on Hopper."""
    mask = mask | {"deterministic": True}
    q, k, v = inputs(1061, 1061, 8, 4, d, d, batch=4, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(q)

    def once():
        out = attention(q, k, v, implementation=implementation, **mask)
        return out, *torch.autograd.grad(out, (q, k, v), upstream)

    first = once()
    for _ in range(200):
        assert all(map(torch.equal, once(), first))
    check_on_gpu(q, k, v, implementation, **mask)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_is_left_unwritten(implementation: str | None):
    d = 80 if implementation else 128  # what other tests compile too
    q, k, v = inputs(100, 90, 4, 2, d, d, device="cuda", dtype=torch.bfloat16)
    q_range, ends = int32((3, 50), (0, 0), device="cuda"), int32(5, 40, 40, 170, device="cuda")
    k_range, ends_k = int32((0, 90), (0, 90), device="cuda"), int32(0, 20, 60, 180, device="cuda")
    for shape in ({"q_range": q_range, "k_range": k_range}, {"cu_seqlens_q": ends, "cu_seqlens_k": ends_k}):
        case = [x.flatten(0, 1) if "cu_seqlens_q" in shape else x for x in (q, k, v)]
        case = [x.requires_grad_() for x in case]
        torch.empty(1 << 24, device="cuda").fill_(math.nan)  # what the allocator gives next
        out, lse = attention(*case, return_lse=True, causal=True, implementation=implementation, **shape)
        assert out.isfinite().all() and not lse.isnan().any() and (lse == -math.inf).any()
        for x in torch.autograd.grad(out, case, torch.ones_like(out)):
            assert x.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_past_two_to_the_31_elements(implementation: str | None):
    """1.2 million rows of 16 heads of 128 (5 GB), 12 packed sequences of which only the last matters here."""
    rows, tail = 1_200_000, 200
    q = torch.zeros(rows, 16, 128, device="cuda", dtype=torch.bfloat16)
    q[-tail:] = torch.randn(tail, 16, 128, device="cuda")

    def both(q: torch.Tensor, first: int) -> tuple[torch.Tensor, ...]:
        ends = int32(0, first, q.shape[0], device="cuda")
        options = (128**-0.5, 3, 0, None, None, ends, ends, q.shape[0], q.shape[0], implementation or "auto")
        out, lse = torch.ops.onegpu.attention_forward(q, q, q, *options)
        return out, *torch.ops.onegpu.attention_backward(q, None, q, q, q, out, lse, True, *options)

    for got, alone in zip(both(q, rows - tail), both(q[-tail:], 0), strict=True):
        assert torch.equal(got[-tail:], alone) and not got[:-tail].any()


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_graph_captured_twice_on_one_stream(implementation: str | None):
    q, k, v = inputs(500, 500, 8, 8, 128, 128, device="cuda", dtype=torch.bfloat16)
    upstream = torch.randn_like(q)
    options = (128**-0.5, -1, 0, None, None, None, None, 500, 500, implementation or "auto")

    def both() -> tuple[torch.Tensor, ...]:
        out, lse = torch.ops.onegpu.attention_forward(q, k, v, *options)
        return out, *torch.ops.onegpu.attention_backward(upstream, None, q, k, v, out, lse, True, *options)

    expected = both()
    stream, graphs, made = torch.cuda.Stream(), [], []
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=stream):
            made.append(both())
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(20):
        for x in (*made[0], *made[1]):
            x.fill_(math.nan)
        torch.cuda.synchronize()
        for graph, at in zip(graphs, streams, strict=True):  # at the same time
            with torch.cuda.stream(at):
                graph.replay()
        torch.cuda.synchronize()
        for one in made:
            assert all(map(torch.equal, one, expected))


@pytest.mark.gpu
def test_a_call_costs_little_host_time():
    """DESIGN's 30 microseconds, or, on a core that others slow down, as many of torch's own launches."""
    q, k, v = inputs(128, 128, 4, 4, 128, 128, device="cuda", dtype=torch.bfloat16)
    best = least({"attention": lambda: attention(q, k, v, causal=True), "torch.add": lambda: torch.add(q, q)})
    assert best["attention"] < max(30e-6, 7.5 * best["torch.add"]), best
