"""What a fused step recognises, and what it declines, by structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from onegpu import nn as onegpu_nn
from onegpu.engine.fused_structure import Declined, read
from tests.engine.models import causal_model
from tests.tiny import tiny_model

OTHERS = [
    ("Granite", {}), ("Glm", {"head_dim": 16}), ("Glm4", {"head_dim": 16}), ("Cohere", {}), ("Persimmon", {}),
    ("Helium", {"head_dim": 16}), ("Arcee", {}), ("Ernie4_5", {"head_dim": 16}), ("Nemotron", {}), ("GPTJ", {}),
    ("BitNet", {}), ("Phi", {"qk_layernorm": True}), ("Bloom", {"apply_residual_connection_post_layernorm": True}),
]  # fmt: skip


def small(name: str, **changed: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, **changed,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def test_a_models_numbers_are_read() -> None:
    found = read(tiny_model("mistral"))
    heads = found.layers[0].heads
    assert (found.width, found.inner, len(found.layers), found.head.rows) == (64, 112, 2, 128)
    assert (heads.query, heads.kv, heads.size, heads.window) == (8, 2, 8, 32)
    assert found.layers[0].act == "silu"


def test_weights_are_the_models_own_memory() -> None:
    model = causal_model("phi3")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = read(model)
    weights = [part.weight for m in found.matrices() for part in m.parts]
    assert len(weights) == 2 * 5 + 1  # gate and up are two views
    assert {w.untyped_storage().data_ptr() for w in weights} <= own


@pytest.mark.parametrize(("name", "changed"), OTHERS, ids=[name for name, _ in OTHERS])
def test_models_that_compute_something_else_are_declined(name: str, changed: dict[str, Any]) -> None:
    with pytest.raises(Declined):
        read(small(name, **changed))


def _halved(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.data = torch.zeros(64, 224)[:, ::2]


def _hooked(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


def _adapted(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.add_module("lora_A", nn.Linear(64, 2))


def _scaled(model: Any) -> None:
    model.model.layers[0].residual_multiplier = 0.5


def _gained(model: Any) -> None:
    norm = model.model.norm
    norm.__class__ = type("Other", (type(norm),), {"forward": lambda self, x: x * (1 + self.weight)})


def _mixed(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = onegpu_nn.LinearNF4(64, 112, bias=False).to("cpu")


def _double(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.double()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.train(), "training"), (_halved, "one piece"), (_hooked, "hook"), (_adapted, "lora_A"),
        (_scaled, "residual_multiplier"), (_gained, "norm"), (_mixed, "several formats"), (_double, "dtypes"),
        (lambda m: setattr(m.config, "logits_scaling", 8.0), "logits_scaling"),
        (lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.Tanh()), "Tanh"),
        (lambda m: setattr(m.model.rotary_emb, "rope_type", "dynamic"), "rotary"),
        (lambda m: setattr(m.config, "final_logit_softcapping", 30.0), "final_logit_softcapping"),
        (lambda m: setattr(m.config, "num_hidden_layers", 3), "number of layers"),
        (lambda m: m.model.add_module("embed_positions", nn.Embedding(8, 32)), "positions of another width"),
        (lambda m: m.model.add_module("project_out", nn.Linear(64, 32)), "another width"),
        (lambda m: m.model.add_module("extra", nn.Linear(2, 2)), "extra"),
    ],
)  # fmt: skip
def test_changed_models_are_declined(change: Any, reason: str) -> None:
    model = tiny_model("llama")
    change(model)
    with pytest.raises(Declined, match=reason):
        read(model)
