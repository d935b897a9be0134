"""``optimize`` binds our loop, ``restore`` takes it away."""

from __future__ import annotations

import pytest
import torch

from onegpu import optimize, restore
from onegpu.engine.generate import Generate, attach
from onegpu.errors import ArgumentError
from tests.engine.models import prompts
from tests.tiny import tiny_model


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_optimize_binds_and_restore_gives_back(kind):
    model = tiny_model("llama")
    report = optimize(model, quantize=kind)
    assert isinstance(model.generate, Generate) and "onegpu's loop" in str(report)
    expected = type(model).generate(model, prompts(), max_new_tokens=8)
    assert torch.equal(model.generate(prompts(), max_new_tokens=8), expected)
    restore(model)
    assert "generate" not in model.__dict__
    assert torch.equal(model.generate(prompts(), max_new_tokens=8), expected)
    assert "generate" not in model.__dict__


def test_the_report_says_where_transformers_loop_stays():
    report = optimize(tiny_model("t5"))
    assert "transformers' own: encoder-decoder" in str(report)
    assert "generate()" not in str(optimize(torch.nn.Sequential(torch.nn.Linear(4, 4))))


def test_restore_of_a_loaded_model_says_what_it_did():
    model = tiny_model("llama")
    attach(model)  # what our Auto classes do
    assert "transformers' own again" in str(restore(model)) and "generate" not in model.__dict__


@pytest.mark.parametrize("function", [optimize, restore])
def test_what_is_no_model_is_named(function):
    with pytest.raises(ArgumentError, match=r"^model='gpt2' is no module\. pass a model that is loaded"):
        function("gpt2")
