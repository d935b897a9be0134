"""The engine's step, and questions that are answered together."""

from __future__ import annotations

import threading

import pytest
import torch

from onegpu.nn import attention_context
from onegpu.nn.attention_context import answer_all, current_step, decode_step, enqueue, restarts


def test_a_step_belongs_to_its_block_and_its_thread():
    first, length, seen = torch.zeros(2, dtype=torch.int32), torch.full((2,), 5, dtype=torch.int32), []
    assert current_step() is None
    with decode_step(first, length, keys=16):
        step = current_step()
        assert step.first is first and step.length is length and step.keys == 16
        thread = threading.Thread(target=lambda: seen.append(current_step()))
        thread.start()
        thread.join()
        with decode_step(first, length):
            assert current_step().keys is None
        assert current_step() is step
    assert current_step() is None and seen == [None]


class Question:
    def __init__(self, *values: bool) -> None:
        self.values, self.answers = values, []

    def ask(self):
        return torch.tensor(self.values) if self.values else None

    def answer(self, values):
        self.answers.append(values.tolist())


def test_questions_are_answered_together_and_once():
    one, two, settled, needed = Question(True, False), Question(False), Question(), Question(True, True, False)
    for question in (one, two, settled):
        enqueue(question)
    answer_all(needed)
    assert [q.answers for q in (one, two, settled, needed)] == [[[True, False]], [[False]], [], [[True, True, False]]]
    answer_all(two)
    assert one.answers == [[True, False]] and len(two.answers) == 2


def test_questions_that_nobody_asks_do_not_pile_up():
    kept = [Question(True) for _ in range(500)]
    for question in kept:
        enqueue(question)
    assert len(attention_context._local.open) <= 64
    answer_all(kept[0])
    assert not attention_context._local.open


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_positions_that_changed_in_place_are_read_again(mode):
    with mode():
        positions = torch.tensor([[0, 1, 2, 3]])
        assert restarts(positions).tolist() == [True, False, False, False]
        positions[0, 2:] -= 2
        assert restarts(positions).tolist() == [True, False, True, False]
