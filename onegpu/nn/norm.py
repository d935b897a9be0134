"""Norms in the place of transformers' own, with their parameters under their names: one op each.

``rms_norm`` rounds as one of four forms does; ``form_of`` finds out which, by running a small stand-in of the module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from onegpu.kernels.layer_norm import layer_norm
from onegpu.kernels.rms_norm import STYLES, rms_norm
from onegpu.nn.stand_in import bare, stand_in

_KERNEL_TYPES = (torch.float16, torch.bfloat16, torch.float32)


class RMSNorm(nn.Module):
    """``rms_norm(x, weight, eps)`` in the form of the module it was made from.

    Args:
        original: the module; its parameters, and later changes of them, are shared.
        style: see :func:`onegpu.kernels.rms_norm.rms_norm`.
    """

    weight: torch.Tensor
    original: Any

    def __init__(self, original: Any, style: str) -> None:
        super().__init__()
        self._parameters = original._parameters
        self.eps, self.style = epsilon_of(original) or 0.0, style
        self.train(original.training)
        self.__dict__["original"] = original  # not a child: it has no names of its own in the model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., N]`` -> ``[..., N]``; dtypes as the original's."""
        if x.dtype not in _KERNEL_TYPES:
            return self.original(x)  # type: ignore[no-any-return]
        return rms_norm(x, self.weight, self.eps, style=self.style)  # type: ignore[no-any-return]

    def warmup_shapes(self) -> list[tuple[str, dict[str, Any]]]:
        """What `onegpu.warmup` runs for this layer."""
        return [("rms_norm", {"n": self.weight.numel(), "style": self.style})]

    def extra_repr(self) -> str:
        """Beside the class: what it normalises and how."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}, style={self.style!r}"


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` over one dimension by our op, and by torch's where autocast or two dtypes meet."""

    original: Any

    def __init__(self, original: nn.LayerNorm) -> None:
        nn.Module.__init__(self)
        self._parameters = original._parameters
        self.normalized_shape, self.eps = original.normalized_shape, original.eps
        self.elementwise_affine = original.elementwise_affine
        self.train(original.training)
        self.__dict__["original"] = original

    def warmup_shapes(self) -> list[tuple[str, dict[str, Any]]]:
        """What `onegpu.warmup` runs for this layer."""
        if not self.elementwise_affine or len(self.normalized_shape) != 1:
            return []
        return [("layer_norm", {"n": self.normalized_shape[0], "bias": self.bias is not None})]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., N]`` -> ``[..., N]`` in the same dtype."""
        same = all(p is None or p.dtype == input.dtype for p in (self.weight, self.bias))
        if not same or input.dtype not in _KERNEL_TYPES or torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        return layer_norm(input, self.weight, self.bias, self.eps)  # type: ignore[no-any-return]


def epsilon_of(module: Any) -> float | None:
    """What a norm adds to the variance, by either of its names; None if it says nothing."""
    found = [getattr(module, name, None) for name in ("variance_epsilon", "eps")]
    return next((float(value) for value in found if isinstance(value, float)), None)


def is_rms_like(module: nn.Module) -> bool:
    """A variance epsilon, one parameter ``weight`` in one dimension, and nothing else."""
    names = [*module._parameters, *module._buffers, *module._modules]
    weight = module._parameters.get("weight")
    return names == ["weight"] and weight is not None and weight.dim() == 1 and epsilon_of(module) is not None


def form_of(module: nn.Module) -> str | None:
    """The style of :func:`rms_norm` whose results are those of the module bit for bit; None if there is none.

    Whatever the sizes and devices of the module: a copy of eight elements is run on the CPU.
    """
    if not bare(module):
        return None
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16)
    styles, eps = list(STYLES), epsilon_of(module) or 0.0
    for dtype in dtypes:
        for weight_dtype in dtypes:
            x = (torch.randn(64, 8, generator=generator) * 3).to(dtype)
            weight = torch.randn(8, generator=generator).to(weight_dtype)
            expected = stand_in(module, weight=weight)(x)
            styles = [s for s in styles if _same(rms_norm(x, weight, eps, style=s), expected)]
    return styles[0] if styles else None


def _same(one: torch.Tensor, two: Any) -> bool:
    return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
