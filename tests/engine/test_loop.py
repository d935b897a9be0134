"""What a request needs, and how the report puts it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from onegpu.engine.loop import Engine, Run
from tests.engine.models import LENGTHS, causal_model, ours, padded, pair, prompts


def test_reports_are_sentences():
    assert str(Run("captured")) == "generate(): onegpu's loop, one CUDA graph a step"
    assert str(Run("eager", "autocast is on")) == "generate(): onegpu's loop, steps in Python (autocast is on)"
    assert "transformers' loop" in str(Run("transformers", "num_beams=2"))


def test_an_engine_is_not_copied():
    engine = Engine("never")
    engine.refusals["x"] = "y"
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert other.capture == "never" and not other.refusals and other.slots is not engine.slots


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda model: model.train(), "training mode"),
        (lambda model: model.model.norm.register_forward_hook(lambda *_: None), "hook"),
        (lambda model: setattr(model.generate.engine, "capture", "auto"), "no graphs on cpu"),
    ],
)
def test_why_a_step_is_not_captured(prepare, reason):
    model = ours(causal_model("llama"), ("cpu", "emulate"))
    prepare(model)
    model.generate(prompts(), max_new_tokens=12)
    assert model.generate.report.loop == "eager" and reason in model.generate.report.reason


def test_autocast_runs_eagerly():
    theirs, model = pair("llama", ("cpu", "emulate"))
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = theirs.generate(prompts(), max_new_tokens=12), model.generate(prompts(), max_new_tokens=12)
    assert torch.equal(got, expected) and model.generate.report.reason == "autocast is on"


def test_memory_is_for_the_final_length():
    model = ours(causal_model("llama"), ("cpu", "never"))
    ids, mask = padded("left")
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=200, return_dict_in_generate=True)
    layer = out.past_key_values.layers[0]
    assert layer.in_memory() and layer.memory[0].shape == (3, 2, 256, 16)
    assert layer.get_seq_length() == LENGTHS[-1] + 199
    more = model.generate(
        torch.cat([out.sequences, ids[:, :5]], 1), past_key_values=out.past_key_values, max_new_tokens=30
    )
    assert more.shape[1] == LENGTHS[-1] + 235 and out.past_key_values.get_seq_length() == more.shape[1] - 1


def test_a_row_of_nothing_but_padding_does_no_harm():
    theirs, model = pair("llama", ("cpu", "emulate"))
    ids, mask = padded("right")
    mask[1] = 0
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12)
    alone = theirs.generate(ids[:1, : LENGTHS[0]], max_new_tokens=12)
    assert torch.equal(out[0, LENGTHS[-1] :], alone[0, LENGTHS[0] :])
