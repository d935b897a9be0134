"""The processors for sampling against transformers' own, in the full form and on candidates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as hf

from onegpu.engine import warpers
from onegpu.engine.processors import translate
from tests.sampling_cases import VOCAB, assert_as_transformers, frame, scores, step_for, text

WARPERS: dict[str, Callable[[], Any]] = {
    "temperature": lambda: hf.TemperatureLogitsWarper(0.7),
    "top_k": lambda: hf.TopKLogitsWarper(5),
    "top_k 1": lambda: hf.TopKLogitsWarper(1),
    "top_k, finite": lambda: hf.TopKLogitsWarper(5, filter_value=-3.0),
    "top_k, least": lambda: hf.TopKLogitsWarper(2, min_tokens_to_keep=6),
    "top_p": lambda: hf.TopPLogitsWarper(0.8),
    "top_p 0": lambda: hf.TopPLogitsWarper(0.0),
    "top_p 1": lambda: hf.TopPLogitsWarper(1.0),
    "top_p, least": lambda: hf.TopPLogitsWarper(0.1, min_tokens_to_keep=4),
    "min_p": lambda: hf.MinPLogitsWarper(0.1),
    "min_p 1": lambda: hf.MinPLogitsWarper(1.0),
    "min_p, least": lambda: hf.MinPLogitsWarper(0.9, min_tokens_to_keep=3),
    "typical": lambda: hf.TypicalLogitsWarper(0.6),
    "typical, least": lambda: hf.TypicalLogitsWarper(0.05, min_tokens_to_keep=4),
    "epsilon": lambda: hf.EpsilonLogitsWarper(0.03),
    "epsilon, least": lambda: hf.EpsilonLogitsWarper(0.9, min_tokens_to_keep=4),
    "eta": lambda: hf.EtaLogitsWarper(0.05),
    "eta, least": lambda: hf.EtaLogitsWarper(0.9, min_tokens_to_keep=4),
    "top_h": lambda: hf.TopHLogitsWarper(0.5),
    "top_h 1": lambda: hf.TopHLogitsWarper(1.0),
}


@pytest.mark.parametrize("name", WARPERS)
def test_scores_are_those_of_transformers(name: str):
    for seed in range(20):
        assert_as_transformers(WARPERS[name](), scores(seed), text(seed, 5))


@pytest.mark.parametrize("name", WARPERS)
def test_behind_processors_that_forbid_tokens(name: str):
    for allowed in (1, 3, 20):
        given = scores(allowed)
        given[:, allowed:] = -math.inf
        assert_as_transformers(WARPERS[name](), given, text(0, 5))


@pytest.mark.parametrize("name", [name for name in WARPERS if name != "top_h"])
def test_nan_stays_visible(name: str):
    # top-h: transformers raises there, from a check that asks the host.
    given = scores(0)
    given[1, 7] = math.nan
    assert step_for(WARPERS[name]())(given, text(0, 5))[1].softmax(-1).isnan().all()


@pytest.mark.parametrize("name", WARPERS)
def test_on_a_vocabulary_of_two(name: str):
    if translate(WARPERS[name](), frame(vocab=2)) is not None:
        assert_as_transformers(WARPERS[name](), scores(3, vocab=2), text(0, 5))


def test_what_changes_nothing_is_left_out():
    for processor in (hf.TemperatureLogitsWarper(1.0), hf.TopKLogitsWarper(VOCAB), hf.MinPLogitsWarper(0.0)):
        assert translate(processor, frame()) is None


@pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("rows", [1, 2])
def test_cumulated_is_a_cumulative_sum(rows: int, length: int, device: str):
    given = torch.rand(rows, length, device=device)
    got = warpers.cumulated(given)
    torch.testing.assert_close(got, given.double().cumsum(-1).float(), rtol=1e-5, atol=1e-5)
    assert (got.diff(dim=-1) >= 0).all() and torch.equal(got, warpers.cumulated(given))


def test_blocks_are_scanned_as_on_a_gpu():
    given = torch.rand(1, 5000)
    got = warpers.cumulated_in_blocks(given)
    torch.testing.assert_close(got, given.cumsum(-1), rtol=1e-5, atol=1e-5)
    assert got.shape == given.shape
