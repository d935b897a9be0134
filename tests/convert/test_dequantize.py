"""The way back to floats, and what is written for transformers + bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from onegpu import optimize
from onegpu.convert.dequantize import (
    compatible_state_dict,
    dequantize_modules,
    some_taken_by_bitsandbytes,
    taken_by_bitsandbytes,
)
from onegpu.nn import Linear4bit, Linear8bitLt
from onegpu.nn.experts import ExpertStack
from tests.tiny import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "falcon_new"])
def test_every_module_comes_back_in_its_class(model_type, kind, dtype):
    model = tiny_model(model_type)
    classes = {name: type(module) for name, module in model.named_modules()}
    optimize(model, quantize=kind)
    kinds = (Linear4bit, Linear8bitLt, ExpertStack)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    assert dequantize_modules(model, dtype) == names
    assert {name: type(module) for name, module in model.named_modules()} == classes
    for name in names:
        weight = model.get_parameter(name) if name not in classes else model.get_submodule(name).weight
        assert weight.dtype == dtype and weight.isfinite().all()


def test_what_bitsandbytes_takes():
    class Special(nn.Linear):
        pass

    assert taken_by_bitsandbytes(nn.Linear) and taken_by_bitsandbytes(Conv1D) and not taken_by_bitsandbytes(Special)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(("model_type", "some"), [("llama", True), ("falcon_old", False), ("mixtral", True)])
def test_the_compatible_state_dict(model_type, some, kind):
    model = tiny_model(model_type)
    floats = set(model.state_dict())
    optimize(model, quantize=kind)
    state = compatible_state_dict(model)
    assert some_taken_by_bitsandbytes(model) == some and floats <= set(state)
    scales = [name for name in state if name.endswith((".absmax", ".SCB"))]
    assert bool(scales) == some and not any("experts" in name for name in scales)
    assert (set(state) == floats) == (not some)
    if model_type == "mixtral":
        assert state["model.layers.0.mlp.experts.down_proj"].shape == (4, 64, 112)
