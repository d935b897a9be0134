"""The methods bound to a quantised model: it counts as the float one, moves but is not cast, and gives them back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from onegpu import optimize
from onegpu.convert import instance
from onegpu.errors import ArgumentError
from tests.tiny import tiny_model


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mixtral", "t5", "gpt2"])
def test_parameters_are_counted_as_the_weights_they_stand_for(model_type, kind):
    model = tiny_model(model_type)
    whole, without = model.num_parameters(), model.num_parameters(exclude_embeddings=True)
    optimize(model, quantize=kind)
    assert model.num_parameters() == whole and model.num_parameters(exclude_embeddings=True) == without
    trainable = model.num_parameters(only_trainable=True)
    assert 0 < trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) < whole


def test_a_dtype_is_refused_in_every_position():
    model = tiny_model("llama")
    optimize(model, quantize="nf4")
    for arguments in ((torch.float16,), ("cpu", torch.float16), (torch.zeros(1, dtype=torch.float16),)):
        with pytest.raises(ArgumentError, match=r"dtype=torch.float16 .*dequantize\(\)"):
            model.to(*arguments)
    assert model.to("cpu") is model and model.to(device="cpu", non_blocking=True) is model


def test_flags_and_methods_come_and_go():
    model = tiny_model("llama")
    before = set(vars(model))
    optimize(model, quantize="int8")
    assert model.is_loaded_in_8bit and not model.is_loaded_in_4bit and model.is_quantized
    twin = copy.deepcopy(model)
    assert twin.to.__self__ is twin and twin.num_parameters.__self__ is twin
    instance.unbind(model)
    assert not {"to", "cuda", "save_pretrained", "num_parameters", "is_loaded_in_8bit"} & (set(vars(model)) - before)
    assert "to" in vars(twin)


def test_a_quantised_model_can_be_pickled():
    model = tiny_model("llama")
    optimize(model, quantize="nf4")
    again = pickle.loads(pickle.dumps(model))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert again.num_parameters() == model.num_parameters() and again.to.__self__ is again
