"""The few methods that a quantised model overrides, bound to the instance: its class stays transformers' own.

``copy.deepcopy`` and pickle rebind them to the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from onegpu.convert.dequantize import some_taken_by_bitsandbytes
from onegpu.errors import ArgumentError
from onegpu.nn import Linear4bit, Linear8bitLt
from onegpu.nn.experts import ExpertStack
from onegpu.placement.fit import refuse_move


def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Parameters of the model, quantised ones counted as the weights they stand for.

    (transformers' own asks bitsandbytes, which need not be installed.)
    """
    skip = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
    counts: dict[int, int] = {}
    for module in self.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in skip or (only_trainable and not parameter.requires_grad):
                continue
            numel = parameter.numel()
            if isinstance(module, Linear4bit) and parameter is module.weight:
                numel = module.in_features * module.out_features
            elif isinstance(module, ExpertStack):
                numel = module.shape.numel()
            counts[id(parameter)] = numel
    return sum(counts.values())


def to(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Move the model. A dtype is refused: quantised weights have none to change."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if dtype is not None:
        raise ArgumentError(
            f"dtype={dtype} cannot be given to .to() of a quantised model: its weights are codes. Load it with "
            f"from_pretrained(..., dtype={dtype}), or call model.dequantize() first."
        )
    refuse_move(self, device)
    return nn.Module.to(self, *args, **kwargs)


def cuda(self: Any, device: Any = None) -> Any:
    """Move the model to a GPU."""
    refuse_move(self, "cuda" if device is None else device)
    return nn.Module.cuda(self, device)


def save_pretrained(
    self: Any, save_directory: Any, *args: Any, bitsandbytes_compatible: bool = False, **kwargs: Any
) -> Any:
    """transformers' ``save_pretrained``.

    Args:
        bitsandbytes_compatible: write in 16 bits what transformers + bitsandbytes cannot load quantised (experts of a
            mixture, subclasses of ``nn.Linear`` such as Falcon's), so that the files load there as well. Where nothing
            else is quantised, the files are those of an ordinary model, and config.json says so.
    """
    quantizer, config = self.hf_quantizer, self.config.quantization_config
    quantizer.compatible = bitsandbytes_compatible
    if bitsandbytes_compatible and not some_taken_by_bitsandbytes(self):
        del self.config.quantization_config
    try:
        return type(self).save_pretrained(self, save_directory, *args, **kwargs)
    finally:
        quantizer.compatible = False
        self.config.quantization_config = config


def to_bettertransformer(self: Any) -> Any:
    """``onegpu.optimize(self)``, in place: attention becomes FlashAttention where it can be. Returns the model."""
    from onegpu.convert.attention_rule import say_left
    from onegpu.convert.optimize import optimize

    say_left(optimize(self), self)
    return self


def reverse_bettertransformer(self: Any) -> Any:
    """``onegpu.restore(self)``: takes :func:`to_bettertransformer` back, in place. Returns the model."""
    from onegpu.convert.optimize import restore

    restore(self)
    return self


class BoundMethod:
    """``types.MethodType`` that can be pickled: that one comes back as whatever the *class* calls by its name."""

    def __init__(self, function: Callable[..., Any], owner: Any) -> None:
        self.__func__, self.__self__ = function, owner
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)


_METHODS = (num_parameters, to, cuda, save_pretrained)


def bind_conversions(model: Any) -> None:
    """Give a model of our Auto classes the methods that optimum once gave it."""
    for method in (to_bettertransformer, reverse_bettertransformer):
        model.__dict__[method.__name__] = BoundMethod(method, model)


def bind(model: Any) -> None:
    """Give a quantised model its methods."""
    for method in _METHODS:
        model.__dict__[method.__name__] = BoundMethod(method, model)
    bits = {
        8 if isinstance(m, Linear8bitLt) else 4 for m in model.modules() if isinstance(m, (Linear4bit, Linear8bitLt))
    }
    # PEFT asks for these before it turns on gradient checkpointing.
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = 8 in bits, 4 in bits


def unbind(model: Any) -> None:
    """Take them away again."""
    for method in _METHODS:
        model.__dict__.pop(method.__name__, None)
    for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit"):
        model.__dict__.pop(flag, None)
