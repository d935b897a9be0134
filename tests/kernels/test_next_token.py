"""The definition of an op that chooses tokens, and on a GPU the kernels against it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from onegpu.kernels.next_token import (
    MOST_CANDIDATES,
    Shape,
    State,
    _take,
    _take_candidates,
    cost,
    take,
    take_candidates,
)

OPS = torch.ops.onegpu


def _state(
    rows: int, device: str = "cpu", *, eos: tuple[int, ...] = (3, 5), pad: int | None = 0, shown: int = 4
) -> State:
    out = torch.zeros(3, rows, dtype=torch.int64, device=device)
    out[1, rows // 2 :: 2] = 1  # some rows are finished
    history = torch.full((rows, 6), -7, device=device)
    lengths = torch.arange(rows, device=device) % 8  # up to two past the end
    made = torch.tensor(eos, dtype=torch.int64, device=device)
    ring = torch.full((shown, 3, rows), -7, device=device) if shown else None
    return State(made, None if pad is None else torch.tensor(pad, device=device), out, history, lengths, ring)


def _noise(rows: int, vocab: int, device: str = "cpu") -> torch.Tensor:
    return torch.empty(rows, vocab, device=device).exponential_(1)


def _candidates(rows: int, count: int, vocab: int, device: str, dtype: torch.dtype = torch.float32) -> Any:
    values, ids = torch.topk((torch.randn(rows, vocab, device=device) * 3).to(dtype), count, sorted=False)
    return values, ids, _noise(rows, vocab, device)


@pytest.mark.parametrize("pad", [0, None])
@pytest.mark.parametrize("eos", [(), (3,), (3, 5, 9)])
def test_what_a_row_keeps(pad: int | None, eos: tuple[int, ...], device: str):
    state = _state(9, device, eos=eos, pad=pad)
    before = copy.deepcopy(state)
    scores = torch.zeros(9, 20, device=device)
    chosen = [3, 5, 9, 1, 3, 5, 9, 1, 3]
    scores[range(9), chosen] = 1.0
    take(scores, None, 1.0, state)
    for row in range(9):
        finished = bool(before.out[1, row])
        token = pad if finished and pad is not None else chosen[row]
        place = min(int(before.lengths[row]), 5)
        assert state.out[:, row].tolist() == [token, int(finished or token in eos), 0]
        assert state.lengths[row] == before.lengths[row] + 1 and state.history[row, place] == token
        assert (state.history[row] == before.history[row]).sum() == 5
        slot = int(before.lengths[row]) % 4
        assert state.shown[slot, :, row].equal(state.out[:, row])
        assert (state.shown[:, :, row] == -7).all(1).sum() == 3, "the other slots are as they were"


def test_candidates_are_cut_in_order(device: str):
    # Probabilities 0.5, 0.25, 0.125, 0.0625, … of tokens 10, 11, 12, …
    values = -torch.arange(8, device=device).float()[None].expand(4000, -1).contiguous() * math.log(2)
    ids = (torch.arange(8, device=device) + 10)[None].expand(4000, -1).contiguous()

    def drawn(*shape: Any) -> list[int]:
        state = _state(4000, device, eos=(), pad=None)
        take_candidates(values, ids, _noise(4000, 30, device), Shape(*shape), state)
        return state.out[0].unique().tolist()

    assert drawn(1.0, 8) == [*range(10, 18)]
    assert drawn(1.0, 3) == [10, 11, 12]
    assert drawn(1.0, 8, 0.7) == [10, 11]  # 0.5 is not enough; with 0.25 it is
    assert drawn(1.0, 8, 0.1, 3) == [10, 11, 12]
    assert drawn(1.0, 8, 1.0, 1, 0.2) == [10, 11, 12]  # 0.125 is 0.25 of the highest
    assert drawn(1.0, 8, 1.0, 1, 0.9, 2) == [10, 11]
    assert drawn(0.5, 8, 1.0, 1, 0.2) == [10, 11]  # colder: 1, 1/4, 1/16
    assert drawn(1.0, 2, 0.99, 1, 0.01) == [10, 11]


def test_of_equal_candidates_the_last_token_survives_top_p(device: str):
    values, ids = torch.zeros(1, 8, device=device), torch.tensor([[7, 2, 5, 1, 0, 4, 3, 6]], device=device)
    state = _state(1, device, eos=(), pad=None)
    take_candidates(values, ids, _noise(1, 8, device), Shape(1.0, 4, 0.1), state)
    assert state.out[0, 0] == 7


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_cannot_be_drawn_from_is_marked(value: float, device: str):
    for everywhere in (False, True):
        scores = torch.randn(3, 300, device=device)
        scores[1, slice(None) if everywhere else 200] = value
        marked = [0, int(everywhere or value != -math.inf), 0]
        state = _state(3, device)
        take(scores, _noise(3, 300, device), 0.7, state)
        assert state.out[2].tolist() == marked
        values, ids = torch.topk(scores, 128, sorted=False)
        take_candidates(values, ids, _noise(3, 300, device), Shape(0.7, 50, 0.9), other := _state(3, device))
        assert other.out[2].tolist() == marked and (other.out[0] >= 0).all() and (other.out[0] < 300).all()
        take(torch.randn(3, 300, device=device), _noise(3, 300, device), 0.7, state)
        assert state.out[2].tolist() == marked


def test_opcheck(device: str):
    scores = torch.randn(4, 300, device=device)
    torch.library.opcheck(OPS.take_token.default, (scores, None, 1.0, *_state(4, device)))
    bare = _state(4, device, pad=None, shown=0)
    torch.library.opcheck(OPS.take_token.default, (scores, _noise(4, 300, device), 0.7, *bare))
    candidates, shape = _candidates(4, 128, 300, device), Shape(0.7, 50, 0.9, 1, 0.1)
    torch.library.opcheck(OPS.take_token_of_candidates.default, (*candidates, *shape, *_state(4, device)))


def test_cost():
    assert cost(2, 1000, 2, False) == (4000, 2000)
    assert cost(2, 1000, 2, True) == (12000, 6000)


def _same_tokens(got: State, wanted: State, allowed: float = 0.0) -> None:
    """Equal states; where rounding may decide a race, in all but a share of the rows."""
    same = (got.out == wanted.out).all(dim=0)
    assert (~same).float().mean() <= allowed
    for mine, its in ((got.history, wanted.history), (got.lengths, wanted.lengths)):
        assert torch.equal(mine[same], its[same])
    assert torch.equal(got.shown[:, :, same], wanted.shown[:, :, same])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 63), (2, 1024), (5, 32_000), (1, 151_937), (600, 5_003)])
def test_on_a_gpu_the_kernel_takes_what_the_definition_takes(rows: int, vocab: int, dtype: torch.dtype):
    scores = (torch.randn(rows, vocab + 3, device="cuda") * 4).to(dtype)[:, :vocab]  # strided, off by three elements
    for noise, temperature, allowed in ((None, 1.0, 0.0), (_noise(rows, vocab, "cuda"), 0.7, 0.01)):
        got, wanted = _state(rows, "cuda"), _state(rows, "cuda")
        take(scores, noise, temperature, got)
        _take(scores, noise, temperature, *wanted)
        _same_tokens(got, wanted, allowed)


@pytest.mark.gpu
def test_on_a_gpu_greedy_treats_nan_zeros_and_equals_as_torch_does():
    scores = torch.zeros(6, 3000, device="cuda")
    scores[0, 1500:] = -0.0
    scores[1, [700, 2900]] = math.nan
    scores[2, [800, 100]] = math.inf
    scores[3] = -math.inf
    scores[4, [2500, 40]] = 2.0
    scores[5] = -1.0
    scores[5, 2048] = -0.5
    got = _state(6, "cuda", eos=(), pad=None)
    take(scores, None, 1.0, got)
    assert got.out[0].tolist() == scores.argmax(-1).tolist() == [0, 700, 100, 0, 40, 2048]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [128, 512, MOST_CANDIDATES])
@pytest.mark.parametrize("shape", [(1.0, 40), (0.7, 50, 0.9), (1.3, 60, 0.8, 4, 0.05, 2), (1.0, 30, 1.0, 1, 0.1)])
def test_on_a_gpu_the_kernel_draws_what_the_definition_draws(shape: tuple[Any, ...], count: int, dtype: torch.dtype):
    candidates = _candidates(400, count, 5000, "cuda", dtype)
    got, wanted = _state(400, "cuda"), _state(400, "cuda")
    take_candidates(*candidates, Shape(*shape), got)
    _take_candidates(*candidates, *Shape(*shape), *wanted)
    _same_tokens(got, wanted, 0.01)
    again = _state(400, "cuda")
    take_candidates(*candidates, Shape(*shape), again)
    _same_tokens(again, got)
