"""The registry of conversions: each rule finds, by structure, what it can change, changes it and takes it back.

Later rules (fused projections) are added to ``RULES``; the order is the order of application.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from onegpu.convert.attention_rule import UseAttention
from onegpu.convert.quantized import Target, find_targets, is_conv1d, quantized_experts, quantized_linear
from onegpu.convert.report import Change, Report
from onegpu.convert.structure_rule import UseKernels
from onegpu.convert.swap import stack_to_parameter, swap_module
from onegpu.errors import bad_argument
from onegpu.formats.bitsandbytes import Settings
from onegpu.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from onegpu.nn.experts import ExpertStack, replace_parameter


class Rule(Protocol):
    """One kind of conversion."""

    def apply(self, model: Any, settings: Settings | None, state: Any, keep_original: bool, report: Report) -> None:
        """Convert what matches; note every change, and everything that matched but was left, in ``report``."""

    def restore(self, model: Any, state: Any, report: Report) -> None:
        """Put back what ``state`` kept of the originals."""


class QuantizeWeights:
    """Linear layers and experts to 4 or 8 bits, one at a time, so that the peak is the model plus one layer."""

    def apply(self, model: Any, settings: Settings | None, state: Any, keep_original: bool, report: Report) -> None:
        if settings is None:
            return
        targets, left = find_targets(model, settings)
        report.changes += left
        if not targets:
            raise bad_argument(
                "quantize",
                settings.quant_type,
                f"finds no linear layer in {type(model).__name__}",
                "leave the model as it is",
            )
        _check_finite(model, targets, settings)
        for target in targets:
            swap = self._experts if target.kind == "experts" else self._linear
            report.changes.append(swap(model, target, settings, state, keep_original))
        if any(target.kind == "experts" for target in targets):
            state.attributes["_experts_implementation"] = model.config._experts_implementation
            model.config._experts_implementation = "eager"  # the one that takes stack[e], expert by expert

    def _linear(self, model: Any, target: Target, settings: Settings, state: Any, keep: bool) -> Change:
        old = model.get_submodule(target.name)
        weight: torch.Tensor = old.weight.data
        new = quantize_linear(old, settings)
        swap_module(model, target.name, new)
        if keep:
            state.originals[target.name] = (old, _to_cpu(old), weight.device)
        return Change(target.name, type(old).__name__, f"{settings.quant_type} {type(new).__name__}", "linear")

    def _experts(self, model: Any, target: Target, settings: Settings, state: Any, keep: bool) -> Change:
        parent_name, _, name = target.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        old: nn.Parameter = getattr(parent, name)
        stack = quantized_experts(old, target.names, settings)
        stack.quantize_(old.data)
        replace_parameter(parent, name, stack)
        if keep:
            state.originals[target.name] = (old, old.data.cpu(), old.device)
            old.data = old.data.new_empty(0)
        return Change(target.name, "parameter", f"{settings.quant_type} experts", "experts")

    def restore(self, model: Any, state: Any, report: Report) -> None:
        for name, (old, values, device) in state.originals.items():
            current = model.get_submodule(name)
            if isinstance(current, ExpertStack):
                old.data = values.to(device)
                stack_to_parameter(model, name, old)
                report.changes.append(Change(name, "experts", "parameter", "original kept"))
                continue
            old.weight.data = values.to(device)
            swap_module(model, name, old)
            report.changes.append(Change(name, type(current).__name__, type(old).__name__, "original kept"))


def quantize_linear(old: Any, settings: Settings) -> Linear4bit | Linear8bitLt:
    """The quantised layer with the weights of a float one, which stays as it is."""
    new = quantized_linear(old, settings, "meta")
    source: torch.Tensor = old.weight.data.t() if is_conv1d(old) else old.weight.data
    kind: Any = Int8Params if settings.bits == 8 else Params4bit
    fields = {key: value for key, value in new.weight.__dict__.items() if key not in ("CB", "SCB")}
    new.weight = kind(source, requires_grad=new.weight.requires_grad, **fields).to(source.device)
    new.bias = old.bias
    return new


def _check_finite(model: Any, targets: list[Target], settings: Settings) -> None:
    """Raise before anything is changed. One pass, without memory of its own; 8-bit codes are made by way of float16."""
    limit = torch.finfo(torch.float16).max if settings.bits == 8 else float("inf")
    extremes = []
    for target in targets:
        weight = model.get_parameter(target.name if target.kind == "experts" else f"{target.name}.weight")
        low, high = torch.aminmax(weight.detach())
        extremes.append(torch.maximum(-low, high).float())
    for target, extreme in zip(targets, extremes, strict=True):
        value = extreme.item()
        if not value <= limit or value == float("inf"):
            reason = f"values past float16's {limit:.0f}" if limit < value < float("inf") else "NaN or infinity"
            raise bad_argument("model", type(model).__name__, f"has {reason} in {target.name}", "correct its weights")


def _to_cpu(module: Any) -> torch.Tensor:
    """The weight in CPU memory; the module itself gives up its own."""
    values: torch.Tensor = module.weight.data.cpu()
    module.weight.data = module.weight.data.new_empty(0)
    return values


RULES: tuple[Rule, ...] = (QuantizeWeights(), UseAttention(), UseKernels())
