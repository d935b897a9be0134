"""Putting one module in another's place: names, accelerate's hooks and registered children stay as they were."""

from __future__ import annotations

import torch
from torch import nn

from onegpu.nn.experts import ExpertStack


def swap_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace submodule ``name`` of ``model`` by ``new``, moving accelerate's hook along."""
    old = model.get_submodule(name)
    if hasattr(old, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        hook = old._hf_hook
        remove_hook_from_module(old)
        add_hook_to_module(new, hook)
    model.set_submodule(name, new)


def stack_to_parameter(model: nn.Module, name: str, values: torch.Tensor) -> None:
    """Replace an :class:`ExpertStack` by the 3-D parameter it came from, or by one of these values."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    assert isinstance(getattr(parent, child), ExpertStack)
    delattr(parent, child)
    setattr(parent, child, values if isinstance(values, nn.Parameter) else nn.Parameter(values, requires_grad=False))
