"""A downloaded config.json chooses no code; one that is damaged is named."""

from __future__ import annotations

import json
import logging

import pytest
import transformers

import onegpu
from onegpu.errors import CheckpointError, OneGPUError
from onegpu.formats.config import ATTENTION_NAMES, EXPERTS_NAMES, config_error, sanitize
from tests.tiny import tiny_config


@pytest.mark.parametrize("name", ["evil/kernel", "kernels-community/flash-attn", "paged|evil/kernel", "my_attention"])
@pytest.mark.parametrize("field", ["_attn_implementation", "_experts_implementation"])
def test_names_of_code_are_dropped_and_said(caplog, name, field):
    config = tiny_config("mixtral")
    setattr(config, field, name)
    with caplog.at_level(logging.WARNING, logger="onegpu"):
        dropped = sanitize(config)
    assert dropped == [f"{field[1:]}={name!r}"] and getattr(config, field) is None
    assert name in caplog.text and "argument" in caplog.text


@pytest.mark.parametrize("field", ["kernel_config", "use_kernels", "hub_kernels", "fusion_config"])
def test_fields_that_load_kernels_are_dropped(field):
    config = tiny_config("llama")
    setattr(config, field, {"RMSNorm": "evil/norm"})
    assert sanitize(config) and not hasattr(config, field)


def test_sub_configs_are_cleaned_too():
    config = transformers.CLIPConfig()
    config.text_config._attn_implementation = "evil/kernel"
    assert sanitize(config) == ["attn_implementation='evil/kernel'"]
    assert config.text_config._attn_implementation is None


@pytest.mark.parametrize("name", sorted(ATTENTION_NAMES))
def test_names_that_transformers_or_we_serve_pass(name):
    config = tiny_config("mixtral")
    config._attn_implementation = name
    config._experts_implementation = sorted(EXPERTS_NAMES)[0]
    assert sanitize(config) == [] and config._attn_implementation == name


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"model_type": "llama", "num_hidden_layers": "two"}', '{"model_type": 7}', "\x00"]
)
def test_a_damaged_config_json_is_an_error_of_ours(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(OneGPUError, match=str(tmp_path)):
        onegpu.AutoModelForCausalLM.from_pretrained(tmp_path, load_in_4bit=True)


DAMAGED = [
    {"load_in_4bit": "maybe", "quant_method": "bitsandbytes"},
    {"load_in_4bit": True, "load_in_8bit": True, "quant_method": "bitsandbytes"},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf3", "quant_method": "bitsandbytes"},
    {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float13", "quant_method": "bitsandbytes"},
    {"load_in_8bit": True, "llm_int8_threshold": "high", "quant_method": "bitsandbytes"},
    {"quant_method": "bitsandbytes"},
    "nf4",
]


@pytest.mark.parametrize("fields", DAMAGED, ids=str)
def test_a_damaged_quantization_config_is_an_error_of_ours(tiny, tmp_path, fields):
    onegpu.AutoModelForCausalLM.from_pretrained(tiny("llama"), load_in_4bit=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": fields}))
    with pytest.raises(OneGPUError) as caught:
        onegpu.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) or "quant" in str(caught.value)


def test_config_error_is_short_and_names_the_file():
    error = config_error("folder", ValueError("long " * 500))
    assert isinstance(error, CheckpointError) and error.file == "folder" and len(str(error)) < 500
    assert "KeyError" in str(config_error("folder", KeyError()))
