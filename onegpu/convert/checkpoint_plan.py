"""What becomes of every tensor of a checkpoint that is quantised from file to file.

The model is built on the meta device only: it says which tensors are weights of linear layers or experts, by the rules
of a load (:mod:`onegpu.convert.quantized`), and transformers' own renaming says which tensor feeds which.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from onegpu.convert.dequantize import taken_by_bitsandbytes
from onegpu.convert.names import Fed, check_expert_names, missing_and_unexpected, model_names
from onegpu.convert.quantized import (
    Target,
    _candidates,
    _skip_reason,
    find_targets,
    is_conv1d,
    mergeable,
    quantized_experts,
    quantized_linear,
)
from onegpu.convert.report import Change
from onegpu.errors import CheckpointError, bad_argument
from onegpu.formats.bitsandbytes import Settings
from onegpu.formats.checkpoint import TORCH_DTYPES, TensorInfo
from onegpu.formats.config import CONFIG_ERRORS, config_error
from onegpu.kernels.quant_4bit import packed_bytes

_AGAIN = "download or save the checkpoint again"
# Names, dtypes and ranges of a quantised weight's entries in the header, and its tables.
_PER_WEIGHT = 2048
_PER_TENSOR = 256


@dataclass(frozen=True)
class Step:
    """One tensor of the source.

    kind: "copy", "linear" (a layer's weight), "matrix" (one expert's) or "stack" (all experts' in one tensor).
    dtype: what it is cast to first; None leaves it. target: the layer or parameter of the model. names: of the matrices
    in a stack.
    """

    info: TensorInfo
    kind: str = "copy"
    dtype: torch.dtype | None = None
    target: str = ""
    names: tuple[str, ...] = ()

    def output_bytes(self, settings: Settings) -> int:
        """An upper bound of what it takes in the result, less the header."""
        numel = math.prod(self.info.shape)
        if self.kind == "copy":
            return numel * self.dtype.itemsize if self.dtype is not None else self.info.nbytes
        matrices = self.info.shape[0] * len(self.names) if self.kind == "stack" else 1
        if settings.bits == 8:
            return numel + 4 * max(self.info.shape) * matrices + _PER_WEIGHT * matrices
        blocks = -(-numel // 64) + matrices
        scales = blocks + 4 * (blocks // 256 + matrices) if settings.double_quant else 4 * blocks
        return packed_bytes(numel, torch.uint8) + scales + _PER_WEIGHT * matrices


@dataclass
class Plan:
    """Steps in the order of the files; what is quantised, and what is left, with the reason.

    settings: those given, its skip list with the layers that are left because of how the files store them.
    """

    model: Any
    settings: Settings
    steps: list[Step]
    left: list[Change] = field(default_factory=list)
    quantized: list[Change] = field(default_factory=list)

    def output_bytes(self) -> int:
        """An upper bound of the result's weights."""
        return sum(step.output_bytes(self.settings) + _PER_TENSOR for step in self.steps)


def meta_model(cls: type, config: Any, dtype: torch.dtype) -> Any:
    """An instance of ``cls`` without memory, its floats in ``dtype``.

    Raises:
        CheckpointError: the config does not make one.
    """
    try:
        with torch.device("meta"):
            return cls._from_config(config, dtype=dtype)  # type: ignore[attr-defined]  # a PreTrainedModel
    except (*CONFIG_ERRORS, RuntimeError) as error:
        raise config_error(config.name_or_path or cls.__name__, error) from error


def make_plan(model: Any, headers: list[TensorInfo], settings: Settings, compatible: bool = False) -> Plan:
    """What to do with each tensor of ``headers`` so that ``model`` (on the meta device) is quantised.

    Args:
        compatible: leave what transformers + bitsandbytes cannot load: experts, and subclasses of ``nn.Linear``.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape than the model needs.
        ArgumentError: there is nothing to quantise, or a name to skip matches no layer.
    """
    _check_skips(model, settings)
    fed = model_names(model, (info.name for info in headers))
    _check_names(model, headers, fed)
    check_expert_names(model, fed, headers[0].file)
    targets, left = find_targets(model, settings)
    wanted: dict[str, Target] = {}
    for target in targets:
        if compatible and not loads_there(model, target):
            left.append(_left(model, target, "bitsandbytes cannot load it"))
        else:
            wanted[target.name if target.kind == "experts" else f"{target.name}.weight"] = target
    others = _stored_otherwise(model, fed, wanted)
    for name in others:
        left.append(_left(model, wanted.pop(name), "stored in another form, which is converted when it is loaded"))
    state = _state(model)
    steps = [_step(model, info, fed[info.name], wanted, state) for info in headers]
    if not any(step.kind != "copy" for step in steps):
        reasons = Counter(change.reason for change in left)
        why = f"leaves nothing to quantise in {type(model).__name__} ({', '.join(reasons) or 'no linear layer'})"
        raise bad_argument("model", model.config.name_or_path or type(model).__name__, why, "use it as it is")
    changes = [Change(t.name, _shown(model, t), f"{settings.quant_type} {t.kind}", t.kind) for t in wanted.values()]
    # What a loader would otherwise take for codes, or quantise by itself.
    skip = (*settings.skip, *(name.removesuffix(".weight") for name in others))
    return Plan(model, replace(settings, skip=skip), steps, left, changes)


def _check_skips(model: Any, settings: Settings) -> None:
    layers = [name for name, _, _ in _candidates(model)]
    for skip in settings.skip:
        if not any(_skip_reason(layer, {skip: ""}) is not None for layer in layers):
            example = layers[0] if layers else "model.layers.0.mlp.down_proj"
            raise bad_argument(
                "skip_modules", skip, f"matches no layer of {type(model).__name__}", f"names are like {example!r}"
            )


def _check_names(model: Any, headers: list[TensorInfo], fed: dict[str, Fed]) -> None:
    """As strict as a load: see :mod:`onegpu.formats.verify`."""
    missing, unexpected = missing_and_unexpected(model, fed.values())
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    file = headers[0].file
    for kind, names in (("is missing from the files", missing), ("is unknown to the model", unexpected)):
        named = [name for name in names if same_class or name.startswith(f"{model.base_model_prefix}.")]
        if named:
            more = f" ({len(named)} tensors like it)" if len(named) > 1 else ""
            raise CheckpointError(file=file, tensor=named[0], reason=f"{kind}{more}", fix="correct the files")


def loads_there(model: Any, target: Target) -> bool:
    """Whether transformers + bitsandbytes loads this weight quantised."""
    return target.kind == "linear" and taken_by_bitsandbytes(type(model.get_submodule(target.name)))


def _stored_otherwise(model: Any, fed: dict[str, Fed], wanted: dict[str, Target]) -> list[str]:
    """Weights that are made of several tensors, or of a part of one, in ways that no name of ours can express."""
    others = []
    for entry in fed.values():
        if entry.converter is None:
            continue
        first, *rest = entry.converter.target_patterns
        for name in (entry.name, *(entry.name.replace(first, other) for other in rest)):
            whole = name in wanted and wanted[name].kind == "experts" and mergeable(entry.converter)
            if name in wanted and not whole:
                others.append(name)
    return list(dict.fromkeys(others))


def _state(model: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each entry of the state dict after a load: some models keep a part in float32."""
    kept = model._get_dtype_plan(model.config.dtype)
    patterns = [(re.compile(re.escape(key).replace(r"\*", ".*")), dtype) for key, dtype in kept.items()]
    return {
        name: (tuple(value.shape), next((dtype for pattern, dtype in patterns if pattern.search(name)), value.dtype))
        for name, value in model.state_dict().items()
    }


def _step(
    model: Any,
    info: TensorInfo,
    fed: Fed,
    wanted: dict[str, Target],
    state: dict[str, tuple[tuple[int, ...], torch.dtype]],
) -> Step:
    stored = TORCH_DTYPES.get(info.dtype)
    floating = stored is not None and stored.is_floating_point
    target = wanted.get(fed.name)
    shape, dtype = state.get(fed.name, (info.shape, None))
    if fed.converter is not None:
        shape = info.shape
        if target is not None:  # an expert's matrix
            _, rows, columns = model.get_parameter(target.name).shape
            shape = (rows // len(target.names), columns)
    if info.shape != shape:
        raise CheckpointError(
            file=info.file,
            tensor=info.name,
            reason=f"has shape {info.shape}, the model needs {shape}",
            fix="correct config.json or the files",
        )
    if target is None:
        return Step(info, dtype=dtype if floating and dtype is not None and dtype.is_floating_point else None)
    if not floating:
        raise CheckpointError(
            file=info.file, tensor=info.name, reason=f"has dtype {info.dtype}, only float weights can be quantised"
        )
    kind = "linear" if target.kind == "linear" else "stack" if fed.converter is None else "matrix"
    return Step(info, kind, model.config.dtype, target.name, target.names)


def _left(model: Any, target: Target, reason: str) -> Change:
    return Change(target.name, _shown(model, target), None, reason)


def _shown(model: Any, target: Target) -> str:
    name = target.name.rpartition(".")[0] if target.kind == "experts" else target.name
    return type(model.get_submodule(name)).__name__


def pieces(
    step: Step, value: torch.Tensor, model: Any, settings: Settings, device: torch.device | str
) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors that ``value``, the content of ``step``, becomes: one group for each matrix, on the CPU.

    Raises:
        CheckpointError: it holds NaN or infinity, or does in the dtype that it is cast to.
    """
    if step.dtype is not None:
        value = value.to(step.dtype)
    _check_finite(step, value)
    name = step.info.name
    if step.kind == "copy":
        yield {name: value}
    elif step.kind == "stack":
        stack = quantized_experts(model.get_parameter(step.target), step.names, settings)
        stack.quantize_(value.to(device))
        _check_finite(step, stack.scales)
        parent = name.rpartition(".")[0]
        for expert, part in stack._matrices():
            entries = stack.part_entries(expert, part)
            yield {f"{parent}.{stack._entry_name(expert, part, key)}": v.cpu() for key, v in entries.items()}
    else:
        if step.kind == "linear":
            layer = model.get_submodule(step.target)
        else:
            layer = nn.Linear(step.info.shape[1], step.info.shape[0], bias=False, device="meta")
        new = quantized_linear(layer, settings, "meta")
        new.weight = new.weight._like(value.t() if is_conv1d(layer) else value, None).to(device)
        entries = {key: tensor for key, tensor in new.state_dict().items() if key != "bias"}
        for key in ("SCB", "weight.absmax", "weight.nested_absmax"):
            _check_finite(step, entries.get(key, value.new_zeros(0)))
        prefix = name.removesuffix("weight")
        yield {f"{prefix}{key}": tensor.cpu().contiguous() for key, tensor in entries.items()}


def _check_finite(step: Step, value: torch.Tensor) -> None:
    if not value.is_floating_point() or value.dtype.itemsize < 2:
        return
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(
            file=step.info.file,
            tensor=step.info.name,
            reason=f"holds NaN or infinity (in {str(value.dtype).removeprefix('torch.')})",
            fix=_AGAIN,
        )
