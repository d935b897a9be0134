"""Reads a decoder model as what a fused step needs, or declines. See `onegpu.engine.fused_step`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onegpu.engine.fingerprint import runs_python
from onegpu.engine.fused_layers import PARALLEL, SEQUENTIAL, Layer, Layers
from onegpu.engine.fused_modules import Declined, Modules, children, embedding, mentions, positions, unknown
from onegpu.kernels.decode_step import Matrix, Norm

__all__ = ["PARALLEL", "SEQUENTIAL", "Declined", "Layer", "Structure", "read"]


@dataclass(frozen=True)
class Structure:
    """Weights of a model.

    embedding: 16-bit ``[V, E]``, times `scale`. layers. norm: behind the last layer. head. places: learned positions,
    ``[P, D]``, and in which row of them the first is. embedding_norm: behind the embedding. project_in, project_out:
    between E and D, where they differ. cap: logits are cap tanh(logits / cap); 0 for none.
    """

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: Norm | None
    head: Matrix
    scale: float = 1.0
    places: tuple[torch.Tensor, int] | None = None
    embedding_norm: Norm | None = None
    project_in: Matrix | None = None
    project_out: Matrix | None = None
    cap: float = 0.0

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return self.layers[0].qkv.columns

    @property
    def inner(self) -> int:
        """Of the MLP."""
        return self.layers[0].down.columns

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def matrices(self) -> Iterator[Matrix]:
        """All of them."""
        for layer in self.layers:
            yield from (layer.qkv, layer.out, layer.up, layer.down)
        yield from (m for m in (self.head, self.project_in, self.project_out) if m is not None)

    def made(self) -> list[torch.Tensor]:
        """What nobody else may hold: read as the kernels take it, from a model that has it in another form."""
        return [t for layer in self.layers for t in (layer.heads.inv_freq, layer.heads.slopes) if t is not None]


# Factors that some models apply outside of any module.
_FACTORS = {
    "logits_scaling": 1.0, "logit_scale": 1.0, "residual_multiplier": 1.0, "embedding_multiplier": 1.0,
    "attention_multiplier": None, "lm_head_multiplier": 1.0, "scale_emb": 1.0,
}  # fmt: skip
_ROLES = {
    "embed_tokens": "tokens", "embed_in": "tokens", "word_embeddings": "tokens", "wte": "tokens",
    "embed_positions": "places", "wpe": "places", "layers": "layers", "h": "layers",
    "norm": "norm", "final_layer_norm": "norm", "final_layernorm": "norm", "ln_f": "norm",
    "word_embeddings_layernorm": "embedding_norm", "rotary_emb": "rotary", "project_in": "project_in",
    "project_out": "project_out",
}  # fmt: skip


def read(model: Any) -> Structure:
    """The structure of a model.

    Raises:
        Declined: with the reason.
    """
    if model.training:
        raise Declined("the model is in training mode")
    if (reason := runs_python(model)) is not None:
        raise Declined(reason)
    config, parts = model.config, children(model)
    heads = {"lm_head", "embed_out"} & parts.keys()
    if len(heads) != 1 or len(parts) != 2:
        raise unknown(model, parts)
    head = parts.pop(heads.pop())
    trunk: Any = next(iter(parts.values()))
    while list(children(trunk)) == ["decoder"]:
        trunk = trunk.decoder
    roles: dict[str, Any] = {}
    for name, part in children(trunk).items():
        role = _ROLES.get(name)
        if role is None or role in roles:
            raise unknown(trunk, children(trunk))
        roles[role] = part
    if not roles.keys() >= {"tokens", "layers"}:
        raise unknown(trunk, children(trunk))
    return _read(model, config, head, roles)


def _read(model: Any, config: Any, head: nn.Module, roles: dict[str, Any]) -> Structure:
    for name, neutral in _FACTORS.items():
        if getattr(config, name, neutral) not in (neutral, None):
            raise Declined(f"the configuration has {name}")
    cap = getattr(config, "final_logit_softcapping", None) or 0.0
    if cap and not mentions(model, "final_logit_softcapping"):
        raise Declined("the configuration has final_logit_softcapping")
    table, scale = embedding(roles["tokens"])
    modules = Modules(table)
    reader = Layers(modules, roles.get("rotary"), config)
    layers = tuple(reader.layer(module) for module in roles["layers"].children())
    if len(layers) != config.num_hidden_layers:
        raise Declined("another number of layers than the configuration says")
    sizes = {
        (layer.order, layer.heads.query, layer.heads.kv, layer.heads.size, layer.heads.grouped, layer.down.columns)
        for layer in layers
    }
    if len(sizes) != 1:
        raise Declined("layers of several sizes")
    optional: dict[str, Any] = {
        name: reads(roles[name])
        for name, reads in (
            ("norm", modules.norm), ("embedding_norm", modules.norm), ("places", positions),
            ("project_in", modules.matrix), ("project_out", modules.matrix),
        )
        if name in roles
    }  # fmt: skip
    optional.setdefault("norm", None)
    if "places" in optional:
        modules.tensor(optional["places"][0])
    found = Structure(table, layers, head=modules.matrix(head), scale=scale, cap=float(cap), **optional)
    inner = found.project_in.rows if found.project_in else table.shape[1]
    outer = found.project_out.rows if found.project_out else found.width
    if inner != found.width or outer != found.head.columns:
        raise Declined("an embedding or a head of another width")
    if found.places is not None and found.places[0].shape[1] != found.width:
        raise Declined("positions of another width")
    if found.project_in is not None and found.embedding_norm is not None:
        raise Declined("a norm of an embedding that is projected")
    return found
