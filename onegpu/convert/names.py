"""Which parameter of a model each tensor of a checkpoint feeds, by transformers' own renaming."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from onegpu.convert.quantized import mergeable
from onegpu.errors import CheckpointError

_AGAIN = "download or save the checkpoint again"


@dataclass(frozen=True)
class Fed:
    """name: in the model's state dict (or what it would be there). converter: the conversion on the way, if any."""

    name: str
    converter: Any = None


def model_names(model: Any, names: Iterable[str]) -> dict[str, Fed]:
    """For each checkpoint name what it feeds in ``model`` (which may be on the meta device)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_source = {source: converter for converter in converters for source in converter.source_patterns}
    prefix, state = model.base_model_prefix, model.state_dict()
    result = {}
    for name in sorted(names, key=dot_natural_key):  # the loader's order: some renamings remember what came before
        renamed, source = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, source = name, None
        if renamed not in state and ".experts." in renamed:
            # Our own name for a stack that transformers does not merge: `experts.3.down_proj.weight`.
            head, _, tail = renamed.partition(".experts.")
            renamed = f"{head}.experts.{tail.partition('.')[2].removesuffix('.weight')}"
            if renamed not in state:  # a base model's checkpoint in the whole model, or the other way round
                shorter = renamed.removeprefix(f"{prefix}.")
                renamed = next((n for n in (shorter, f"{prefix}.{renamed}") if n in state), renamed)
        result[name] = Fed(renamed, by_source[source] if source is not None else None)
    return result


def missing_and_unexpected(model: Any, fed: Iterable[Fed]) -> tuple[list[str], list[str]]:
    """Tensors that the model needs and nothing feeds, and those fed that it does not have; less what it lets pass."""
    state = set(model.state_dict())
    given: set[str] = set()
    for entry in fed:
        given.add(entry.name)
        if entry.converter is not None:  # one tensor can become several
            first, *others = entry.converter.target_patterns
            given |= {entry.name.replace(first, other) for other in others}
    for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if given & set(pair):
            given |= set(pair)
    info = SimpleNamespace(missing_keys=state - given, unexpected_keys=given - state)
    model._adjust_missing_and_unexpected_keys(info)
    return sorted(info.missing_keys), sorted(info.unexpected_keys)


def check_expert_names(model: Any, fed: dict[str, Fed], file: str) -> None:
    """Raise ``CheckpointError`` unless every merged stack of experts has each of its matrices once, by its exact name.

    The loader merges matrices in the order of their sorted names and takes the dots of its patterns for any character:
    a damaged name would put an expert in another's place.
    """
    state = model.state_dict()
    found: dict[str, set[tuple[int, int]]] = {}
    parts: dict[str, int] = {}
    for name, entry in fed.items():
        leaf = entry.name.rpartition(".")[2]
        if entry.name not in state:
            continue
        if mergeable(entry.converter):
            patterns = entry.converter._original_source_patterns
        elif leaf != "weight" and name.endswith(".weight") and state[entry.name].dim() == 3:
            patterns = [f".experts.*.{leaf}.weight"]  # our own names
        else:
            continue
        parts[entry.name] = len(patterns)
        for part, pattern in enumerate(patterns):
            match = re.search(re.escape(pattern).replace(r"\*", r"(0|[1-9][0-9]*)") + "$", name)
            if match is not None:
                found.setdefault(entry.name, set()).add((int(match[1]), part))
                break
        else:
            raise CheckpointError(file=file, tensor=name, reason="is no name of an expert's matrix", fix=_AGAIN)
    for stack, matrices in found.items():
        needed = {(expert, part) for expert in range(state[stack].shape[0]) for part in range(parts[stack])}
        if matrices != needed:
            reason = f"{len(matrices & needed)} of its {len(needed)} expert matrices are there"
            raise CheckpointError(file=file, tensor=stack, reason=reason, fix=_AGAIN)
