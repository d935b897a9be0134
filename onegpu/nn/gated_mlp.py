"""``down(act(gate(x)) * up(x))`` in the place of transformers' own gated MLP, with its layers under their names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from onegpu.kernels.gated_mlp import ACTIVATIONS, gated_mlp
from onegpu.nn.stand_in import bare, stand_in

CHILDREN = {"gate_proj", "up_proj", "down_proj"}


class GatedMLP(nn.Module):
    """The three layers of the module it was made from, whatever they are or become, and one op between them.

    Args:
        original: the module; its children, and later changes of them, are shared.
        activation: see :func:`onegpu.kernels.gated_mlp.gated_mlp`.
    """

    gate_proj: Any
    up_proj: Any
    down_proj: Any
    act_fn: Any
    original: Any

    def __init__(self, original: Any, activation: str) -> None:
        super().__init__()
        self._modules = original._modules
        self.activation, self.training = activation, original.training
        self.__dict__["original"] = original
        if "act_fn" not in self._modules:
            self.act_fn = original.act_fn

    def warmup_shapes(self) -> list[tuple[str, dict[str, Any]]]:
        """What `onegpu.warmup` runs for this layer, beside what its children say."""
        width = getattr(self.gate_proj, "out_features", None)
        return [("gated_mlp", {"n": width, "activation": self.activation})] if isinstance(width, int) else []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., N]`` -> ``[..., N]``."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.dtype != up.dtype or gate.dtype == torch.float64:
            return self.down_proj(self.act_fn(gate) * up)  # type: ignore[no-any-return]
        return self.down_proj(gated_mlp(gate, up, self.activation))  # type: ignore[no-any-return]


def is_gated(module: nn.Module) -> bool:
    """Gate, up and down, and a function between them."""
    return module._modules.keys() >= CHILDREN and callable(getattr(module, "act_fn", None))


def activation_of(module: Any) -> str | None:
    """The activation with which ours gives the module's results bit for bit; None if there is none.

    Whatever the sizes, devices and kinds of its layers: a copy with small ones is run on the CPU.
    """
    if not bare(module) or module._modules.keys() - {"act_fn"} != CHILDREN or module._parameters or module._buffers:
        return None
    names = list(ACTIVATIONS)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            gate, up, down = (nn.Linear(16, 16, dtype=dtype) for _ in range(3))
            x = torch.randn(64, 16).to(dtype) * 4
            expected = stand_in(module, gate_proj=gate, up_proj=up, down_proj=down)(x)
            results = {name: down(gated_mlp(gate(x), up(x), name)) for name in names}
        if not isinstance(expected, torch.Tensor):
            return None
        names = [name for name in names if torch.equal(results[name], expected)]
    return names[0] if names else None
