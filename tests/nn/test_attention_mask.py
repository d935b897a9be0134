"""Masks as rules: the plan read off a rule computes what its matrix says, and everything else sees the matrix."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from onegpu.errors import ArgumentError
from onegpu.kernels.attention import attention
from onegpu.nn import attention_context
from onegpu.nn.attention_mask import AttentionMask, Rule, matrix

BATCH, HEADS, DIM = 3, 2, 8


def mask_of(rule: Rule, queries: int, keys: int, batch: int = BATCH) -> AttentionMask:
    shape = (batch, queries, keys)
    return AttentionMask(rule, shape, lambda: matrix(rule, shape, torch.device("cpu")), torch.device("cpu"))


def by_plan(q, k, v, plan):
    """``[B, S_q, H, D]`` from a plan."""
    if plan.cu_seqlens is None:
        k, v = k[:, : plan.keys], v[:, : plan.keys]
        return attention(q, k, v, causal=plan.causal, window=plan.window, q_range=plan.q_range, k_range=plan.k_range)
    ends, longest = plan.cu_seqlens, plan.max_seqlen
    flat = (x.flatten(0, 1) for x in (q, k, v))
    out = attention(
        *flat, causal=plan.causal, window=plan.window, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest,
        max_seqlen_k=longest,
    )  # fmt: skip
    return out.unflatten(0, q.shape[:2])


def by_matrix(q, k, v, seen):
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * DIM**-0.5
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def check(rule: Rule, queries: int, keys: int, real: torch.Tensor | None = None) -> None:
    """real: boolean [B, S_q], queries whose result is asked for; the others may be anything."""
    mask = mask_of(rule, queries, keys)
    plan, seen = mask.plan(), mask.dense()
    assert plan is not None and seen.shape == mask.shape and seen.dtype == mask.dtype
    q, k, v = (torch.randn(BATCH, n, HEADS, DIM, dtype=torch.float64) for n in (queries, keys, keys))
    real = torch.ones(BATCH, queries, dtype=torch.bool) if real is None else real
    real = real & seen.any(-1)[:, 0]
    assert real.any()
    torch.testing.assert_close(by_plan(q, k, v, plan)[real], by_matrix(q, k, v, seen)[real])


def padded(kind: str | None, width: int) -> torch.Tensor | None:
    if kind is None:
        return None
    mask = torch.ones(BATCH, width, dtype=torch.bool)
    mask[1, :3], mask[2, : width - 1] = False, False
    return mask if kind == "left" else mask.flip(-1)


@pytest.mark.parametrize("tensors", [False, True], ids=["ints", "tensors"])
@pytest.mark.parametrize("kind", [None, "left", "right"])
@pytest.mark.parametrize("left", [-1, 0, 2])
def test_causal(left, kind, tensors):
    """Without a cache, in chunks with one, and in a buffer that is longer than what is in it."""
    for past, queries, room in itertools.product((0, 5), (1, 4, 7), (0, 6)):
        total = past + queries
        offset = torch.tensor(past) if tensors else past
        padding = padded(kind, total)
        real = None if padding is None else padding[:, past:]
        if real is not None and not real.any():
            continue
        check(Rule(True, left, padding=padding, q_offset=offset), queries, total + room, real)


@pytest.mark.parametrize("kind", [None, "left", "right"])
def test_a_sliding_cache_begins_later_than_the_sequence(kind):
    padding = padded(kind, 12)
    for queries in (1, 3):
        rule = Rule(True, 3, padding=padding, q_offset=12 - queries, k_offset=12 - queries - 3)
        real = None if padding is None else padding[:, 12 - queries :]
        check(rule, queries, queries + 3, real)


@pytest.mark.parametrize("kind", [None, "left", "right"])
def test_both_ways(kind):
    check(Rule(padding=padded(kind, 9)), 9, 9)
    check(Rule(padding=padded(kind, 9)), 4, 9)  # other queries than those that the keys belong to
    real = padded(kind, 9)
    check(Rule(left=2, right=2, padding=real), 9, 9, real)


@pytest.mark.parametrize("left", [-1, 1])
def test_packed(left):
    numbers = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    check(Rule(True, left, sequences=numbers), 6, 6)
    plan = mask_of(Rule(True, left, sequences=numbers), 6, 6).plan()
    assert plan.cu_seqlens.tolist() == [0, 3, 5, 6, 7, 12, 18] and plan.max_seqlen == 6


def test_what_the_kernel_cannot_say_is_left_to_the_matrix():
    holes = torch.tensor([[True, False, True, True]] * BATCH)
    assert mask_of(Rule(True, padding=holes), 4, 4).plan() is None
    assert mask_of(Rule(left=1, right=1), 3, 5).plan() is None  # a window over keys that are not its own
    assert mask_of(Rule(True, q_offset=9), 4, 5).plan() is None  # keys that are missing


def test_rows_without_a_real_key():
    padding = torch.tensor([[True] * 4, [False] * 4, [False, True, True, True]])
    check(Rule(True, padding=padding), 4, 4, padding)
    plan = mask_of(Rule(True, padding=padding), 4, 4).plan()
    assert plan.q_range.tolist() == plan.k_range.tolist() == [[0, 4], [0, 0], [1, 3]]


def test_a_mask_without_padding_is_no_padding():
    plan = mask_of(Rule(True, padding=torch.ones(BATCH, 6, dtype=torch.bool)), 6, 6).plan()
    assert plan == (True, None, None, None, None, None, 0)


def test_everything_else_sees_the_matrix():
    rule = Rule(True, padding=padded("left", 5))
    mask, seen = mask_of(rule, 5, 5), matrix(rule, (BATCH, 5, 5), torch.device("cpu"))
    assert mask.shape == seen.shape and mask.dtype == torch.bool and mask.device == seen.device and mask.ndim == 4
    assert torch.equal(mask[:, :, 1:, :3], seen[:, :, 1:, :3]) and torch.equal(~mask, ~seen)
    assert torch.equal(torch.where(mask, 0.0, -1.0), torch.where(seen, 0.0, -1.0))
    assert torch.equal(torch.cat([mask, seen]), torch.cat([seen, seen]))
    assert torch.equal(mask & seen, seen)
    assert torch.equal(mask.to(torch.float32), seen.float()) and mask.sum() == seen.sum()


def test_what_was_read_is_not_read_on_another_device(monkeypatch):
    mask, waits = mask_of(Rule(True, padding=padded("left", 5)), 5, 5), []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: waits.append(self) or self)
    for _ in range(3):
        plan = mask.to("meta").plan()
        assert plan.k_range.is_meta and plan.k_range.shape == mask.plan().k_range.shape
    assert len(waits) == 1


def test_moves_keep_the_rule():
    mask = mask_of(Rule(True, padding=padded("left", 5)), 5, 5)
    assert mask.to("cpu") is mask
    for moved in (mask.detach(), mask.to("cpu", copy=True), mask.to("meta")):
        assert type(moved) is AttentionMask and moved.rule.causal and moved.shape == mask.shape
    assert mask.to("meta").rule.padding.is_meta
    assert torch.equal(mask.detach().dense(), mask.dense())


@pytest.mark.parametrize(
    "add", [lambda m, s: s + m, lambda m, s: m + s, lambda m, s: s.add_(m), lambda m, s: s.masked_fill(m, -1.0)]
)
def test_scores_to_which_it_is_added_are_of_a_model_that_must_not_have_it(add):
    with pytest.raises(ArgumentError, match="attn_implementation='onegpu' is set for a model that applies masks"):
        add(mask_of(Rule(True), 4, 4), torch.zeros(BATCH, HEADS, 4, 4))


def test_all_masks_of_a_forward_are_read_at_once(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: waits.append(self.numel()) or self)
    masks = [
        mask_of(Rule(True, padding=padded("left", 6)), 6, 6),
        mask_of(Rule(True, 2, padding=padded("left", 6)), 6, 6),
    ]
    masks.append(mask_of(Rule(True, sequences=torch.tensor([[0, 0, 1, 1, 1, 1]] * BATCH)), 6, 6))
    forgotten = mask_of(Rule(True, padding=padded("right", 6)), 6, 6)
    del forgotten
    plans = [mask.plan() for mask in masks]
    assert waits == [2 + 2 + 6 * BATCH]
    assert [mask.plan() for mask in masks] == plans and len(waits) == 1
    assert plans[0].q_range.tolist() == plans[1].q_range.tolist() and plans[2].max_seqlen == 4


@pytest.mark.parametrize("rows", [1, BATCH])
def test_positions_that_start_again(rows):
    mask, positions = mask_of(Rule(True), 6, 6), torch.tensor([[0, 1, 2, 0, 1, 0]]).expand(rows, 6)
    plain = mask.dense().clone()
    mask = mask_of(Rule(True), 6, 6)
    mask.consider(positions)
    plan = mask.plan()
    assert plan.cu_seqlens.tolist() == [*range(0)] + [
        6 * row + end for row in range(BATCH) for end in (0, 3, 5)
    ] + [6 * BATCH]  # fmt: skip
    numbers = torch.tensor([0, 0, 0, 1, 1, 2])
    assert torch.equal(mask.dense(), plain & (numbers[:, None] == numbers))


def test_other_positions_are_one_sequence():
    for positions in ([4, 5, 6, 7], [0, 1, 1, 2], [0, 5, 6, 9], [3, 2, 1, 0]):
        mask = mask_of(Rule(True), 4, 4)
        mask.consider(torch.tensor([positions]))
        assert mask.plan().cu_seqlens is None, positions
    again = torch.tensor([[0, 1, 0, 1]])
    for rule in (
        Rule(),
        Rule(True, q_offset=torch.tensor(0)),
        Rule(True, padding=torch.ones(BATCH, 4, dtype=torch.bool)),
    ):
        mask = mask_of(rule, 4, 4)
        mask.consider(again)
        assert mask.plan().cu_seqlens is None
    mask = mask_of(Rule(True), 4, 4)
    mask.consider(torch.zeros(3, BATCH, 4, dtype=torch.long))  # three positions for each token
    assert mask.plan().cu_seqlens is None


def test_positions_are_read_once_for_all_layers_and_again_when_they_change(monkeypatch):
    waits, positions = [], torch.tensor([[0, 1, 0, 1]])
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: waits.append(self) or self)
    for _ in range(3):
        assert attention_context.restarts(positions).tolist() == [True, False, True, False]
    assert len(waits) == 1
    positions[0, 2:] = torch.tensor([2, 3])
    assert attention_context.restarts(positions).tolist() == [True, False, False, False] and len(waits) == 2
    assert attention_context.restarts(copy.deepcopy(positions)).tolist() == [True, False, False, False]


@pytest.mark.gpu
def test_nothing_is_read_while_a_graph_is_captured():
    padding = padded("left", 6).cuda()
    rule, shape = Rule(True, padding=padding), (BATCH, 6, 6)
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        mask = AttentionMask(rule, shape, lambda: matrix(rule, shape, padding.device), padding.device)
        mask.consider(torch.arange(6, device="cuda")[None])
        assert mask.plan() is None and mask.dense().shape == (BATCH, 1, 6, 6)
    assert mask_of(Rule(True), 6, 6).plan() is not None
