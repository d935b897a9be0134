"""The static step: refused with a reason, and checked against an ordinary step before it is trusted."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from onegpu.engine.decoding import Decoding
from onegpu.engine.step import StaticStep
from tests.engine.models import causal_model, ours, pair, prompts
from tests.tiny import PAD, VOCAB_SIZE

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


def watch(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[bool]]:
    """How often a step ran by itself, and of each advance whether the choice behind it was in the same launch."""
    alone, behind = [0], []
    call, advance = StaticStep.__call__, Decoding._advance

    def counted(step: StaticStep) -> torch.Tensor:
        alone[0] += 1
        return call(step)

    def watched(decoding: Decoding, step: StaticStep | None) -> StaticStep | None:
        step = advance(decoding, step)
        behind.append(decoding._drawn is not None)
        return step

    monkeypatch.setattr(StaticStep, "__call__", counted)
    monkeypatch.setattr(Decoding, "_advance", watched)
    return alone, behind


@pytest.mark.parametrize("rows", [2, 3])  # of the step's size, and less than that
def test_a_fused_step_and_the_choice_behind_it_are_one_launch(rows: int, monkeypatch: pytest.MonkeyPatch):
    theirs, model = pair("llama", WAY)
    alone, behind = watch(monkeypatch)
    ids = prompts()[:1].expand(rows, -1)
    expected = theirs.generate(ids, max_new_tokens=16)
    for first in (True, False):
        alone[0], behind[:] = 0, []
        assert torch.equal(model.generate(ids, max_new_tokens=16), expected) and model.generate.report.fused
        assert alone == [int(first)], "only to be compared with an ordinary step, when it is new"
        assert behind == [not first] + [True] * 14


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("sample", [False, True])
def test_one_launch_gives_the_tokens_of_two(rows: int, sample: bool, monkeypatch: pytest.MonkeyPatch):
    sizes = {"hidden_size": 256, "intermediate_size": 192, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=VOCAB_SIZE, eos_token_id=None, pad_token_id=PAD, initializer_range=0.2, **sizes)
    model = ours(LlamaForCausalLM(config).eval().to(torch.bfloat16), ("cuda", "auto"))
    alone, behind = watch(monkeypatch)
    ids = prompts()[:1].expand(rows, -1).cuda()
    made = []
    for launches in (1, 1, 2):
        if launches == 2:
            samplers = model.generate.engine.slots._idle[0].step.samplers
            samplers.update({key: draw._replace(behind=None) for key, draw in samplers.items()})
        alone[0], behind[:] = 0, []
        torch.manual_seed(0)
        arguments = {"do_sample": sample, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        result = model.generate(ids, max_new_tokens=40, **arguments)
        made.append((result.sequences, *result.scores, *result.logits))
        del result  # and with it the memory of the step, which the next call can then have
        assert model.generate.report.fused
        assert (alone[0] > 1) == (launches == 2) == (not behind[-1])
    assert all(map(torch.equal, *made[1:]))  # the first call began with an ordinary step
