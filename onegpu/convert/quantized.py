"""The structural rule for quantised weights: which modules of a model get one, and what takes their place.

A linear is anything that *is* an ``nn.Linear`` (subclasses too: Falcon's projections are one) or transformers'
``Conv1D``, which stores its weight transposed. Experts are 3-D parameters of a module that transformers marks as a
collection of experts. Left alone: tied weights, output embeddings, what the model keeps in float32, the user's list.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onegpu.convert.report import Change
from onegpu.formats.bitsandbytes import Settings
from onegpu.nn import ExpertStack4bit, ExpertStack8bit, Linear4bit, Linear8bitLt
from onegpu.nn.experts import ExpertStack


@dataclass(frozen=True)
class Target:
    """One weight to quantise. kind: "linear" or "experts"; names: see :class:`ExpertStack`."""

    name: str
    kind: str
    names: tuple[str, ...] = ()


def is_conv1d(module: nn.Module) -> bool:
    """transformers' ``Conv1D``: a linear layer with its weight stored ``[in, out]``."""
    return is_conv1d_class(type(module))


def is_conv1d_class(source: type) -> bool:
    """Whether a class is transformers' ``Conv1D``."""
    from transformers.pytorch_utils import Conv1D

    return issubclass(source, Conv1D)


def find_targets(model: Any, settings: Settings) -> tuple[list[Target], list[Change]]:
    """What of ``model`` is quantised under ``settings``, and what is left, with the reason."""
    skip = default_skips(model) if settings.keep_default_skips else {}
    skip |= dict.fromkeys(settings.skip, "in the skip list")
    targets, left = [], []
    for name, kind, shown in _candidates(model):
        reason = _skip_reason(name, skip)
        if reason is not None:
            left.append(Change(name, shown, None, reason))
        elif kind == "experts":
            targets.append(Target(name, kind, part_names(model, name)))
        else:
            targets.append(Target(name, kind))
    return targets, left


