"""The adapter to transformers: registered under our own name, and every method that either version of it calls."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

import onegpu
from onegpu.convert.quantizer import QUANT_METHOD, OneGPUConfig, OneGPUQuantizer, with_default_skips


def test_it_takes_no_name_of_others():
    assert AUTO_QUANTIZER_MAPPING[QUANT_METHOD] is OneGPUQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] is OneGPUConfig
    for name in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
        assert AUTO_QUANTIZER_MAPPING[name].__module__.startswith("transformers.quantizers.quantizer_bnb")


def test_the_methods_it_overrides_exist_in_this_transformers():
    """A method renamed by transformers would be ours alone, and never called."""
    own = {name for name, value in vars(OneGPUQuantizer).items() if callable(value) and not name.startswith("__")}
    own -= {"_place"}  # called by us
    theirs = set(dir(HfQuantizer))
    either = {"param_element_size", "quantized_element_size"}  # 5.17 and 5.23 call it differently
    assert own - theirs <= either, f"transformers {transformers.__version__} has no {own - theirs - either}"


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_the_model_looks_as_if_bitsandbytes_had_loaded_it(tiny, options):
    model = onegpu.AutoModelForCausalLM.from_pretrained(tiny("llama"), **options)
    assert model.quantization_method == "bitsandbytes" and model.is_quantized
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_serializable()
    assert isinstance(model.config.quantization_config, transformers.BitsAndBytesConfig)
    assert model.config.to_dict()["quantization_config"]["quant_method"] == "bitsandbytes"
    assert model.is_loaded_in_4bit == ("load_in_4bit" in options) == (not model.is_loaded_in_8bit)


def test_a_model_saved_twice_and_loaded_twice_is_the_same(tiny, tmp_path):
    load = onegpu.AutoModelForCausalLM.from_pretrained
    first = load(tiny("mixtral"), load_in_4bit=True, bnb_4bit_use_double_quant=True)
    first.save_pretrained(tmp_path / "1")
    load(tmp_path / "1").save_pretrained(tmp_path / "2")
    for file in (tmp_path / "1").iterdir():
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes(), file.name


def test_16_bit_storage_and_compute_dtype(tiny, tmp_path):
    options = {"bnb_4bit_quant_storage": torch.bfloat16, "bnb_4bit_compute_dtype": torch.bfloat16}
    model = onegpu.AutoModelForCausalLM.from_pretrained(tiny("llama"), load_in_4bit=True, **options)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.shape == (112 * 64 // 4, 1)
    assert layer.compute_dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = onegpu.AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].mlp.up_proj
    assert again.weight.dtype == torch.bfloat16
    assert torch.equal(again.weight.view(torch.uint8), layer.weight.view(torch.uint8))


def test_the_default_skips_join_a_list_once():
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["a", "lm_head"])
    assert with_default_skips(config, ("lm_head", "b")).llm_int8_skip_modules == ["a", "lm_head", "b"]
    assert config.llm_int8_skip_modules == ["a", "lm_head"]
    plain = transformers.BitsAndBytesConfig(load_in_4bit=True)
    assert with_default_skips(plain, ("lm_head",)).llm_int8_skip_modules is None
