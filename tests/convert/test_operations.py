"""Quantising while tensors stream in: the result of quantising the layer itself, and errors that come through."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import onegpu
from onegpu.nn import Linear4bit, Linear8bitLt
from tests.damage import changed, damaged, refuses

CLASSES = {"nf4": Linear4bit, "int8": Linear8bitLt}
OPTIONS = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_streamed_layer_is_the_layer_quantised_by_hand(tiny, kind, dtype):
    folder = tiny("llama", dtype=dtype)
    name = "model.layers.1.mlp.down_proj"
    streamed = onegpu.AutoModelForCausalLM.from_pretrained(folder, **OPTIONS[kind]).get_submodule(name)
    weight = load_file(folder / "model.safetensors")[f"{name}.weight"]
    fields = {"has_fp16_weights": False} if kind == "int8" else {"quant_type": "nf4", "compress_statistics": False}
    by_hand = CLASSES[kind](112, 64, bias=False, **fields)
    by_hand.weight = by_hand.weight._like(weight, None).to("cpu")
    assert streamed.state_dict().keys() == by_hand.state_dict().keys()
    for key, value in by_hand.state_dict().items():
        assert torch.equal(streamed.state_dict()[key], value), key


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_conv1d_is_quantised_as_the_matrix_it_multiplies_by(tiny, kind):
    streamed = onegpu.AutoModelForCausalLM.from_pretrained(tiny("gpt2"), **OPTIONS[kind]).transformer.h[0].attn.c_attn
    weight = load_file(tiny("gpt2") / "model.safetensors")["transformer.h.0.attn.c_attn.weight"]
    assert weight.shape == (64, 192) and (streamed.in_features, streamed.out_features) == (64, 192)
    assert (streamed.dequantize(torch.float32).t() - weight).abs().max() < 0.2 * weight.abs().max()


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_frozen_quantised_weight_and_a_trainable_rest(tiny, kind):
    model = onegpu.AutoModelForCausalLM.from_pretrained(tiny("opt"), **OPTIONS[kind])
    layer = model.model.decoder.layers[0].fc1
    assert not layer.weight.requires_grad and layer.bias.isfinite().all()
    assert torch.equal(layer.bias, load_file(tiny("opt") / "model.safetensors")["model.decoder.layers.0.fc1.bias"])


@pytest.mark.parametrize("kind", OPTIONS)
def test_an_error_in_the_stream_is_ours_and_not_a_log(tiny, tmp_path, kind):
    """transformers logs what a conversion raises and goes on."""
    name = "transformer.h.1.mlp.c_fc.weight"
    folder = damaged(tiny("gpt2"), tmp_path, changed(name, lambda t: t.t()))
    load = onegpu.AutoModelForCausalLM.from_pretrained
    refuses(lambda: load(folder, **OPTIONS[kind]), folder, name, "shape")
