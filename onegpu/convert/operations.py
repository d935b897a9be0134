"""What transformers' streaming loader calls for every tensor that becomes a quantised weight.

An exception raised inside these is logged by transformers and swallowed until the end; ours are kept in the session, so
that the user sees the cause and not the log.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps

from onegpu.convert.quantized import is_conv1d_class, quantized_experts
from onegpu.convert.session import Session, current
from onegpu.errors import CheckpointError, OneGPUError
from onegpu.nn import Int8Params, Linear4bit, Params4bit
from onegpu.nn.check import check_state
from onegpu.nn.experts import ExpertStack, replace_parameter
from onegpu.nn.linear_8bit import check_int8

_FIX = "download or save the checkpoint again"


def _one(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, list) else value  # type: ignore[no-any-return]


def _fail(session: Session, tensor: str, reason: object, fix: str = _FIX) -> OneGPUError:
    error = CheckpointError(file=session.source, tensor=tensor, reason=str(reason), fix=fix)
    session.errors.append(error)
    return error


def _check_shape(session: Session, name: str, value: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise _fail(session, name, f"has shape {tuple(value.shape)}, the model needs {shape}")
    if not value.is_floating_point():
        raise _fail(session, name, f"has dtype {value.dtype}, only float weights can be quantised")


class Quantize(ConversionOps):
    """A float weight on its device to codes and scales there."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]  # called with keywords only
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        session, result = current(), {}
        for name, values in input_dict.items():
            value = _one(values)
            target = self.hf_quantizer.targets.get(name)
            if target is not None:
                parent, attribute = _parent(model, name)
                parameter = getattr(parent, attribute)
                _check_shape(session, name, value, tuple(parameter.shape))
                stack = quantized_experts(parameter, target.names, self.hf_quantizer.settings)
                stack.quantize_(value)
                session.scales.append((name, stack.scales))
                _place(parent, attribute, stack, name, missing_keys)
                continue
            module, _attribute = _parent(model, name)
            if is_conv1d_class(module.source_cls):
                value = value.t()
            _check_shape(session, name, value, (module.out_features, module.in_features))
            weight = module.weight._like(value, None).to(value.device)
            state = weight.quant_state if isinstance(weight, Params4bit) else None
            scales = weight.SCB if state is None else state.absmax if state.state2 is None else state.offset
            session.scales.append((name, value if scales is None else scales))
            module._is_hf_initialized = True
            result[name] = weight
        return result


class DeserializeLinear(ConversionOps):
    """The tensors of one weight in bitsandbytes' format to the weight; a plain weight passes."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]  # called with keywords only
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        name = full_layer_name or ""
        entries = {key: _one(value) for key, value in input_dict.items()}
        module, attribute = _parent(model, name)
        weight = entries["weight"]
        if not isinstance(getattr(module, attribute), (Params4bit, Int8Params)):
            return {"weight": weight.to(getattr(module, attribute).dtype)}
        session, shape = current(), (module.out_features, module.in_features)
        loaded: Params4bit | Int8Params
        try:
            if isinstance(module, Linear4bit):
                stats = {key: value for key, value in entries.items() if key != "weight"}
                loaded = Params4bit.from_prequantized(weight, stats, device=weight.device)
                check_state(loaded, shape)
                if f"weight.quant_state.bitsandbytes__{loaded.quant_type}" not in stats:
                    raise ValueError(f"quant_state holds type {loaded.quant_type!r}, its name says another")
            else:
                check_int8(weight, entries["SCB"], entries.get("weight_format"), shape)
                loaded = Int8Params(weight, False, False, None, entries["SCB"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _fail(session, name, error) from error
        module._is_hf_initialized = True
        return {"weight": loaded}


class DeserializeExperts(ConversionOps):
    """Every expert's tensors in bitsandbytes' format to one stack.

    sources: the patterns of the parts' weights (``.experts.*.w1.weight``), in their order within the stack.
    """

    def __init__(self, hf_quantizer: Any, sources: list[str]) -> None:
        self.hf_quantizer = hf_quantizer
        self.sources = sources

    def convert(  # type: ignore[override]  # called with keywords only
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str | None = None,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        name, session = full_layer_name or "", current()
        parent, attribute = _parent(model, name)
        target = self.hf_quantizer.targets[name]
        stack = quantized_experts(getattr(parent, attribute), target.names, self.hf_quantizer.settings)
        for part, source in enumerate(self.sources):
            stem = source.removesuffix("weight")
            columns = {
                _ending(pattern[len(stem) :]): values
                for pattern, values in input_dict.items()
                if pattern.startswith(stem)
            }
            for expert in range(stack.shape[0]):
                try:
                    stack.load_part(expert, part, {ending: values[expert] for ending, values in columns.items()})
                except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                    raise _fail(session, f"{name} (expert {expert})", error) from error
        _place(parent, attribute, stack, name, missing_keys)
        return {}


def _ending(tail: str) -> str:
    """``weight.absmax`` to ``.absmax``, ``SCB`` as it is, the weight itself to nothing: what ``load_part`` takes."""
    return tail.removeprefix("weight") if tail == "weight" or tail.startswith("weight.") else tail


def _parent(model: Any, name: str) -> tuple[Any, str]:
    module, _, attribute = name.rpartition(".")
    return model.get_submodule(module), attribute


def _place(parent: Any, attribute: str, stack: ExpertStack, name: str, missing_keys: set[str] | None) -> None:
    replace_parameter(parent, attribute, stack)
    if missing_keys is not None:
        missing_keys.discard(name)
