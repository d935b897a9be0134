"""Which criterion is judged where."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StoppingCriteria

from onegpu.engine.stops import Readback, Ring, Stops
from onegpu.kernels.next_token import State, take


def stops(*criteria, streamer=None, rows=2):
    config = SimpleNamespace(_pad_token_tensor=torch.tensor(0))
    ids = torch.ones(rows, 4, dtype=torch.long)
    return Stops(
        SimpleNamespace(
            rows=rows, streamer=streamer, stopping=criteria, config=config, max_length=9, ids=ids, columns=4
        )
    )


def out(tokens, finished):
    return [tokens, finished, [0] * len(tokens)]


HISTORY = torch.ones(2, 10, dtype=torch.long)


def test_the_host_looks_only_where_it_has_to():
    assert not stops(MaxLengthCriteria(9)).looks
    assert stops(MaxLengthCriteria(9), EosTokenCriteria(2)).looks
    assert stops(MaxTimeCriteria(1.0)).looks
    assert stops(streamer=SimpleNamespace()).looks
    eos = stops(EosTokenCriteria(2))
    assert eos.eos and eos.pads and not stops(MaxLengthCriteria(9)).pads
    assert eos.brief and not eos.late() and not stops(EosTokenCriteria(2), streamer=SimpleNamespace()).brief
    for seconds, late in ((1000.0, False), (-1.0, True)):
        timed = stops(MaxTimeCriteria(seconds), EosTokenCriteria(2))
        assert timed.brief and timed.late() is late
        judged = stops(MaxTimeCriteria(seconds), streamer=SimpleNamespace(put=lambda tokens: None))
        assert judged(out([5, 5], [0, 0]), 5, HISTORY, ())[0] is late


def test_rows_that_ended_on_the_device_and_on_the_host_make_the_end():
    class Second(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.tensor([False, input_ids.shape[1] >= 6])

    judge = stops(EosTokenCriteria(2), Second())
    assert judge(out([5, 5], [0, 0]), 5, HISTORY, ()) == (False, None)
    done, newly = judge(out([5, 5], [0, 0]), 6, HISTORY, ())
    assert not done and newly.tolist() == [False, True]
    assert judge(out([5, 5], [0, 0]), 7, HISTORY, ()) == (False, None), "said once"
    assert judge(out([2, 0], [1, 0]), 8, HISTORY, ()) == (True, None)


def test_the_streamer_sees_padding_behind_a_row_that_the_host_ended():
    shown = []
    first = type("First", (StoppingCriteria,), {"__call__": lambda *_, **__: torch.tensor([True, False])})()
    judge = stops(
        EosTokenCriteria(2), first, streamer=SimpleNamespace(put=lambda tokens: shown.append(tokens.tolist()))
    )
    judge(out([5, 6], [0, 0]), 5, HISTORY, ())
    judge(out([7, 8], [0, 0]), 6, HISTORY, ())
    assert shown == [[5, 6], [0, 8]]


def test_transformers_reminder_about_the_context_is_given(monkeypatch):
    said = []
    monkeypatch.setattr(
        "transformers.generation.stopping_criteria.logger.warning_once", lambda text, *_: said.append(text)
    )
    judge = stops(MaxLengthCriteria(9, max_position_embeddings=6), EosTokenCriteria(2))
    for columns in (5, 6, 7, 8):
        judge.remind(columns, HISTORY)
    assert len(said) == 1 and "maximum length (6)" in said[0]


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_copies_come_back_in_order(name: str):
    source, back = torch.zeros(3, 2, dtype=torch.long, device=name), Readback(torch.device(name))
    for number in range(2):
        source.fill_(number)
        back.push(source)
    seen = [back.pop()]
    source.fill_(7)  # into memory that was used before
    back.push(source)
    seen += [back.pop(), back.pop()]
    assert seen == [[[number] * 2] * 3 for number in (0, 1, 7)]


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_choice_writes_to_the_host_itself(name: str):
    out = torch.zeros(3, 2, dtype=torch.long, device=name)
    history, lengths = out.new_zeros(2, 30), out.new_full((2,), 5)
    ring, back = Ring.make(out), Readback(torch.device(name))
    assert ring is not None and (ring.shown.device, ring.shown.shape) == (out.device, (4, 3, 2))
    state = State(out.new_tensor([7]), None, out, history, lengths, ring.shown)
    scores, seen = torch.zeros(2, 300, device=name), []
    for columns in range(6, 26):
        scores.zero_()[torch.arange(2), [columns, 7 if columns > 20 else 3 * columns]] = 1.0
        take(scores, None, 1.0, state)
        back.push(out, ring.at(columns))
        if columns > 7:  # two late
            seen.append(back.pop())
    back.push(out)  # as where nothing is captured
    out.fill_(-1)
    seen += [back.pop(), back.pop(), back.pop()]
    expected = [[[c, 7 if c > 20 else 3 * c], [int(c >= 7), int(c > 20)], [0, 0]] for c in range(6, 26)]
    assert seen == [*expected, expected[-1]]
    assert history[0, 5:25].tolist() == [*range(6, 26)]


def test_what_nobody_has_read_is_not_overwritten():
    out = torch.zeros(3, 1, dtype=torch.long)
    ring, back = Ring.make(out), Readback(out.device)
    assert ring is not None
    for columns in range(3):
        back.push(out, ring.at(columns))
    with pytest.raises(AssertionError, match="nobody has read"):
        back.push(out, ring.at(3))
