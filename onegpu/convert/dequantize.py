"""The way back from quantised modules to float ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from onegpu.convert.quantized import float_linear, holds_codes, original_linear
from onegpu.convert.swap import stack_to_parameter, swap_module
from onegpu.nn import Linear4bit, Linear8bitLt
from onegpu.nn.experts import ExpertStack


def dequantize_modules(model: Any, dtype: torch.dtype) -> list[str]:
    """Replace every quantised module of ``model`` by a float one in ``dtype``, one at a time. Returns their names."""
    names = []
    for name, module in list(model.named_modules()):
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            swap_module(model, name, original_linear(module, dtype))
            names.append(name)
        elif isinstance(module, ExpertStack):
            stack_to_parameter(model, name, module.dequantize().to(dtype))
            names.append(name)
    return names


def leave_new_layers(model: Any) -> list[str]:
    """Give back the float layers that were to be quantised and of which the checkpoint has no weight. Their names.

    transformers has initialised them (a base model's pooler, where the file is of a model without one): they are there
    to be trained, and codes cannot be.
    """
    new = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (Linear4bit, Linear8bitLt))
        and not holds_codes(module)
        and not getattr(module, "has_fp16_weights", False)
    ]
    for name in new:
        swap_module(model, name, float_linear(model.get_submodule(name)))
    if new and (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        # Saved, they are floats: the list that config.json gets has to say so, and takes the place of the default one.
        config = model.config.quantization_config
        config.llm_int8_skip_modules = [*(config.llm_int8_skip_modules or quantizer.default_skips), *new]
    return new


def compatible_state_dict(model: Any) -> dict[str, Any]:
    """The state dict with everything in 16 bits that transformers + bitsandbytes would not quantise.

    That stack takes layers whose class is exactly ``nn.Linear``, or ``Conv1D``, and no experts.
    """
    dtype = model.config.dtype if isinstance(model.config.dtype, torch.dtype) else model.dtype
    state: dict[str, Any] = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, ExpertStack):
            parent = name.rpartition(".")[0]
            for expert, part in module._matrices():
                stem = f"{parent}.{module._entry_name(expert, part, '').removesuffix('weight')}"
                for key in [key for key in state if key.startswith(stem)]:
                    del state[key]
            state[name] = module.dequantize().to(dtype)
        elif isinstance(module, (Linear4bit, Linear8bitLt)) and not taken_by_bitsandbytes(_source(module)):
            for key in [key for key in state if key.startswith(f"{name}.weight") or key == f"{name}.SCB"]:
                del state[key]
            state[f"{name}.weight"] = module.dequantize(dtype)
    return state


def taken_by_bitsandbytes(source: type) -> bool:
    """Whether transformers + bitsandbytes quantises (and loads quantised) a layer of class ``source``."""
    return source is nn.Linear or not issubclass(source, nn.Linear)


def some_taken_by_bitsandbytes(model: Any) -> bool:
    """Whether :func:`compatible_state_dict` leaves any module of ``model`` quantised."""
    layers = (module for module in model.modules() if isinstance(module, (Linear4bit, Linear8bitLt)))
    return any(taken_by_bitsandbytes(_source(layer)) for layer in layers)


def _source(module: nn.Module) -> type:
    return getattr(module, "source_cls", nn.Linear)
