"""Falcon: the one row of the table."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import onegpu
from onegpu.convert import exceptions
from tests.contract import harness
from tests.contract.harness import assert_near
from tests.tiny import tiny_model


@pytest.mark.parametrize("overrides", [{}, {"multi_query": False}], ids=["multi query", "as many"])
def test_older_layouts(overrides):
    model, ours = tiny_model("falcon_old", **overrides), tiny_model("falcon_old", **overrides)
    assert [c.after for c in onegpu.optimize(ours).swapped].count("onegpu attention") == 2
    batch = harness.text(padding="left")
    real = batch["attention_mask"].bool()
    assert_near(ours(**batch).logits[real], model(**batch).logits[real])


def test_the_cache_holds_one_key_for_each_group():
    model = tiny_model("falcon_new")
    theirs = model(**harness.text()).past_key_values
    onegpu.optimize(model)
    cache = model(**harness.text()).past_key_values
    assert theirs.layers[0].keys.shape[1] == 8 and cache.layers[0].keys.shape[1] == 4


def test_alibi_is_not_taken():
    assert not exceptions.find(tiny_model("falcon_alibi"))
    assert len(exceptions.find(tiny_model("falcon_old"))) == 2


@pytest.mark.parametrize("padding", [None, "left"])
def test_weights_come_from_the_class(padding):
    model = tiny_model("falcon_old", attn_implementation="eager")
    batch = harness.text(padding=padding)
    real = batch["attention_mask"].bool()
    before = model(**batch, output_attentions=True)
    onegpu.optimize(model)
    after = model(**batch, output_attentions=True)
    assert len(after.attentions) == 2 and after.attentions[0].shape == (2, 4, 14, 14)
    assert_near(after.logits[real], before.logits[real])


def test_hooks_of_accelerate_stay(monkeypatch):
    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, hook = tiny_model("falcon_old"), Counting()
    expected = model(**harness.text()).logits
    attention = model.transformer.h[0].self_attention
    add_hook_to_module(attention, hook)
    onegpu.optimize(model)
    with harness.counted(monkeypatch) as calls:
        assert_near(model(**harness.text()).logits, expected)
    assert hook.calls == 1 and calls.ours == 2
    onegpu.restore(model)
    assert torch.equal(model(**harness.text()).logits, expected) and hook.calls == 2
    remove_hook_from_module(attention)
    assert torch.equal(model(**harness.text()).logits, expected) and hook.calls == 2


def test_a_mask_of_the_users_own(monkeypatch):
    eager, ours = tiny_model("falcon_old", attn_implementation="sdpa"), tiny_model("falcon_old")
    onegpu.optimize(ours)
    ids = harness.text(length=6)["input_ids"]
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    seen[3:, 1] = False
    mask = seen[None, None].expand(2, 1, 6, 6)
    assert_near(ours(ids, attention_mask=mask).logits, eager(ids, attention_mask=mask).logits)
    with harness.counted(monkeypatch) as calls:
        ours(inputs_embeds=ours.transformer.word_embeddings(ids))
        ours.transformer(ids, None)
    assert calls.ours == 4 and not calls.sdpa
