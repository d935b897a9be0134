"""Which implementation serves which attention, and that all of them compute the same."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import onegpu.nn.attention as module
from onegpu.nn.attention import Packed, attend
from onegpu.nn.attention_context import decode_step
from onegpu.nn.attention_mask import AttentionMask, Rule, matrix
from tests.compare import assert_close

B, H, KV, D, DV = 2, 4, 2, 16, 24


def tensors(queries: int = 6, keys: int = 6, dtype=torch.float64, device="cpu", batch: int = B):
    made = torch.randn(batch, H, queries, D), torch.randn(batch, KV, keys, D), torch.randn(batch, KV, keys, DV)
    return [x.to(device, dtype) for x in made]


def sdpa(q, k, v, mask, causal, dropout=0.0):
    k, v = (x.repeat_interleave(H // KV, 1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    return out.transpose(1, 2).contiguous()


def refuse(*args):
    raise AssertionError("PyTorch's attention was asked")


def exact(q, k, v, seen=None, bias=None):
    """The definition, in the dtype of q."""
    k, v = (x.repeat_interleave(H // KV, 1) for x in (k, v))
    scores = q @ k.mT * D**-0.5
    scores = scores if bias is None else scores + bias
    scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def causal(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


@pytest.mark.parametrize("queries", [1, 3, 6])
def test_without_a_mask_the_last_query_sees_the_last_key(queries):
    q, k, v = tensors(queries)
    seen = causal(queries, 6)
    torch.testing.assert_close(attend(q, k, v, None, sdpa=refuse), exact(q, k, v, seen))
    torch.testing.assert_close(attend(q, k, v, None, sdpa=refuse, causal=False), exact(q, k, v))
    torch.testing.assert_close(
        attend(q, k, v, None, sdpa=refuse, window=2), exact(q, k, v, seen & ~seen.tril(4 - queries))
    )


@pytest.mark.parametrize("left", [True, False])
def test_a_mask_over_keys(left):
    q, k, v = tensors()
    mask = torch.ones(B, 6, dtype=torch.long)
    mask[1, slice(0, 2) if left else slice(4, 6)] = 0
    real, seen = mask.bool(), causal(6, 6) & mask[:, None, None].bool()
    out = attend(q, k, v, mask, sdpa=refuse)
    torch.testing.assert_close(out[real], exact(q, k, v, seen)[real])
    assert not out[~real].any()
    out = attend(q, k, v, mask, sdpa=refuse, causal=False)
    torch.testing.assert_close(out, exact(q, k, v, mask[:, None, None].bool()))
    mask[1] = torch.tensor([1, 1, 0, 1, 0, 1])  # what no kernel takes
    out = attend(q, k, v, mask, sdpa=sdpa)
    torch.testing.assert_close(out, exact(q, k, v, causal(6, 6) & mask[:, None, None].bool()))


def test_a_mask_over_scores():
    q, k, v = tensors()
    seen = (torch.rand(B, 1, 6, 6) < 0.5) | torch.eye(6, dtype=torch.bool)
    bias = torch.randn(1, H, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(attend(q, k, v, seen, sdpa=sdpa), exact(q, k, v, seen))
    torch.testing.assert_close(attend(q, k, v, bias, sdpa=sdpa), exact(q, k, v, bias=bias))


def spied(monkeypatch) -> list[bool]:
    """True for each call of our op from here on."""
    calls, ours = [], module.attention
    monkeypatch.setattr(module, "attention", lambda *a, **k: calls.append(True) or ours(*a, **k))
    return calls


BOTH = {
    "sdp_kernel": lambda **on: torch.backends.cuda.sdp_kernel(
        enable_flash=on.get("flash", False), enable_math=on.get("math", False),
        enable_mem_efficient=False, enable_cudnn=False,
    ),
    "sdpa_kernel": lambda **on: sdpa_kernel(
        [{"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}[name] for name in on]
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", BOTH)
def test_the_backends_that_the_caller_allows(spelling, monkeypatch):
    calls, (q, k, v) = spied(monkeypatch), tensors(dtype=torch.float32)
    bias = torch.randn(1, H, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older spelling says that it is
        with BOTH[spelling](flash=True):
            flash = attend(q, k, v, None, sdpa=refuse)
            assert calls == [True]
            with pytest.raises(RuntimeError, match=r"^No available kernel.*its mask is more than padding"):
                attend(q, k, v, bias, sdpa=refuse)
            with pytest.raises(RuntimeError, match=r"^No available kernel.*dropout=0.5"):
                attend(q, k, v, None, sdpa=refuse, dropout=0.5)
        with BOTH[spelling](math=True):
            torch.testing.assert_close(attend(q, k, v, None, sdpa=sdpa), flash)
            assert len(calls) == 1
        with BOTH[spelling](flash=True, math=True):
            torch.testing.assert_close(attend(q, k, v, bias, sdpa=sdpa), exact(q, k, v, bias=bias))


def test_what_the_kernel_does_not_serve_goes_to_pytorch(monkeypatch):
    calls = spied(monkeypatch)
    wide = torch.randn(1, H, 3, 300), torch.randn(1, KV, 3, 300), torch.randn(1, KV, 3, 300)
    attend(*wide, None, sdpa=sdpa)
    asked = []

    def dropped(q, k, v, mask, is_causal):
        asked.append((mask, is_causal))
        return sdpa(q, k, v, mask, is_causal, 0.1)

    q, k, v = tensors(3, 6)
    attend(q, k, v, None, sdpa=dropped, dropout=0.1)
    assert torch.equal(asked[0][0][0, 0], causal(3, 6)) and not asked[0][1]  # PyTorch would align the first ones
    q, k, v = tensors()
    attend(q, k, v, None, sdpa=dropped, dropout=0.1)
    assert asked[1] == (None, True) and not calls


PLACES = {"one": [0, 3, 4, 9], "one sequence": [0, 9], "padding behind": [0, 3, 7]}


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("ends", PLACES.values(), ids=PLACES)
def test_packed_sequences(ends, window):
    q, k, v = tensors(9, 9, batch=1)
    packed = Packed(torch.tensor(ends, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32), 9, 9)
    out = attend(q, k, v, None, sdpa=refuse, packed=packed, window=window)
    for start, end in itertools.pairwise(ends):
        part = [x[:, :, start:end] for x in (q, k, v)]
        torch.testing.assert_close(out[:, start:end], attend(*part, None, sdpa=refuse, window=window))
    with sdpa_kernel(SDPBackend.MATH):
        other = attend(q, k, v, None, sdpa=sdpa, packed=packed, window=window)
    torch.testing.assert_close(other[:, : ends[-1]], out[:, : ends[-1]])


def test_packed_queries_of_other_lengths_than_their_keys():
    q, k, v = tensors(5, 9, batch=1)
    packed = Packed(torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 6, 9], dtype=torch.int32))
    out = attend(q, k, v, None, sdpa=refuse, packed=packed)
    parts = [(q[:, :, :2], k[:, :, :6], v[:, :, :6]), (q[:, :, 2:], k[:, :, 6:], v[:, :, 6:])]
    expected = torch.cat([attend(*part, None, sdpa=refuse) for part in parts], dim=1)
    torch.testing.assert_close(out, expected)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(attend(q, k, v, None, sdpa=sdpa, packed=packed), expected)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("queries", [1, 4, 11])
def test_a_step_reads_the_cache_between_two_marks(queries, window):
    first, length = [0, 2], [15, 12]
    q, k, v = tensors(queries, 20)
    marks = [torch.tensor(x, dtype=torch.int32) for x in (first, length)]
    for row in range(B):
        for x in (k, v):
            x[row, :, : first[row]], x[row, :, length[row] :] = torch.nan, torch.nan
    with decode_step(*marks):
        out = attend(q, k, v, torch.zeros(B, 1, queries, 20, dtype=torch.bool), sdpa=refuse, window=window)
    assert out.isfinite().all()
    for row in range(B):
        real = min(queries, length[row] - first[row])
        part = [x[row : row + 1, :, first[row] : length[row]] for x in (k, v)]
        alone = attend(q[row : row + 1, :, queries - real :], *part, None, sdpa=refuse, window=window)
        torch.testing.assert_close(out[row : row + 1, queries - real :], alone)


def test_a_step_leaves_other_attention_alone():
    q, k, v = tensors(1, 5)
    marks = [torch.tensor([x] * B, dtype=torch.int32) for x in (0, 2)]
    with decode_step(*marks):
        torch.testing.assert_close(attend(q, k, v, None, sdpa=refuse, causal=False), exact(q, k, v))
    with decode_step(*marks, keys=20):
        torch.testing.assert_close(attend(q, k, v, None, sdpa=refuse), exact(q, k, v))


def test_autocast():
    q, k, v = tensors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v, None, sdpa=refuse)
    assert out.dtype == torch.bfloat16
    half = [x.bfloat16() for x in (q, k, v)]
    assert_close(out, exact(q, k, v, causal(6, 6)), exact(*half, causal(6, 6)), what="autocast")


@pytest.mark.gpu
def test_on_a_gpu_float32_is_pytorchs():
    q, k, v = tensors(dtype=torch.float32, device="cuda")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match=r"^No available kernel.*float32"):
        attend(q, k, v, None, sdpa=refuse)
    seen = causal(6, 6).cuda()
    wide = exact(*(x.double() for x in (q, k, v)), seen)
    assert_close(attend(q, k, v, None, sdpa=sdpa), wide, exact(q, k, v, seen))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_ranges_and_packing(dtype):
    q, k, v = tensors(70, 70, dtype=dtype, device="cuda")
    rule = Rule(True, padding=torch.arange(70, device="cuda") >= torch.tensor([[0], [33]], device="cuda"))
    seen = matrix(rule, (B, 70, 70), q.device)
    mask = AttentionMask(rule, (B, 70, 70), lambda: seen, q.device)
    real = rule.padding
    exactly, rounded = (exact(*(x.to(t) for x in (q, k, v)), seen)[real] for t in (torch.float32, dtype))
    assert_close(attend(q, k, v, mask, sdpa=refuse)[real], exactly, rounded)