def _candidates(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    quantized = (Linear4bit, Linear8bitLt)
    for name, module in model.named_modules():
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and not isinstance(module, quantized):
            yield name, "linear", type(module).__name__
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and _is_experts(module, parameter):
                yield f"{name}.{parameter_name}".lstrip("."), "experts", type(module).__name__


def _is_experts(module: nn.Module, parameter: torch.Tensor) -> bool:
    """transformers' mark on a collection of experts (``use_experts_implementation``), whose forward takes stack[e]."""
    count = getattr(module, "num_experts", None)
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate") and count == parameter.shape[0]


def default_skips(model: Any) -> dict[str, str]:
    """Modules that stay as they are unless told otherwise, with the reason; the same as transformers' own."""
    skip: dict[str, str] = {}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for key in (*tied.keys(), *tied.values()):
        skip[key.removesuffix(".weight")] = "tied weights"
    parameters = [name for name, _ in model.named_parameters()]
    if parameters and _is_transformers(model):
        skip.setdefault(parameters[-1].removesuffix(".weight"), "last module")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if head is not None and module is head:
            skip[name] = "output embeddings"
    for name in getattr(model, "_keep_in_fp32_modules", None) or ():
        skip[name] = "kept in float32 by the model"
    return skip


def _is_transformers(model: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _skip_reason(name: str, skip: dict[str, str]) -> str | None:
    """A key matches a whole name, a leading or trailing part of it, or its last component; ``*`` is any text.

    Literal but for ``*``: transformers takes these keys as regular expressions, also those of a downloaded file.
    """
    for key, reason in skip.items():
        escaped = key.replace("[", "[[]").replace("?", "[?]")
        if any(
            fnmatch.fnmatchcase(name, pattern)
            for pattern in (escaped, f"{escaped}.*", f"*.{escaped}", f"*.{escaped}.*")
        ):
            return reason
    return None


def part_names(model: Any, parameter: str) -> tuple[str, ...]:
    """Checkpoint names of the matrices that make up one expert's slice of a stack, below the stack's module.

    Read off transformers' own conversion of the checkpoint: a merge of ``experts.*.w1.weight`` and ``.w3.weight`` gives
    ``("{}.w1.weight", "{}.w3.weight")``. Where it has none, one matrix named after the parameter.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    name = parameter.rpartition(".")[2]
    for converter in get_model_conversion_mapping(model, add_legacy=False):
        if mergeable(converter) and parameter.endswith(converter._original_target_patterns[0].lstrip(".")):
            sources = [source.partition("experts.*.")[2] for source in converter._original_source_patterns]
            return tuple(f"{{}}.{source}" for source in sources)
    return (f"{{}}.{name}.weight",)


def mergeable(converter: Any) -> bool:
    """Whether a conversion only stacks experts and puts their matrices below each other, both of which we can undo."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    if not isinstance(converter, WeightConverter) or len(converter._original_target_patterns) != 1:
        return False
    if not all(".experts.*." in source for source in converter._original_source_patterns):
        return False
    kinds = [(type(op), getattr(op, "dim", 0)) for op in converter.operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def quantized_linear(module: nn.Module, settings: Settings, device: torch.device | str) -> Linear4bit | Linear8bitLt:
    """An empty quantised layer of the size of ``module``, on ``device``; the source class is kept for the way back."""
    if isinstance(module, nn.Linear):
        inputs, outputs = module.in_features, module.out_features
    else:
        inputs, outputs = module.weight.shape  # type: ignore[misc]  # Conv1D stores [in, out]
    bias = getattr(module, "bias", None) is not None
    new: Linear4bit | Linear8bitLt
    if settings.bits == 8:
        new = Linear8bitLt(inputs, outputs, bias, settings.has_fp16_weight, settings.threshold, device=device)
        new.exact = settings.exact
    else:
        storage, double = settings.quant_storage or torch.uint8, settings.double_quant
        new = Linear4bit(inputs, outputs, bias, settings.compute_dtype, double, settings.quant_type, storage, device)
    new.source_cls = type(module)  # type: ignore[assignment]
    if not settings.has_fp16_weight:
        new.requires_grad_(False)
    return new.train(module.training)


def quantized_experts(parameter: torch.Tensor, names: tuple[str, ...], settings: Settings) -> ExpertStack:
    """An empty stack for a 3-D ``parameter``, on the meta device."""
    shape = (parameter.shape[0], parameter.shape[1], parameter.shape[2])
    with torch.device("meta"):
        if settings.bits == 8:
            return ExpertStack8bit(shape, parameter.dtype, names)
        storage = settings.quant_storage or torch.uint8
        return ExpertStack4bit(shape, parameter.dtype, names, settings.quant_type, settings.double_quant, storage)


def holds_codes(module: object) -> bool:
    """Whether ``module`` is a quantised layer whose weight is codes: not one that still holds floats."""
    if isinstance(module, Linear4bit):
        return bool(getattr(module.weight, "bnb_quantized", False))
    return isinstance(module, Linear8bitLt) and module.weight.dtype == torch.int8


def original_linear(module: Linear4bit | Linear8bitLt, dtype: torch.dtype) -> nn.Module:
    """The float layer again, of the class it was made from: weight dequantised to ``dtype``, bias as it is."""
    return _as_source(module, module.dequantize(dtype), learns=False)


def float_linear(module: Linear4bit | Linear8bitLt) -> nn.Module:
    """The float layer again, from one that never got codes: with the weight that it holds, to be trained."""
    return _as_source(module, module.weight.data.as_subclass(torch.Tensor), learns=True)


def _as_source(module: Linear4bit | Linear8bitLt, weight: torch.Tensor, learns: bool) -> nn.Module:
    source = getattr(module, "source_cls", nn.Linear)
    transposed = not issubclass(source, nn.Linear)
    with torch.device("meta"):
        if transposed:
            new = source(module.out_features, module.in_features)
        else:
            new = source(module.in_features, module.out_features, bias=module.bias is not None)
    new.weight = nn.Parameter(weight.t().contiguous() if transposed else weight, requires_grad=learns)
    if module.bias is not None:
        new.bias = nn.Parameter(module.bias.data.to(weight.dtype), requires_grad=learns or module.bias.requires_grad)
    elif transposed:
        new.bias = nn.Parameter(torch.zeros(module.out_features, dtype=weight.dtype, device=weight.device))
    return new.train(module.training)
