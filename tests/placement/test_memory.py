"""The memory table: every tensor once, by format, against 16 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onegpu import AutoModelForCausalLM
from onegpu.placement.memory import memory_table, quantized_bytes, quantized_tensors
from tests.tiny import tiny_model, tiny_model_dir

CASES = {
    "fp4": {"load_in_4bit": True},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("kind", CASES)
def test_rows_sum_to_the_footprint(tmp_path: Path, model_type: str, kind: str) -> None:
    folder = tiny_model_dir(tmp_path, model_type)
    model = AutoModelForCausalLM.from_pretrained(folder, **CASES[kind])
    rows = memory_table(model)
    assert sum(row.bytes for row in rows) == model.get_memory_footprint()
    quantized = [row for row in rows if row.format in (kind, f"{kind} experts")]
    assert {row.format for row in quantized} == ({kind, f"{kind} experts"} if model_type == "mixtral" else {kind})
    plain = sum(row.bytes_16bit for row in rows)
    buffers = sum(buffer.numel() for buffer in tiny_model(model_type).buffers())
    assert plain == 2 * (model.num_parameters() + buffers)


def test_float_models_and_unquantised_layers_are_float_rows() -> None:
    model = tiny_model("llama")
    assert {row.format for row in memory_table(model)} == {"float32"}
    assert quantized_bytes(model.model.layers[0].mlp.up_proj) is None
    assert quantized_tensors(model.model.layers[0].mlp.up_proj) == set()


def test_a_bias_is_counted_as_what_it_is(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(tmp_path, "opt"), load_in_8bit=True)
    layer = model.model.decoder.layers[0].fc1
    assert id(layer.bias) not in quantized_tensors(layer)
    facts = quantized_bytes(layer)
    assert facts is not None
    kind, numel, parts = facts
    assert (kind, numel) == ("int8", layer.weight.numel())
    assert parts == {"weight": numel, "scales": 4 * layer.out_features, "bias": 4 * layer.out_features}
    assert layer.bias.dtype == torch.float32
