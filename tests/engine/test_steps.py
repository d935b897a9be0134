"""A step's identity, and its tensors under a captured graph."""

from __future__ import annotations

import torch
from transformers.generation import logits_process as hf

from onegpu.engine import steps
from tests.sampling_cases import VOCAB, frame, scores, step_for, text


def test_another_request_overwrites_tensors_in_place():
    first, second = hf.MinLengthLogitsProcessor(6, [1]), hf.MinLengthLogitsProcessor(12, [2, 3])
    step, other = step_for(first), step_for(second)
    assert step.key == other.key != step_for(hf.NoRepeatNGramLogitsProcessor(2)).key
    before = {name: value.data_ptr() for name, value in step.tensors.items()}
    step.copy_from(other)
    assert before == {name: value.data_ptr() for name, value in step.tensors.items()}
    history, _ = text(7, 9)
    assert torch.equal(step(scores(7), text(7, 9)), second(history[:, :9], scores(7)))
    penalties = [step_for(hf.RepetitionPenaltyLogitsProcessor(value)).key for value in (1.1, 1.2)]
    assert penalties[0] != penalties[1]


def test_members_and_what_is_outside():
    assert steps.members([1, 3, VOCAB, -1], frame()).nonzero().flatten().tolist() == [1, 3]
    assert steps.outside([0, VOCAB - 1], frame()) is None
    assert steps.outside([0, VOCAB], frame()) == f"names token {VOCAB} of a vocabulary of {VOCAB}"
    assert steps.outside([-1], frame()) == f"names token -1 of a vocabulary of {VOCAB}"
