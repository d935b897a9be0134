"""Small copies of modules, to find out what a module computes whatever its size and wherever its weights are."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

_INTERNAL = nn.Module().__dict__.keys() - {"training"}  # of every module


def stand_in(module: nn.Module, **parts: torch.Tensor | nn.Module) -> Any:
    """The class's ``forward``, with the module's settings and these parameters and children in place of its own.

    In eval mode, without a gradient and without hooks.
    """
    small = copy.copy(module)
    small.__dict__ = {key: value for key, value in module.__dict__.items() if key not in ("forward", "_hf_hook")}
    small._parameters = {k: nn.Parameter(v, False) for k, v in parts.items() if isinstance(v, torch.Tensor)}
    small._modules = {**module._modules, **{k: v for k, v in parts.items() if isinstance(v, nn.Module)}}
    small.training = False

    def run(x: torch.Tensor) -> Any:
        with torch.no_grad():
            return type(small).forward(small, x)

    return run


def bare(module: nn.Module) -> bool:
    """Whether one tensor goes in, and nothing but the class's ``forward`` works on it: no hooks, nothing patched in.

    accelerate's hook does not count: it moves on to what takes the module's place.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name, None) for name in hooks):
        return False
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        return False
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return [p.kind for p in parameters] == [inspect.Parameter.POSITIONAL_OR_KEYWORD]


def settings(module: nn.Module) -> Hashable:
    """What a module's code can tell it by from others of its class, but for its own tensors and children.

    Objects count as themselves, a module in its own place (what ours keep of transformers') by its settings.
    """
    plain = bool, int, float, str, type(None)

    def told(value: Any) -> Hashable:
        if isinstance(value, nn.Module) and value._parameters is module._parameters:
            return settings(value)
        known: Hashable = value if type(value) in plain else id(value)
        return type(value), known

    own = ((name, value) for name, value in vars(module).items() if name not in _INTERNAL)
    return type(module), tuple((name, told(value)) for name, value in own)
