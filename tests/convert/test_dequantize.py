"""The way back to floats, and what is written for transformers + bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from onegpu import AutoModel, optimize
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
    optimize(model)  # the norms and MLPs, which are not expanded
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


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_a_layer_that_the_checkpoint_does_not_have_is_made_of_floats(tiny, tmp_path, options):
    """A base model from the file of one without a pooler: the new layer is there to be trained, as codes cannot be."""
    model = AutoModel.from_pretrained(tiny("bert"), **options)
    assert type(model.pooler.dense) is nn.Linear and model.pooler.dense.weight.requires_grad
    assert model.config.quantization_config.llm_int8_skip_modules[-1] == "pooler.dense"
    ids = torch.tensor([[5, 6, 7]])
    output = model(input_ids=ids)
    assert output.pooler_output.isfinite().all()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(input_ids=ids).pooler_output, output.pooler_output, rtol=1e-5, atol=1e-5)
    assert type(again.encoder.layer[0].output.dense) is type(model.encoder.layer[0].output.dense) is not nn.Linear
