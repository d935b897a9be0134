"""Running a model whose parts are on several devices.

accelerate's ``dispatch_model`` has hooked every leaf when transformers hands the model over. These hooks take their
place, one for each part of the map: a block in CPU memory is copied to a GPU as a whole, codes and scales as they are,
and the copy is dropped after the call. Parameters stay where they are: saving, counting and adapters see real tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from accelerate.utils import find_device, send_to_device
from torch import nn

from onegpu.placement.device_map import Placement
from onegpu.placement.fit import refuse_move


class PlaceHook(ModelHook):  # type: ignore[misc]  # accelerate has no types
    """Runs a module on ``execution_device``.

    Args:
        stream: its tensors are elsewhere: copy them there for the call.
        output: device for what it returns; None leaves it.
        skip_keys: keyword arguments that stay where they are (the cache).
        io_same_device: give the output back on the device of the input. transformers sets this on encoders.
    """

    def __init__(
        self,
        execution_device: Any,
        *,
        stream: bool = False,
        output: Any = None,
        skip_keys: Any = None,
        io_same_device: bool = False,
    ) -> None:
        self.execution_device = execution_device
        self.stream = stream
        self.output = output
        self.skip_keys = skip_keys
        self.io_same_device = io_same_device
        self.input_device: Any = None
        self.kept: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Bring inputs, and with ``stream`` tensors, to the device."""
        if self.io_same_device:
            self.input_device = find_device([args, kwargs])
        if self.stream:
            self._restore()  # a call that raised has left its copies
            for copied in _copy_tensors(module, self.execution_device):
                self.kept.append(copied)  # one by one: out of memory half-way leaves something to restore
        args = send_to_device(args, self.execution_device)
        return args, send_to_device(kwargs, self.execution_device, skip_keys=self.skip_keys)

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Drop the copies; send the output on."""
        self._restore()
        target = self.input_device if self.io_same_device else self.output
        return output if target is None else send_to_device(output, target, skip_keys=self.skip_keys)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Drop the copies."""
        self._restore()
        return module

    def _restore(self) -> None:
        for held, name, original, copied in self.kept:
            if held.get(name) is copied:
                held[name] = original
        self.kept = []


def _copy_tensors(module: nn.Module, device: Any) -> Iterator[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]]:
    """Put copies on ``device`` in place of all tensors of ``module``; yields what restores them.

    A weight that learns is copied by an op that autograd sees, so that its gradient arrives at the original.
    """
    copies: dict[int, torch.Tensor] = {}
    for part in module.modules():
        held: Mapping[str, Any]
        for held in (part._parameters, part._buffers):
            assert isinstance(held, dict)
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in copies:
                    learns = tensor.requires_grad and torch.is_grad_enabled()
                    source = tensor if learns else tensor.data
                    copies[id(tensor)] = source.to(device, copy=True, non_blocking=True)
                held[name] = copies[id(tensor)]
                yield held, name, tensor, copies[id(tensor)]


def attach(model: Any, placement: Placement) -> None:
    """Make a model that was loaded by ``placement`` run: replaces the hooks that accelerate gave it."""
    skip_keys = getattr(model, "_skip_keys_device_placement", None)
    for child in model.children():
        remove_hook_from_submodules(child)
    on_gpu = placement.main != "cpu"
    for name, device in placement.device_map.items():
        module = _module(model, name)
        if module is None:
            continue
        if name in placement.streamed:
            hook = PlaceHook(placement.streamed[name], stream=True, skip_keys=skip_keys)
        else:
            # What follows an embedding is on a GPU, and so should be the masks that are made on its output's device.
            follows = placement.main if on_gpu and isinstance(module, nn.Embedding) else None
            hook = PlaceHook(device, output=follows, skip_keys=skip_keys)
        add_hook_to_module(module, hook)
    # accelerate picks the root's device from an unordered set; its other attributes on the root stay.
    add_hook_to_module(model, PlaceHook(placement.main, skip_keys=skip_keys, io_same_device=True))
    model.hf_device_map = dict(placement.device_map)
    if not getattr(model, "is_quantized", False):  # a quantised model has its own already
        model.__dict__.update(to=MethodType(_to, model), cuda=MethodType(_cuda, model))


def _to(self: Any, *args: Any, **kwargs: Any) -> Any:
    refuse_move(self, torch._C._nn._parse_to(*args, **kwargs)[0])
    return type(self).to(self, *args, **kwargs)


def _cuda(self: Any, device: Any = None) -> Any:
    refuse_move(self, "cuda" if device is None else device)


def _module(model: nn.Module, name: str) -> nn.Module | None:
    """The module of this name; None for a name of the map that is a tensor's."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
