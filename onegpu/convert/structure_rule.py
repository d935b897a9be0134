"""The conversion of norms and gated MLPs: modules of ours, with the same parameters and children, that call one op."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import nn

from onegpu.convert.report import Change, Report
from onegpu.convert.swap import swap_module
from onegpu.nn.gated_mlp import CHILDREN, GatedMLP, activation_of, is_gated
from onegpu.nn.norm import LayerNorm, RMSNorm, form_of, is_rms_like
from onegpu.nn.stand_in import bare, settings

_OURS = (RMSNorm, LayerNorm, GatedMLP)
_Answers = dict[Hashable, tuple[nn.Module, tuple["str | None", str]]]


class UseKernels:
    """What computes, bit for bit on the CPU, what one of our ops does; the report says what else looked like it."""

    def apply(self, model: Any, settings: Any, state: Any, keep_original: bool, report: Report) -> None:
        """See :class:`onegpu.convert.rules.Rule`."""
        answers: _Answers = {}
        for name, module in list(model.named_modules()):
            if not name or isinstance(module, _OURS):
                continue
            found = _replacement(module, answers)
            if found is None:
                continue
            new, reason = found
            after = None if new is None else f"onegpu {type(new).__name__}"
            report.changes.append(Change(name, type(module).__name__, after, reason))
            if new is not None:
                swap_module(model, name, new)

    def restore(self, model: Any, state: Any, report: Report) -> None:
        """See :class:`onegpu.convert.rules.Rule`. Parameters and layers are those that the module has now."""
        for name, module in list(model.named_modules()):
            if not isinstance(module, _OURS):
                continue
            old: Any = module.original
            old._parameters, old.training = module._parameters, module.training
            if isinstance(module, GatedMLP):
                old._modules = module._modules
            swap_module(model, name, old)
            report.changes.append(Change(name, f"onegpu {type(module).__name__}", type(old).__name__, "as it was"))


def _replacement(module: nn.Module, answers: _Answers) -> tuple[nn.Module | None, str] | None:
    """Ours, or None where the module only looks like it, and why; None for anything else."""
    if type(module) is nn.LayerNorm:
        if len(module.normalized_shape) != 1 or not bare(module):
            return None, "hooks or a shape of more than one dimension"
        return LayerNorm(module), "layer norm"
    if is_rms_like(module):
        style, why = _asked(form_of, module, answers)
        return (RMSNorm(module, style), f"RMS norm, {style}") if style else (None, f"a norm of another form{why}")
    if is_gated(module):
        kind, why = _asked(activation_of, module, answers)
        return (GatedMLP(module, kind), f"gate, up, {kind}") if kind else (None, f"a gated MLP of another form{why}")
    return None


def _asked(probe: Callable[[Any], str | None], module: nn.Module, answers: _Answers) -> tuple[str | None, str]:
    """What the probe found, and why nothing: what runs is the module's own code, which may want anything.

    Layers that differ in tensors alone are asked once: a hundred probes of a model take seconds where cores are busy.
    """
    key = probe, _settings(module)
    if key in answers and bare(module):
        return answers[key][1]
    try:
        found = probe(module), ""
    except Exception as error:
        found = None, f": a small copy fails with {type(error).__name__}"
    if bare(module):
        answers[key] = module, found  # the module is kept so that an id in the key stays its own
    return found


def _settings(module: nn.Module) -> Hashable:
    """All that a module's answer depends on; equal for modules that compute the same function of their tensors."""
    names = (*module._parameters, *module._buffers)
    parts: list[Hashable] = []
    for name, child in module._modules.items():
        simple = child is not None and bare(child) and not (child._parameters or child._buffers or child._modules)
        parts.append(
            (name, None if name in CHILDREN else _settings(child) if simple and child is not None else id(child))
        )
    return settings(module), names, tuple(parts)
