"""In which order a layer calls its parts, and what attention and MLP are read as."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from onegpu.engine.fused_layers import BEHIND, PARALLEL, SEQUENTIAL, Layers, order_of
from onegpu.engine.fused_modules import Declined, Modules, embedding
from onegpu.engine.fused_structure import read
from tests.decode_models import decoder

ORDERS = {
    "llama": (SEQUENTIAL, ("input_layernorm", None, "post_attention_layernorm", None)),
    "gemma2": (
        SEQUENTIAL,
        (
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
        ),
    ),
    "olmo2": (SEQUENTIAL, (None, "post_attention_layernorm", None, "post_feedforward_layernorm")),
    "falcon-40b": (PARALLEL, ("ln_attn", None, "ln_mlp", None)),
    "phi": (PARALLEL, ("input_layernorm", None, "input_layernorm", None)),
    "gpt_neox": (PARALLEL, ("input_layernorm", None, "post_attention_layernorm", None)),
    "bloom": (SEQUENTIAL, ("input_layernorm", None, "post_attention_layernorm", None)),
    "opt": (SEQUENTIAL, ("self_attn_layer_norm", None, "final_layer_norm", None)),
    "opt-350m": (BEHIND, (None, "self_attn_layer_norm", None, "final_layer_norm")),
}  # fmt: skip


def layers_of(model: Any) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def parts_of(layer: Any) -> tuple[str, tuple[str, ...], list[str]]:
    names = [name for name, child in layer.named_children() if type(child) is not nn.Dropout]
    attention = next(name for name in names if "att" in name and "norm" not in name and not name.startswith("ln_"))
    mlp = ("mlp",) if "mlp" in names else ("fc1", "activation_fn", "fc2")
    return attention, mlp, [name for name in names if name not in {attention, *mlp}]


@pytest.mark.parametrize("name", ORDERS)
def test_orders(name: str) -> None:
    layer = layers_of(decoder(name))[0]
    assert order_of(layer, *parts_of(layer)) == ORDERS[name]


class Other(nn.Module):
    """A layer that does something else with its parts."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(4), nn.LayerNorm(4)
        self.self_attn, self.mlp = nn.Identity(), nn.Identity()

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any) -> Any:
        h = (
            hidden_states
            + (0.5 if self.what == "scaled" else 1.0) * self.self_attn(self.input_layernorm(hidden_states))[0]
        )
        if self.what == "twice":
            h = h + self.mlp(self.post_attention_layernorm(h))
        if self.what == "fails":
            return attention_mask.shape
        return h + self.mlp(self.post_attention_layernorm(h)) * (2 if self.what == "doubled" else 1)


@pytest.mark.parametrize("what", ["scaled", "twice", "doubled", "fails"])
def test_other_orders_are_declined(what: str) -> None:
    with pytest.raises(Declined, match="Other"):
        order_of(Other(what), "self_attn", ("mlp",), ["input_layernorm", "post_attention_layernorm"])
    assert (
        order_of(Other(""), "self_attn", ("mlp",), ["input_layernorm", "post_attention_layernorm"]).kind == SEQUENTIAL
    )


def test_numbers_of_attention() -> None:
    gemma = read(decoder("gemma2"))
    windows = [layer.heads.window for layer in gemma.layers]
    assert windows == [16, None]
    assert (gemma.layers[0].heads.cap, gemma.cap, gemma.layers[0].heads.scale) == (2.0, 5.0, 0.1)
    model = decoder("gemma2")
    model.config._attn_implementation = "sdpa"
    assert read(model).layers[0].heads.cap == 0.0
    neox = read(decoder("gpt_neox")).layers[0].heads
    assert neox.inv_freq is not None
    assert (neox.grouped, neox.size, 2 * neox.inv_freq.numel()) == (True, 80, 20)
    falcon = read(decoder("falcon-7b")).layers[0]
    assert (falcon.heads.query, falcon.heads.kv) == (9, 1)
    assert falcon.both is not None
    assert falcon.both.rows == falcon.qkv.rows + falcon.up.rows
    assert read(decoder("olmo")).layers[0].heads.clip == 0.5
    bloom = read(decoder("bloom")).layers[0].heads
    assert bloom.slopes is not None
    assert bloom.slopes.tolist() == [2.0**-4, 2.0**-8]
    assert bloom.rounded


def _capped(model: Any) -> None:
    model.config.attn_logit_softcapping = 50.0


def _clipped(model: Any) -> None:
    model.config.clip_qkv = 1.0


def _without_function(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = None


def _of_heads(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.num_key_value_groups = 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_capped, "attn_logit_softcapping"), (_clipped, "clip_qkv"), (_without_function, "activation"),
        (_of_heads, "another form"),
        (lambda m: m.model.layers[0].self_attn.add_module("q_norm", nn.RMSNorm(64)), "q_norm"),
        (lambda m: m.model.layers[0].add_module("extra", nn.Linear(4, 4)), "norm of another form"),
        (lambda m: setattr(m.model.layers[0].self_attn, "scaling", None), "another form"),
        (lambda m: setattr(m.model.layers[0].self_attn, "sliding_window", "all"), "sliding window"),
    ],
)  # fmt: skip
def test_layers_that_compute_something_else_are_declined(change: Any, reason: str) -> None:
    model = decoder("llama")
    change(model)
    modules = Modules(embedding(model.model.embed_tokens)[0])
    reader = Layers(modules, model.model.rotary_emb, model.config)
    with pytest.raises(Declined, match=reason):
        [reader.layer(layer) for layer in model.model.layers]
