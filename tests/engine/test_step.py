"""The static step: refused with a reason, and checked against an ordinary step before it is trusted."""

from __future__ import annotations

import torch

from tests.engine.models import causal_model, ours, pair, prompts

WAY = ("cpu", "emulate")


def test_a_number_that_the_model_keeps_on_the_host_is_noticed():
    theirs, model = pair("llama", WAY)
    for one in (theirs, model):
        attention = type(one.model.layers[0].self_attn)
        made = type("Counting", (attention,), {"forward": counting(attention)})
        for layer in one.model.layers:
            layer.self_attn.__class__ = made
    ids = prompts()[:2]
    expected = theirs.generate(ids, max_new_tokens=16)
    assert torch.equal(model.generate(ids, max_new_tokens=16), expected)
    assert model.generate.report.loop == "eager" and "not those of an ordinary step" in str(model.generate.report)


def counting(attention):
    """A forward whose result depends on how many keys the cache shows, read from a shape."""

    def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
        output, weights = attention.forward(self, hidden_states, *args, past_key_values=past_key_values, **kwargs)
        return output * (1 + 0.01 * past_key_values.layers[self.layer_idx].keys.shape[2]), weights

    return forward


def test_a_reason_is_found_once():
    model = ours(causal_model("mpt"), WAY)
    for _ in range(2):
        model.generate(prompts(), max_new_tokens=12)
        assert "waits for the device" in str(model.generate.report)
    assert len(model.generate.engine.refusals) == 1


def test_short_answers_are_not_worth_a_capture():
    model = ours(causal_model("llama"), WAY)
    model.generate(prompts(), max_new_tokens=4)
    assert model.generate.report.loop == "eager"
    model.generate(prompts(), max_new_tokens=16)
    model.generate(prompts(), max_new_tokens=4)
    assert model.generate.report.loop == "captured", "but one that is there is used"


def test_nan_of_an_earlier_request_does_not_come_back():
    theirs, model = pair("llama", WAY)
    ids = prompts()[:2]
    model.generate(ids, max_new_tokens=60)
    with torch.no_grad():
        kept = model.model.layers[0].self_attn.v_proj.weight.clone()
        model.model.layers[0].self_attn.v_proj.weight.fill_(torch.nan)
        model.generate(ids, max_new_tokens=60)
        model.model.layers[0].self_attn.v_proj.weight.copy_(kept)
    assert torch.equal(model.generate(ids[:, :9], max_new_tokens=30), theirs.generate(ids[:, :9], max_new_tokens=30))
    assert model.generate.report.loop == "captured"


def test_batches_are_padded_to_steps_that_are_there():
    theirs, model = pair("llama", WAY)
    model.generate(prompts(), max_new_tokens=16)
    step = model.generate.engine.slots._idle[0].step
    assert step.input_ids.shape == (4, 1)
    ids = torch.cat([prompts(), prompts()[:1].flip(1)])
    assert torch.equal(model.generate(ids, max_new_tokens=16), theirs.generate(ids, max_new_tokens=16))
    assert model.generate.engine.slots._idle[0].step is step
