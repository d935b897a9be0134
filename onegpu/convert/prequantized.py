"""In a checkpoint already quantised the file decides: which weights are, in which format, read from its headers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open

from onegpu.convert.names import check_expert_names, model_names
from onegpu.convert.quantized import Target, _candidates, part_names
from onegpu.convert.report import Change
from onegpu.errors import CheckpointError
from onegpu.formats.bitsandbytes import STATE_KEYS, QuantizedEntry, Settings, find_quantized
from onegpu.formats.checkpoint import TensorInfo


def file_targets(
    model: Any, headers: list[TensorInfo], settings: Settings
) -> tuple[list[Target], list[Change], Settings]:
    """Which weights of ``model`` (on the meta device) the file holds quantised, and how.

    Raises:
        CheckpointError: a quantised tensor belongs to nothing in the model that can hold one, or only some experts of a
            stack are quantised.
    """
    entries = find_quantized(headers, settings.bits)
    names = model_names(model, entries)
    check_expert_names(model, names, headers[0].file)
    candidates = {name: (kind, shown) for name, kind, shown in _candidates(model)}
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    targets: dict[str, Target] = {}
    counts: dict[str, int] = {}
    for entry in entries.values():
        name = names[entry.name].name
        owner = name if candidates.get(name, ("", ""))[0] == "experts" else name.removesuffix(".weight")
        if owner not in candidates and not same_class and not entry.name.startswith(f"{model.base_model_prefix}."):
            continue  # a head, and the model was asked for without
        if owner not in candidates:
            raise CheckpointError(
                file=entry.tensors["weight"].file,
                tensor=entry.name,
                reason=f"is quantised, but {type(model).__name__} has no linear layer of that name",
                fix="load it with the model class that its config.json names",
            )
        kind = candidates[owner][0]
        counts[owner] = counts.get(owner, 0) + 1
        targets[owner] = Target(owner, kind, part_names(model, owner) if kind == "experts" else ())
    for owner, target in targets.items():
        if target.kind == "experts":
            expected = model.get_parameter(owner).shape[0] * len(target.names)
            if counts[owner] != expected:
                raise CheckpointError(
                    file=headers[0].file,
                    tensor=owner,
                    reason=f"{counts[owner]} of {expected} expert matrices are quantised; there must be all or none",
                )
    left = [
        Change(name, shown, None, "not quantised in the file")
        for name, (_, shown) in candidates.items()
        if name not in targets
    ]
    return list(targets.values()), left, _file_settings(next(iter(entries.values())), settings)


def _file_settings(entry: QuantizedEntry, settings: Settings) -> Settings:
    """Type, double quantisation and storage as the file's first quantised weight has them; config.json may be wrong."""
    if settings.bits == 8:
        return settings
    key = next(f"weight.{key}" for key in STATE_KEYS if f"weight.{key}" in entry.tensors)
    info = entry.tensors[key]
    with safe_open(info.file, framework="pt") as file:
        blob = bytes(file.get_tensor(info.name).tolist())
    with safe_open(entry.tensors["weight"].file, framework="pt") as file:  # another shard, where one ends between them
        storage = file.get_tensor(entry.name).dtype
    try:
        quant_type = json.loads(blob)["quant_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            file=info.file, tensor=info.name, reason=f"is no quant_state ({error})", fix="save the checkpoint again"
        ) from None
    if not key.endswith(f"__{quant_type}"):
        raise CheckpointError(
            file=info.file, tensor=info.name, reason=f"its name says one type, its content {quant_type!r}"
        )
    return replace(
        settings,
        quant_type=quant_type,
        double_quant="weight.nested_absmax" in entry.tensors,
        quant_storage=storage if storage != torch.uint8 else settings.quant_storage,
    )
