"""Attention as a conversion: ``optimize`` and ``restore`` of the name in configs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import onegpu
from onegpu.convert.attention_rule import say_left, take_attention
from onegpu.convert.report import Report
from tests.contract import harness
from tests.contract.harness import assert_near
from tests.tiny import tiny_config, tiny_model


def served(report: Report) -> list[str]:
    """The modules whose attention was converted or taken back; norms and MLPs have a test of their own."""
    return [change.name for change in report.swapped if "attention" in f"{change.before} {change.after}"]


def names_of(model) -> list[str | None]:
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [config._attn_implementation for config in configs.values()]


@pytest.mark.parametrize("name", ["llama", "clip", "bart", "falcon_old", "t5"])
@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_restore_is_the_inverse_of_optimize(name, before):
    model = tiny_model(name, attn_implementation=before)
    names, state = names_of(model), {key: dict(module.__dict__) for key, module in model.named_modules()}
    report = onegpu.optimize(model)
    assert bool(served(report)) == (name != "t5")
    onegpu.restore(model)
    assert names_of(model) == names
    for key, module in model.named_modules():
        assert set(module.__dict__) == set(state[key]) and module.forward.__func__ is type(module).forward
        assert not module._forward_pre_hooks and not module._forward_pre_hooks_with_kwargs


def test_a_second_time_changes_nothing():
    for name in ("llama", "falcon_new"):
        model = tiny_model(name)
        assert len(served(onegpu.optimize(model))) == 2
        assert not onegpu.optimize(model).changes
        assert len(onegpu.restore(model).changes) > 0 and "Nothing to restore" in onegpu.restore(model).notes[0]


def test_what_the_user_set_since_then_stays():
    model = tiny_model("llama")
    onegpu.optimize(model)
    model.set_attn_implementation("eager")
    assert not served(onegpu.restore(model)) and model.config._attn_implementation == "eager"
    onegpu.optimize(model)
    assert model.config._attn_implementation == "onegpu"


def test_weights_that_are_asked_for_keep_eager_attention():
    model = tiny_model("bert", attn_implementation="eager", output_attentions=True)
    report = onegpu.optimize(model)
    assert not served(report) and {c.reason for c in report.left} == {"output_attentions asks for the weights"}
    assert model(**harness.text()).attentions[0] is not None


@pytest.mark.parametrize("name", ["llama", "falcon_old", "falcon_new"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_converted_and_restored_on_their_own(name, copied, monkeypatch):
    model = tiny_model(name)
    batch = harness.text()
    before = model(**batch).logits
    onegpu.optimize(model)
    after, other = model(**batch).logits, copied(model)
    onegpu.restore(model)
    with harness.counted(monkeypatch) as calls:
        assert torch.equal(other(**batch).logits, after) and calls.ours == 2
        with torch.no_grad():
            other.get_output_embeddings().weight.zero_()
        assert not other(**batch).logits.any() and torch.equal(model(**batch).logits, before)
        assert calls.ours == 4  # the copy's
    onegpu.restore(other)
    with harness.counted(monkeypatch) as calls:
        other(**batch)
    assert not calls.ours


def test_a_model_that_is_only_partly_served():
    model = tiny_model("siglip")
    report = onegpu.optimize(model)
    assert {change.before for change in report.left} == {"MultiheadAttention"} and len(served(report)) == 4
    shown = str(report)
    assert "SiglipAttention (sdpa)" in shown and "onegpu attention" in shown and "attends outside" in shown


def test_what_is_left_is_said(caplog):
    model = tiny_model("bloom")
    say_left(onegpu.optimize(model), model)
    assert [record.message for record in caplog.records] == [
        "FlashAttention does not serve all of BloomForCausalLM "
        "(BloomAttention: attends outside transformers' attention interface)"
    ]
    caplog.clear()
    say_left(Report("optimize"), model)
    assert not caplog.records


def test_names_are_taken_out_of_a_config():
    config = tiny_config("clip")
    assert not take_attention(config)
    config.vision_config._attn_implementation = "flash_attention_2"
    config.text_config._attn_implementation = "eager"
    assert take_attention(config)
    assert config.vision_config._attn_implementation is None and config.text_config._attn_implementation == "eager"


def test_generation_of_an_encoder_decoder():
    eager, ours = tiny_model("bart", attn_implementation="eager"), tiny_model("bart")
    onegpu.optimize(ours)
    batch = harness.text(padding="right")
    for beams in (1, 3):
        options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
        assert torch.equal(ours.generate(**batch, **options), eager.generate(**batch, **options))


def test_a_quantised_model_keeps_its_attention_through_dequantize():
    model = tiny_model("llama")
    batch = harness.text()
    onegpu.optimize(model, quantize="nf4")
    answer = model(**batch).logits
    model.dequantize()
    assert model.config._attn_implementation == "onegpu"
    assert_near(model(**batch).logits, answer)
    onegpu.restore(model)
    assert model.config._attn_implementation == "sdpa"
