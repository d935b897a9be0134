"""``onegpu.optimize`` and ``onegpu.restore``: the conversion, and the loop that generates with what it made."""

from __future__ import annotations

from typing import Any

import torch

from onegpu.convert import Report
from onegpu.convert import optimize as convert
from onegpu.convert import restore as convert_back
from onegpu.convert.optimize import settings_of
from onegpu.engine.generate import attach, begin, detach
from onegpu.errors import bad_argument


def optimize(
    model: Any,
    quantize: str | None = None,
    *,
    double_quant: bool = False,
    skip_modules: list[str] | None = None,
    keep_original: bool = False,
) -> Report:
    """Convert a transformers model in memory, in place, and let it generate with our loop.

    Args:
        model: any ``PreTrainedModel`` (or module) with float weights.
        quantize: "nf4", "fp4" or "int8": the linear layers give up their float weights. None changes structure only.
        double_quant: quantise 4-bit scales too.
        skip_modules: names that stay as they are, beside the default ones.
        keep_original: keep the float weights in CPU memory, so that ``restore`` gives them back bit for bit.

    Returns:
        The report: what was swapped, what was left, and why. ``print`` it.

    Raises:
        ArgumentError: no module, unknown format, a model that is quantised already, one with nothing to quantise, or
            weights that are not finite. The model is as it was.
    """
    _check(model)
    begin(model, settings_of(quantize, double_quant, skip_modules))
    report = convert(model, quantize, double_quant=double_quant, skip_modules=skip_modules, keep_original=keep_original)
    reason = attach(model)
    if reason is None:
        report.notes.append("generate() runs in onegpu's loop; model.generate.report says how a call went.")
    elif getattr(model, "can_generate", bool)():
        report.notes.append(f"generate() stays transformers' own: {reason}.")
    return report


def restore(model: Any, *, dequantize: bool = False) -> Report:
    """Take back what :func:`optimize` changed, and give the model transformers' ``generate`` back.

    Structure comes back as it was, bit for bit. Quantised layers come back bit for bit if ``optimize`` kept the
    originals; otherwise they stay as they are, and the report says so, unless ``dequantize=True`` expands them.
    """
    _check(model)
    taken = detach(model)
    report = convert_back(model, dequantize=dequantize)
    if taken and not report.changes:
        report.notes.append("generate() is transformers' own again.")
    return report


def _check(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise bad_argument("model", model, "is no module", "pass a model that is loaded, from_pretrained's result")
