"""Small copies that compute what the module's class does."""

from __future__ import annotations

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from onegpu.nn.stand_in import bare, settings, stand_in


class Scale(nn.Module):
    def __init__(self, n: int, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.inner = nn.Linear(n, n)
        self.factor = factor

    def forward(self, x):
        return self.inner(x) * self.weight * (0 if self.training else self.factor)


class Two(Scale):
    def forward(self, x, gate=None):
        return x


def test_the_copy_has_the_settings_and_other_tensors():
    module = Scale(64, 3.0).to("meta").train()
    x, weight, inner = torch.randn(2, 4), torch.randn(4), nn.Linear(4, 4)
    made = stand_in(module, weight=weight, inner=inner)(x)
    assert torch.equal(made, inner(x) * weight * 3.0) and not made.requires_grad
    assert module.training and module.weight.is_meta and module.inner.weight.is_meta


def test_bare_means_that_the_class_alone_computes():
    assert bare(Scale(4, 1.0)) and not bare(Two(4, 1.0)) and not bare(nn.Bilinear(2, 2, 2))
    hooked, patched, moved = (Scale(4, 1.0) for _ in range(3))
    handle = hooked.register_forward_hook(lambda *_: None)
    patched.forward = lambda x: x
    add_hook_to_module(moved, ModelHook())
    assert not bare(hooked) and not bare(patched) and bare(moved)
    handle.remove()
    assert bare(hooked)
    x, inner = torch.randn(2, 4), nn.Linear(4, 4)
    assert torch.equal(stand_in(moved, weight=torch.ones(4), inner=inner)(x), inner(x))


def test_settings_tell_modules_apart_but_not_their_tensors() -> None:
    one, same, other = Scale(2, 1.5), Scale(3, 1.5), Scale(2, 2.5)
    assert settings(one) == settings(same) != settings(other)
    assert settings(one) != settings(Two(2, 1.5)) and settings(one) != settings(Scale(2, 1.5).train(False))
    for module in (one, same):
        module.__dict__["original"] = kept = Scale(2, 1.0)
        kept._parameters = module._parameters
    assert settings(one) == settings(same)  # what a module of ours keeps of transformers'
    same.__dict__["original"] = Scale(2, 1.0)
    assert settings(one) != settings(same)  # with tensors of its own
