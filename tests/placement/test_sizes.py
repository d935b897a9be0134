from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import onegpu
from onegpu.convert.quantizer import OneGPUQuantizer
from onegpu.nn import Linear4bit
from onegpu.placement import memory_table
from onegpu.placement.device_map import Weights, place
from onegpu.placement.sizes import bytes_4bit, in_4_bits, stored_sizes
from tests.placing import bloom, weights
from tests.tiny import tiny_model_dir

QUANTIZED: list[dict[str, Any]] = [
    {"load_in_4bit": True},
    {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"},
    {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16, "dtype": torch.float16},
    {"load_in_8bit": True},
]


@pytest.mark.parametrize("arguments", QUANTIZED)
@pytest.mark.parametrize("kind", ["bloom", "mixtral", "gpt2", "t5", "falcon_old"])
def test_the_plan_is_what_loading_takes_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, arguments: dict[str, Any]
):
    planned: list[Weights] = []

    def spy(weights: Weights, wish: Any) -> Any:
        planned.append(weights)
        return place(weights, wish)

    monkeypatch.setattr(f"{OneGPUQuantizer.__module__}.place", spy)
    auto = onegpu.AutoModelForSeq2SeqLM if kind == "t5" else onegpu.AutoModelForCausalLM
    model = auto.from_pretrained(tiny_model_dir(tmp_path, kind), **arguments)
    loaded = sum(row.bytes for row in memory_table(model) if row.name == "weights")
    assert planned[0].sizes.total == loaded


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 64 * 256, 64 * 256 + 1])
@pytest.mark.parametrize("nested", [False, True])
def test_bytes_4bit(numel: int, nested: bool):
    layer = Linear4bit(numel, 1, bias=False, compress_statistics=nested).to("cpu")
    assert bytes_4bit(numel, nested=nested) == sum(layer.nbytes().values())


def test_tied_tensors_count_once():
    model = bloom("float16")
    assert model.sizes.tied == {"lm_head.weight": "transformer.word_embeddings.weight"}
    assert model.sizes.bytes["lm_head.weight"] == 0
    assert model.sizes.total == 2 * sum(
        p.numel() for name, p in model.model.named_parameters() if "lm_head" not in name
    )


def test_tensors_that_are_the_same_object_count_once():
    first, second = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    sizes = stored_sizes(torch.nn.Sequential(first, second))
    assert sizes.total == 64
    assert sizes.tied == {"1.weight": "0.weight"}


def test_a_dtype_of_its_own():
    model = torch.nn.ModuleDict({"wo": torch.nn.Linear(4, 4, bias=False), "wi": torch.nn.Linear(4, 4, bias=False)})
    sizes = stored_sizes(model.half(), dtypes={"wo": torch.float32})
    assert sizes.bytes == {"wo.weight": 64, "wi.weight": 32}


def test_known_tensors_have_the_size_they_are_given():
    assert stored_sizes(torch.nn.Linear(4, 4), known={"weight": 7}).bytes == {"weight": 7, "bias": 16}


@pytest.mark.parametrize("form", ["float16", "int8"])
def test_the_estimate_in_4_bits_is_that_of_4_bits(form: str):
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4)
    model, smaller = weights(config, form), weights(config, "fp4")
    assert in_4_bits(model.model, model.sizes).total == smaller.sizes.total
