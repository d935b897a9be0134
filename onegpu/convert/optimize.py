"""``optimize`` and ``restore``: a model already in memory, converted in place and given back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from onegpu.convert import hooks, instance
from onegpu.convert.dequantize import dequantize_modules
from onegpu.convert.quantized import default_skips
from onegpu.convert.report import Change, Report
from onegpu.convert.rules import RULES
from onegpu.errors import bad_argument
from onegpu.formats.bitsandbytes import Settings

_FORMATS = ("nf4", "fp4", "int8")
_STATE = "_onegpu"


@dataclass
class State:
    """What ``restore`` needs, kept on the model: originals by name (where they were kept), and what to set back."""

    originals: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    attention: list[tuple[Any, Any]] = field(default_factory=list)  # (config, its attention's name)
    quantized: bool = False

    def forget_weights(self) -> None:
        """The weights were expanded in another way than by :func:`restore`."""
        self.originals.clear()
        self.attributes.clear()
        self.quantized = False


def optimize(
    model: Any,
    quantize: str | None = None,
    *,
    double_quant: bool = False,
    skip_modules: list[str] | None = None,
    keep_original: bool = False,
) -> Report:
    """Convert a transformers model in memory, in place.

    Args:
        model: any ``PreTrainedModel`` (or module) with float weights.
        quantize: "nf4", "fp4" or "int8": the linear layers give up their float weights. None changes structure only.
        double_quant: quantise 4-bit scales too.
        skip_modules: names that stay as they are, beside the default ones.
        keep_original: keep the float weights in CPU memory, so that ``restore`` gives them back bit for bit.

    Returns:
        The report: what was swapped, what was left, and why. ``print`` it.

    Raises:
        ArgumentError: unknown format, a model that is quantised already, one with nothing to quantise, or weights that
            are not finite. The model is as it was.
    """
    settings = settings_of(quantize, double_quant, skip_modules)
    if quantize is not None and getattr(model, "is_quantized", False):
        raise bad_argument(
            "quantize", quantize, "was asked for a model that is quantised already", "call model.dequantize() first"
        )
    report = Report("optimize")
    state: State = model.__dict__.get(_STATE) or State()
    skips = tuple(default_skips(model))
    for rule in RULES:
        rule.apply(model, settings, state, keep_original, report)
    if settings is not None:
        _mark_quantized(model, settings, state, skips)
        if not keep_original:
            report.notes.append("The float weights are gone; keep_original=True would have kept them in CPU memory.")
    model.__dict__[_STATE] = state
    return report


def settings_of(quantize: str | None, double_quant: bool, skip_modules: list[str] | None) -> Settings | None:
    """How :func:`optimize` quantises with such arguments; raises ``ArgumentError`` for an unknown format."""
    if quantize is None:
        return None
    if quantize not in _FORMATS:
        raise bad_argument("quantize", quantize, "is not a format", f"use one of {', '.join(_FORMATS)}, or None")
    return Settings(quantize, double_quant, torch.float32, torch.uint8, skip=tuple(skip_modules or ()))


def _mark_quantized(model: Any, settings: Settings, state: State, skips: tuple[str, ...]) -> None:
    from transformers import BitsAndBytesConfig, PreTrainedModel

    state.quantized = True
    hooks.install()
    if not isinstance(model, PreTrainedModel):
        return
    from onegpu.convert.quantizer import OneGPUConfig, OneGPUQuantizer, finish
    from onegpu.convert.session import Session, loading

    config = BitsAndBytesConfig(
        load_in_4bit=settings.bits == 4,
        load_in_8bit=settings.bits == 8,
        bnb_4bit_quant_type=settings.quant_type if settings.bits == 4 else "fp4",
        bnb_4bit_use_double_quant=settings.double_quant,
        llm_int8_skip_modules=list(settings.skip) or None,
    )
    with loading(Session("memory", config, settings)):
        quantizer = OneGPUQuantizer(OneGPUConfig(), pre_quantized=False)
    quantizer.default_skips = skips
    finish(model, quantizer)


def restore(model: Any, *, dequantize: bool = False) -> Report:
    """Take back what :func:`optimize` changed.

    Structure comes back as it was, bit for bit. Quantised layers come back bit for bit if ``optimize`` kept the
    originals; otherwise they stay as they are, and the report says so, unless ``dequantize=True`` expands them.
    """
    report = Report("restore")
    state: State | None = model.__dict__.get(_STATE)
    if state is None:
        report.notes.append("Nothing to restore: optimize() did not change this model.")
        return report
    for rule in reversed(RULES):
        rule.restore(model, state, report)
    if state.quantized:
        if dequantize:
            dtype = model.dtype if hasattr(model, "dtype") else torch.float32
            for name in dequantize_modules(model, dtype):
                report.changes.append(Change(name, "quantised", str(dtype).removeprefix("torch."), "expanded"))
        elif not state.originals:
            report.notes.append(
                "Quantised layers stay quantised: their float weights were not kept (keep_original=True keeps them, "
                "restore(dequantize=True) expands the codes)."
            )
            return report
        if hasattr(model, "hf_quantizer"):
            model.hf_quantizer.remove_quantization_config(model)
            model.config._is_quantized = False
        instance.unbind(model)
    for name, value in state.attributes.items():
        setattr(model.config, name, value)
    del model.__dict__[_STATE]
    return report
