"""Each processor against transformers' own, over lengths that pass its limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.generation import logits_process as hf

from onegpu.engine.processors import translate, translate_all
from onegpu.engine.steps import Text, Unsupported
from tests.sampling_cases import BATCH, MAX_LENGTH, VOCAB, assert_as_transformers, frame, scores, step_for, text

NEWER = Version(transformers.__version__) >= Version("5.23")
PROCESSORS: dict[str, Callable[[], Any]] = {
    "min_length": lambda: hf.MinLengthLogitsProcessor(6, [1, 5]),
    "min_length, eos outside": lambda: hf.MinLengthLogitsProcessor(6, [1, VOCAB + 3]),
    "min_new_tokens": lambda: hf.MinNewTokensLengthLogitsProcessor(3, 4, 2),
    "suppress": lambda: hf.SuppressTokensLogitsProcessor([0, 7, VOCAB - 1]),
    "suppress_at_begin": lambda: hf.SuppressTokensAtBeginLogitsProcessor([0, 7], 5),
    "forced_bos": lambda: hf.ForcedBOSTokenLogitsProcessor(3),
    "forced_eos": lambda: hf.ForcedEOSTokenLogitsProcessor(9, [4, 6]),
    "repetition": lambda: hf.RepetitionPenaltyLogitsProcessor(1.3),
    "repetition, prompt skipped": lambda: hf.RepetitionPenaltyLogitsProcessor(0.7, prompt_ignore_length=4),
    "encoder_repetition": lambda: hf.EncoderRepetitionPenaltyLogitsProcessor(
        1.7, torch.tensor([[1, 2, 2], [3, 4, 9], [0, 39, 5]])
    ),
    "ngram 1": lambda: hf.NoRepeatNGramLogitsProcessor(1),
    "ngram 2": lambda: hf.NoRepeatNGramLogitsProcessor(2),
    "ngram 3": lambda: hf.NoRepeatNGramLogitsProcessor(3),
    "ngram too long": lambda: hf.NoRepeatNGramLogitsProcessor(MAX_LENGTH + 5),
    "sequence_bias": lambda: hf.SequenceBiasLogitsProcessor(
        {(3,): 1.5, (1, 2): -2.25, (5, 2): 0.1, (2, 3, 2): 7.3, (4, 4): 0.3, (0, 1, 4): -0.7, (6, 2): 0.9}
    ),
    "sequence_bias, single": lambda: hf.SequenceBiasLogitsProcessor([[[3], -10.0]]),
    "bad_words": lambda: hf.NoBadWordsLogitsProcessor([[3], [1, 2], [2, 3, 2], [4, 4], [0, 0, 0, 0, 0, 0, 0]], 7),
    "bad_words, only eos": lambda: hf.NoBadWordsLogitsProcessor([[7]], 7),
    "exponential_decay": lambda: hf.ExponentialDecayLengthPenalty((3, 1.2), [2, 9], 4),
    "exponential_decay, falling": lambda: hf.ExponentialDecayLengthPenalty((0, 0.9), 2, 1),
    "remove_invalid": hf.InfNanRemoveLogitsProcessor,
    "normalise": hf.LogitNormalization,
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7, 8, 12, MAX_LENGTH])
def test_scores_are_those_of_transformers(name: str, length: int):
    for seed in range(3):
        assert_as_transformers(PROCESSORS[name](), scores(seed), text(seed, length))


@pytest.mark.parametrize("name", PROCESSORS)
def test_infinite_scores_and_nan_too(name: str):
    given = scores(1)
    # -inf, as an earlier processor leaves it; at an EOS token 5.17's decay makes NaN of it, which we do not follow.
    given[:, [3, 30] if name.startswith("exponential") and not NEWER else [2, 3, 30]] = -math.inf
    assert_as_transformers(PROCESSORS[name](), given, text(1, 8))
    given[0, 11], given[1, 12] = math.nan, math.inf
    assert_as_transformers(PROCESSORS[name](), given, text(1, 8))


@pytest.mark.parametrize("name", PROCESSORS)
def test_rows_of_different_lengths_are_as_rows_of_their_own(name: str):
    if name in ("encoder_repetition",):
        pytest.skip("its ids belong to rows")
    lengths = [3, 9, 8]
    given, (history, _) = scores(2), text(2, 0)
    together = step_for(PROCESSORS[name]())(given, Text(history, torch.tensor(lengths)))
    for row, length in enumerate(lengths):
        alone = PROCESSORS[name]()(history[row : row + 1, :length], given[row : row + 1].clone())
        # Not bit for bit: on one row a softmax may add in another order.
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not NEWER, reason="transformers 5.17 penalises padding")
def test_the_repetition_penalty_skips_the_padding_of_each_row():
    processor = hf.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=torch.tensor([0, 4, 2]))
    assert_as_transformers(processor, scores(3), text(3, 7))


def test_ids_outside_the_logits_are_ignored():
    # An embedding may be larger than the head; 5.17 fails on such a token, later versions do this.
    so_far = text(4, 6)
    so_far.history[0, 2] = VOCAB + 10
    got = step_for(hf.RepetitionPenaltyLogitsProcessor(1.5))(scores(4), so_far)
    so_far.history[0, 2] = so_far.history[0, 1]
    assert torch.equal(got, step_for(hf.RepetitionPenaltyLogitsProcessor(1.5))(scores(4), so_far))
    so_far.history[0, :6] = torch.tensor([1, VOCAB + 1, 2, 3, 4, 1])
    assert torch.equal(step_for(hf.NoRepeatNGramLogitsProcessor(2))(scores(4), so_far)[0], scores(4)[0])


def test_a_decay_leaves_a_forbidden_token_forbidden():
    given = scores(5)
    given[:, 2] = -math.inf
    got = step_for(hf.ExponentialDecayLengthPenalty((0, 2.0), [2, 3], 1))(given, text(5, 9))
    assert got[:, 2].isneginf().all() and (got[:, 3] > given[:, 3]).all() and not got.isnan().any()


def test_encoder_prompts_are_repeated_for_return_sequences():
    ids = torch.tensor([[1, 2], [3, 4]])
    step = step_for(hf.EncoderRepetitionPenaltyLogitsProcessor(2.0, ids), batch=5, rows=4)
    changed = step(torch.ones(5, VOCAB), text(6, 3, batch=5)) != 1
    assert [row.nonzero().flatten().tolist() for row in changed] == [[1, 2], [1, 2], [3, 4], [3, 4], []]


class _Own(hf.LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


class _Subclass(hf.NoRepeatNGramLogitsProcessor):
    pass


HOST: dict[str, tuple[Callable[[], Any], str]] = {
    "a user's": (_Own, "_Own runs on the host"),
    "a subclass": (lambda: _Subclass(2), "_Subclass runs on the host"),
    "calls the user": (lambda: hf.PrefixConstrainedLogitsProcessor(lambda b, t: [1], 1), "PrefixConstrained"),
    "id outside": (lambda: hf.ForcedBOSTokenLogitsProcessor(VOCAB), f"token {VOCAB} of a vocabulary of {VOCAB}"),
    "eos outside": (lambda: hf.ForcedEOSTokenLogitsProcessor(9, [1, 99]), "token 99"),
    "bias outside": (lambda: hf.SequenceBiasLogitsProcessor({(1, 50): 1.0}), "token 50"),
    "decay outside": (lambda: hf.ExponentialDecayLengthPenalty((0, 1.1), 77, 0), "token 77"),
    "overflow": (lambda: hf.ExponentialDecayLengthPenalty((0, 1e300), 1, 0), "grows beyond every float"),
    "no power": (lambda: hf.ExponentialDecayLengthPenalty((0, -1.5), 1, 0), "a factor of -1.5"),
    "prompts": (lambda: hf.EncoderRepetitionPenaltyLogitsProcessor(2.0, torch.ones(2, 3).long()), "2 prompts for 3"),
    "prompt ids": (lambda: hf.EncoderRepetitionPenaltyLogitsProcessor(2.0, torch.tensor([[99]])), "token 99"),
}


@pytest.mark.parametrize("name", HOST)
def test_what_must_run_on_the_host_is_named(name: str):
    make, reason = HOST[name]
    processor = make()
    found = translate_all([hf.NoRepeatNGramLogitsProcessor(2), processor], frame())
    assert isinstance(found, Unsupported) and reason in found.reason and found.processor is processor


def test_an_encoder_penalty_fits_no_other_number_of_rows():
    if not NEWER:
        pytest.skip("5.17 takes no tensor")
    processor = hf.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=torch.tensor([0, 4]))
    assert translate(processor, frame()) == f"has a prompt_ignore_length of shape (2,) for {BATCH} rows"


def test_what_changes_nothing_is_left_out():
    assert translate_all([hf.RepetitionPenaltyLogitsProcessor(1.0)], frame()) == []
