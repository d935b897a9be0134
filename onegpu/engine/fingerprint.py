"""What a captured step depends on, as one value: equal before and after means that the graph is still right.

In-place changes of weights are followed by a graph (it reads the same memory) and leave the value as it is. Memory
that moved (`.to()`, `.half()`, `param.data =`), exchanged modules, switched adapters and changed numbers change it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_OWN = frozenset(
    {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_non_persistent_buffers_set"}
)

# What transformers leaves behind once attentions were asked for does nothing while nobody asks; what our conversion
# puts on modules does the same in every step.
_HARMLESS = frozenset({"transformers.utils.output_capturing", "onegpu.convert.exceptions"})


def fingerprint(model: nn.Module) -> Hashable:
    """Addresses and dtypes of all weights, plain attributes of all modules, and torch's switches that pick kernels."""
    parts: list[Hashable] = []
    configs: dict[int, Any] = {}
    for module in model.modules():
        state = module.__dict__
        parts.append((id(module), id(state.get("forward"))))
        parts.append((len(state["_forward_hooks"]), len(state["_forward_pre_hooks"])))
        for tensor in state["_parameters"].values():
            if tensor is not None:
                parts.append((_address(tensor), tensor.dtype))
                if tensor.__dict__:
                    parts.extend(_addresses(tensor.__dict__))
        for tensor in state["_buffers"].values():
            if tensor is not None:
                parts.append((_address(tensor), tensor.dtype))
        for name, value in state.items():
            if name not in _OWN and (plain := _plain(value)) is not None:
                parts.append((name, plain))
        if (config := state.get("config")) is not None:
            configs[id(config)] = config
    for config in configs.values():
        for name in ("_attn_implementation", "_experts_implementation"):
            parts.append(getattr(config, name, None))
    parts.extend(_switches())
    return tuple(parts)


def runs_python(model: nn.Module) -> str | None:
    """Why each step must run in Python, or None: hooks and replaced ``forward`` methods, which a graph would skip.

    accelerate's offloading is made of both.
    """
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return "a hook is registered for every module"
    for name, module in model.named_modules():
        state = module.__dict__
        hooks = [*state["_forward_hooks"].values(), *state["_forward_pre_hooks"].values()]
        if not all(map(_harmless, hooks)):
            return f"a hook is registered on {name or type(module).__name__}"
        if "_hf_hook" in state or ("forward" in state and not _harmless(state["forward"])):
            return f"{name or type(module).__name__} has a forward method of its own (offloading does that)"
    return None


def _plain(value: Any, depth: int = 0) -> Hashable | None:
    """``value`` if it is made of numbers and names, else None."""
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if depth < 3 and isinstance(value, (list, tuple, set, frozenset)):
        return (type(value), tuple(_plain(item, depth + 1) for item in value))
    if depth < 3 and isinstance(value, dict):
        return tuple((_plain(key, depth + 1), _plain(item, depth + 1)) for key, item in value.items())
    return None


def _harmless(function: Any) -> bool:
    return getattr(getattr(function, "__func__", function), "__module__", None) in _HARMLESS


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without memory of its own
        return id(tensor)


def _addresses(attributes: dict[str, Any], depth: int = 0) -> Iterator[Hashable]:
    """Addresses of the tensors that hang on a parameter: a quantised one's scales."""
    for value in attributes.values():
        if isinstance(value, torch.Tensor):
            yield _address(value)
        elif depth < 2 and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
            yield from _addresses(vars(value), depth + 1)


def _switches() -> Iterator[Hashable]:
    yield torch.get_float32_matmul_precision()
    yield torch.are_deterministic_algorithms_enabled()
    cuda = torch.backends.cuda
    yield (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
    )
