"""Attention modules that go round transformers' interface and are served all the same: one row each.

A row finds its modules by their structure, gives each instance a ``forward`` of its own and the model that makes their
mask a hook; classes stay as they are, and :func:`restore` takes both away.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onegpu.convert.attention import NAME, attention_function
from onegpu.convert.instance import BoundMethod
from onegpu.nn.attention_mask import AttentionMask

_HOOK = "_onegpu_mask_hook"


@dataclass(frozen=True)
class Exceptional:
    """matches: does this module belong to the row. forward: what it does instead. why: for the report."""

    matches: Callable[[nn.Module], bool]
    forward: Callable[..., Any]
    why: str


def _is_falcon(module: nn.Module) -> bool:
    fields = ("query_key_value", "dense", "num_heads", "head_dim", "new_decoder_architecture", "multi_query", "config")
    return all(hasattr(module, name) for name in fields) and not getattr(module.config, "alibi", True)


def _falcon_forward(
    self: Any,
    hidden_states: torch.Tensor,
    alibi: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Falcon's attention, rotary. Keys and values stay one per group of heads, in the cache too."""
    if output_attentions or alibi is not None:
        if isinstance(attention_mask, AttentionMask):  # the class adds it to its scores
            low = torch.finfo(hidden_states.dtype).min
            attention_mask = torch.where(attention_mask.dense(), 0.0, low).to(hidden_states.dtype)
        return type(self).forward(  # type: ignore[no-any-return]
            self, hidden_states, alibi, attention_mask, position_ids, layer_past, use_cache, output_attentions,
            position_embeddings, **kwargs,
        )  # fmt: skip
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    batch, length, _ = hidden_states.shape
    groups, size = self.num_kv_heads, self.head_dim
    # [B, S, groups, heads of a group + its key + its value, D]: for one group, and for as many as heads, the layout of
    # Falcon's older models is this one too.
    fused = self.query_key_value(hidden_states).view(batch, length, groups, -1, size)
    query = fused[..., :-2, :].reshape(batch, length, self.num_heads, size).transpose(1, 2)
    key, value = fused[..., -2, :].transpose(1, 2), fused[..., -1, :].transpose(1, 2)
    assert position_embeddings is not None
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    # As in the class, nothing is dropped here in training.
    out, _ = attention_function(self, query, key, value, attention_mask)
    return self.dense(out.flatten(2)), None


TABLE: tuple[Exceptional, ...] = (Exceptional(_is_falcon, _falcon_forward, "rotary, fused query_key_value"),)


def find(model: nn.Module) -> dict[str, Exceptional]:
    """Names of the modules that a row serves."""
    return {name: row for name, module in model.named_modules() for row in TABLE if row.matches(module)}


def applied(model: nn.Module, name: str) -> bool:
    """A row serves that module already."""
    held = model.get_submodule(name).__dict__
    forwards = (held.get("forward"), held.get("_old_forward"))
    return any(isinstance(f, BoundMethod) and any(f.__func__ is row.forward for row in TABLE) for f in forwards)


def apply(model: nn.Module, found: dict[str, Exceptional]) -> None:
    """Serve these modules."""
    for name, row in found.items():
        module = model.get_submodule(name)
        # accelerate keeps a module's forward under this name, and calls it from its own
        slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
        module.__dict__[slot] = BoundMethod(row.forward, module)
    for maker in _mask_makers(model, found):
        handle = maker.register_forward_pre_hook(_make_mask, with_kwargs=True)
        maker.__dict__[_HOOK] = handle.id


def restore(model: nn.Module) -> list[str]:
    """Take :func:`apply` back. Returns the modules' names."""
    names = []
    for name, module in model.named_modules():
        for slot, forward in [(slot, module.__dict__.get(slot)) for slot in ("forward", "_old_forward")]:
            if isinstance(forward, BoundMethod) and any(forward.__func__ is row.forward for row in TABLE):
                del module.__dict__[slot]
                if slot == "_old_forward":
                    module.__dict__[slot] = type(module).forward.__get__(module)
                names.append(name)
        if (hook := module.__dict__.pop(_HOOK, None)) is not None:
            module._forward_pre_hooks.pop(hook, None)
            module._forward_pre_hooks_with_kwargs.pop(hook, None)
    return names


def _mask_makers(model: nn.Module, found: dict[str, Exceptional]) -> list[nn.Module]:
    """The innermost model around these modules: its forward makes the mask that they get."""
    from transformers import PreTrainedModel

    makers: dict[int, nn.Module] = {}
    for name in found:
        parts = name.split(".")
        around = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts))]
        inner = [part for part in around if isinstance(part, PreTrainedModel)]
        makers.update((id(part), part) for part in inner[-1:])
    return list(makers.values())


def _make_mask(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a model that makes masks by its config's name: give it one of ours, which it takes as it is."""
    from transformers.masking_utils import create_causal_mask

    given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
    given = {**given, **given.pop("kwargs", {})}
    embeds = given.get("inputs_embeds")
    if embeds is None:
        ids = given["input_ids"]  # [B, S]: of the embeddings only the shape, the dtype and the device are asked
        embeds = torch.empty(0, dtype=model.dtype, device=ids.device).expand(*ids.shape, 0)
    config = copy.copy(model.config)
    config._attn_implementation_internal = NAME
    mask = create_causal_mask(
        config, embeds, given.get("attention_mask"), given.get("past_key_values"), given.get("position_ids")
    )
    given.pop("self")
    return (), {**given, "attention_mask": mask}
