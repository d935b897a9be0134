"""Which modules may call our attention, read off their classes."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.bert.modeling_bert import BertAttention, BertSelfAttention
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS, LlamaAttention, LlamaMLP
from transformers.models.t5.modeling_t5 import T5Attention

from onegpu.convert.admission import calls_of, examine
from tests.contract.harness import LEFT, SERVED
from tests.tiny import tiny_model


def test_calls_of_the_interface():
    assert dict(calls_of(LlamaAttention))["scaling"] == "self.scaling"
    assert dict(calls_of(Gemma2Attention))["softcap"] == "self.attn_logit_softcapping"
    assert "position_bias" in dict(calls_of(T5Attention)) and calls_of(BertSelfAttention) is not None
    for cls in (BertAttention, BloomAttention, LlamaMLP, nn.MultiheadAttention, nn.Linear):
        assert calls_of(cls) is None


class InheritedAttention(LlamaAttention):
    """Attends as its base does."""


class UnknownAttention(LlamaAttention):
    """Hands the interface something of its own."""

    extra = None

    def forward(self, hidden_states, **kwargs):
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        return attention_interface(self, hidden_states, hidden_states, hidden_states, None, extra=self.extra)


class ByItselfAttention(nn.Module):
    """Attends on its own, with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states, attention_mask=None):
        return hidden_states


def llama() -> LlamaForCausalLM:
    return tiny_model("llama")


def only(model):
    (group,) = examine(model).groups
    return group


def test_subclasses():
    model = llama()
    model.model.layers[0].self_attn = InheritedAttention(model.config, 0)
    group = only(model)
    assert not group.reasons and len(group.modules) == 2


def test_what_a_module_hands_over_must_be_known_or_none():
    model = llama()
    model.model.layers[1].self_attn = UnknownAttention(model.config, 1)
    assert not only(model).reasons  # extra is None
    model.model.layers[1].self_attn.extra = 3
    assert only(model).reasons == ["UnknownAttention passes extra"]


def test_one_that_attends_by_itself_keeps_its_config_from_the_name():
    model = llama()
    model.model.layers[1].self_attn = ByItselfAttention()
    examination = examine(model)
    assert list(examination.outside) == ["model.layers.1.self_attn"]
    assert examination.groups[0].reasons == ["ByItselfAttention beside it attends outside the interface"]


def test_a_class_that_says_it_cannot(monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    assert only(llama()).reasons == ["LlamaForCausalLM does not support scaled dot-product attention"]


def test_a_model_without_attention():
    examination = examine(nn.Sequential(nn.Linear(4, 4)))
    assert not examination.groups and not examination.outside


@pytest.mark.parametrize("name", [*SERVED, *LEFT])
def test_every_type_of_the_contract_is_sorted_without_a_run(name):
    examination = examine(tiny_model(name))
    served = [group for group in examination.groups if not group.reasons]
    assert bool(served) == (name in SERVED and not name.startswith("falcon"))


def test_nothing_is_changed():
    model = llama()
    before = dict(vars(model.config))
    examine(model)
    assert vars(model.config) == before and isinstance(model.config, LlamaConfig)
