"""The thin adapter to transformers' quantizer interface (5.17 to 5.23).

transformers builds the model on the meta device, asks us to swap modules, streams tensors from the files and hands each
to one of our conversion operations, which quantises it (or puts codes and scales together) on its device. It is
registered under its own name, ``onegpu``: plain transformers in the same process keeps using bitsandbytes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin, QuantizationMethod

from onegpu.convert import hooks, instance
from onegpu.convert.dequantize import compatible_state_dict, dequantize_modules
from onegpu.convert.names import check_expert_names, model_names
from onegpu.convert.operations import DeserializeExperts, DeserializeLinear, Quantize
from onegpu.convert.prequantized import file_targets
from onegpu.convert.quantized import Target, default_skips, find_targets, mergeable, quantized_experts, quantized_linear
from onegpu.convert.report import Change
from onegpu.convert.session import current
from onegpu.errors import CheckpointError, bad_argument
from onegpu.formats.bitsandbytes import ENDINGS_4BIT, ENDINGS_8BIT, Settings
from onegpu.formats.checkpoint import read_headers
from onegpu.hardware import free_host_bytes
from onegpu.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from onegpu.nn.experts import ExpertStack
from onegpu.placement.device_map import Weights, Wish, place
from onegpu.placement.sizes import stored_sizes

QUANT_METHOD = "onegpu"
_CODES = (Params4bit, Int8Params)


@register_quantization_config(QUANT_METHOD)
class OneGPUConfig(QuantizationConfigMixin):
    """A marker: transformers dispatches on its name. What to do is in the load's session."""

    def __init__(self, **_: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # theirs is an enum of the names they know

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": QUANT_METHOD}


@register_quantizer(QUANT_METHOD)
class OneGPUQuantizer(HfQuantizer):
    """Quantises while loading, or loads what bitsandbytes' format holds."""

    requires_calibration = False
    is_trainable = True
    is_compileable = True
    compatible = False

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        session = current()
        self.settings, self.config = session.settings, session.config
        self.targets: dict[str, Target] = {}
        self.default_skips: tuple[str, ...] = ()
        self._shapes: dict[str, torch.Size] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to ask for: no package is needed."""

    def update_device_map(self, device_map: Any) -> Any:
        if device_map is not None:
            return device_map
        # transformers resolves words before it can show us the model: an empty map is filled in when it does.
        return {}

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        if self.param_needs_quantization(model, param_name):
            return self.settings.bits / 8
        return float(param.element_size())

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        if param_name in self.targets:
            return True
        if not param_name.endswith(".weight"):
            return False
        module, _name = get_module_from_name(model, param_name)
        return isinstance(module, (Linear4bit, Linear8bitLt))

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, checkpoint_files: Any = None, **_: Any
    ) -> None:
        session = current()
        headers = read_headers(file for file in checkpoint_files or () if str(file).endswith(".safetensors"))
        if self.pre_quantized:
            targets, left, self.settings = file_targets(model, headers, session.settings)
        else:
            targets, left = find_targets(model, session.settings)
            self.default_skips = tuple(default_skips(model)) if session.settings.keep_default_skips else ()
            if not targets:
                raise bad_argument(
                    f"load_in_{self.settings.bits}bit",
                    True,
                    f"finds no linear layer to quantise in {type(model).__name__}",
                    "load the model without it",
                )
            if headers and any(target.kind == "experts" for target in targets):
                check_expert_names(model, model_names(model, (info.name for info in headers)), headers[0].file)
        session.report.changes += left
        for target in targets:
            if target.kind == "experts":
                self.targets[target.name] = target
                before, after = "parameter", f"{self.settings.quant_type} experts"
            else:
                module = model.get_submodule(target.name)
                before = type(module).__name__
                new = quantized_linear(module, self.settings, "meta")
                if self.pre_quantized:  # transformers casts what arrives to the dtype that it finds here
                    new.weight.data = new.weight.data.to(_codes_dtype(self.settings))
                model.set_submodule(target.name, new)
                after = f"{self.settings.quant_type} {type(new).__name__}"
            session.report.changes.append(
                Change(target.name, before, after, "linear" if not target.names else "experts")
            )
        if self.targets:
            model.config._experts_implementation = "eager"  # the one that takes stack[e], expert by expert
        self._place(model, device_map)
        self._model = model
        self._shapes = {name: p.shape for name, p in model.named_parameters() if not isinstance(p, _CODES)}
        if torch.cuda.is_available():
            session.prefault.start(checkpoint_files or (), free_host_bytes())

    def _place(self, model: Any, device_map: Any) -> None:
        """Decide where everything goes, and write it into the map that transformers already holds."""
        session = current()
        stacks = {
            name: quantized_experts(model.get_parameter(name), target.names, self.settings)
            for name, target in self.targets.items()
        }
        known = {name: sum(stack.nbytes().values()) for name, stack in stacks.items()}
        sizes = stored_sizes(model, known=known, dtypes=model._get_dtype_plan(model.dtype))
        weights = Weights(model, sizes, self.settings.quant_type, self.settings.bits == 8 and not self.pre_quantized)
        wish = session.wish
        if wish.device_map is None and wish.max_memory is None:
            # Nothing asked for: the device of a `with torch.device(…)` around the call, else the current GPU.
            current_gpu = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
            wish = Wish(next(iter(device_map.values())) if device_map else current_gpu)
        session.placement = place(weights, wish)
        device_map.update(session.placement.device_map)

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        if not self.pre_quantized:
            return []
        if self.settings.bits == 8:
            # `SCB` and `weight_format` have no `weight` in their names for a pattern to end in.
            return [WeightConverter(list(ENDINGS_8BIT), "weight", [DeserializeLinear(self)])]
        return [WeightConverter(list(ENDINGS_4BIT), "weight", [DeserializeLinear(self)])]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        if not (self.pre_quantized and self.targets):
            return weight_conversions + self.get_weight_conversions()
        suffixes = ENDINGS_8BIT if self.settings.bits == 8 else ENDINGS_4BIT
        converters: dict[str, Any] = {}
        kept = []
        for conversion in weight_conversions:
            stacks = [t for t in self.targets.values() if mergeable(conversion) and _feeds(conversion, t)]
            if not stacks:
                kept.append(conversion)
                continue
            sources = [s.removesuffix("weight") + e for s in conversion._original_source_patterns for e in suffixes]
            op = DeserializeExperts(self, conversion._original_source_patterns)
            new = WeightConverter(sources, conversion._original_target_patterns, [op])
            for scope in ("scope_prefix", "base_model_prefix"):
                if hasattr(conversion, scope):
                    setattr(new, scope, getattr(conversion, scope))
            converters[conversion._original_target_patterns[0]] = new
        for target in self.targets.values():
            # A stack whose checkpoint form transformers does not merge: written, and read, under its own name.
            name = target.name.rpartition(".")[2]
            if target.names == (f"{{}}.{name}.weight",) and (pattern := f".experts.{name}") not in converters:
                source = f".experts.*.{name}.weight"
                op = DeserializeExperts(self, [source])
                sources = [source.removesuffix("weight") + ending for ending in suffixes]
                converters[pattern] = WeightConverter(sources, pattern, [op])
        return kept + list(converters.values()) + self.get_weight_conversions()

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self._model = None
        for name, parameter in model.named_parameters():
            expected = self._shapes.get(name, parameter.shape)
            if parameter.shape != expected:  # 5.17 looks at shapes only where nobody quantises
                raise CheckpointError(
                    file=current().source,
                    tensor=name,
                    reason=f"has shape {tuple(parameter.shape)}, the model needs {tuple(expected)}",
                    fix="correct config.json or the files",
                )
        finish(model, self)
        return model

    def is_serializable(self, **_: Any) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        return (compatible_state_dict(model) if self.compatible else None), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize_modules(model, dtype or model.config.dtype or torch.float32)
        instance.unbind(model)
        if (state := model.__dict__.get("_onegpu")) is not None:
            state.forget_weights()
        return model


def _codes_dtype(settings: Settings) -> torch.dtype:
    return torch.int8 if settings.bits == 8 else settings.quant_storage or torch.uint8


def _feeds(conversion: Any, target: Target) -> bool:
    return target.name.endswith(conversion._original_target_patterns[0].lstrip("."))


def finish(model: Any, quantizer: OneGPUQuantizer) -> None:
    """Make a quantised model look to transformers, PEFT and Trainer as one loaded through bitsandbytes."""
    quantizer.quantization_config = saved_config(quantizer)
    model.config.quantization_config = quantizer.quantization_config
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        ours = (DeserializeLinear, DeserializeExperts)
        model._weight_conversions = [
            c for c in conversions if not any(isinstance(op, ours) for op in getattr(c, "operations", ()))
        ]
    for module in model.modules():
        if isinstance(module, (Linear4bit, Linear8bitLt, ExpertStack)):
            module._is_hf_initialized = True  # type: ignore[assignment]
    instance.bind(model)
    hooks.install()


def saved_config(quantizer: OneGPUQuantizer) -> BitsAndBytesConfig:
    """The ``quantization_config`` of the files we write: the one asked for, with the skip list that was in force."""
    return with_default_skips(quantizer.config, quantizer.default_skips)


def with_default_skips(asked: BitsAndBytesConfig, defaults: Iterable[str]) -> BitsAndBytesConfig:
    """A copy of ``asked`` whose skip list, where it has one, also names the ``defaults``.

    transformers takes a skip list *in place of* its default one, ours adds to it: the files must load there too.
    """
    config: BitsAndBytesConfig = copy.deepcopy(asked)
    if config.llm_int8_skip_modules:
        listed = config.llm_int8_skip_modules
        config.llm_int8_skip_modules = [*listed, *(name for name in defaults if name not in listed)]
    return config
