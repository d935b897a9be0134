"""Every spelling of every argument, and for each that cannot work an error with its name, its value and the fix."""

from __future__ import annotations

import pytest
import torch
from transformers import BitsAndBytesConfig

from onegpu.arguments import checkpoint_dtype, translate
from onegpu.errors import ArgumentError
from tests.tiny import tiny_config


def refused(kwargs: dict, *words: str) -> None:
    """`translate(kwargs)` raises, and its message holds all `words`: the argument, the value, the fix."""
    with pytest.raises(ArgumentError) as caught:
        translate(dict(kwargs))
    message = str(caught.value)
    assert all(word in message for word in words), message


def test_nothing_asked_for_changes_nothing():
    kwargs = {"revision": "main", "subfolder": "x"}
    request = translate(kwargs)
    assert request.config is request.settings is request.dtype is None
    assert not request.flash and request.strict
    assert kwargs.pop("use_safetensors") is True and kwargs.pop("trust_remote_code") is False
    assert kwargs == {"revision": "main", "subfolder": "x"}


def test_load_in_4bit_alone_is_transformers_default():
    settings = translate({"load_in_4bit": True}).settings
    assert (settings.quant_type, settings.bits, settings.double_quant) == ("fp4", 4, False)
    assert settings.compute_dtype == torch.float32 and settings.quant_storage == torch.uint8
    assert settings.skip == () and settings.keep_default_skips


def test_load_in_8bit_alone_is_transformers_default():
    settings = translate({"load_in_8bit": True}).settings
    assert (settings.quant_type, settings.bits, settings.threshold) == ("int8", 8, 6.0)
    assert not settings.has_fp16_weight


FIELDS = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
    "llm_int8_skip_modules": ["q_proj"],
}


@pytest.mark.parametrize(
    "kwargs",
    [
        FIELDS,
        {"quantization_config": BitsAndBytesConfig(**FIELDS)},
        {"quantization_config": FIELDS},
        {"quantization_config": BitsAndBytesConfig(**FIELDS).to_dict()},
    ],
    ids=["arguments", "object", "dict", "dict of config.json"],
)
def test_a_quantisation_in_every_spelling(kwargs):
    kwargs = dict(kwargs)
    settings = translate(kwargs).settings
    assert (settings.quant_type, settings.double_quant, settings.skip) == ("nf4", True, ("q_proj",))
    assert settings.compute_dtype == torch.bfloat16
    assert not [name for name in kwargs if "bit" in name or "quant" in name or "int8" in name]


def test_a_skip_list_replaces_the_default_when_told_to():
    request = translate({"load_in_4bit": True, "llm_int8_skip_modules": ["q_proj"], "replace_default_skips": True})
    assert not request.settings.keep_default_skips


def test_another_quantizer_goes_to_transformers():
    from transformers import GPTQConfig

    given = GPTQConfig(bits=4)
    kwargs = {"quantization_config": given}
    assert translate(kwargs).config is None and kwargs["quantization_config"] is given


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.float16, "float16", "torch.float16"])
def test_a_dtype_in_every_spelling(name, value):
    kwargs = {name: value}
    assert translate(kwargs).dtype == torch.float16
    assert "dtype" not in kwargs and "torch_dtype" not in kwargs


def test_dtype_auto_and_the_same_twice():
    assert translate({"dtype": "auto"}).dtype == "auto"
    assert translate({"dtype": torch.float16, "torch_dtype": torch.float16}).dtype == torch.float16


@pytest.mark.parametrize(
    "kwargs",
    [
        {"use_flash_attention_2": True},
        {"attn_implementation": "flash_attention_2"},
        {"attn_implementation": "onegpu"},
        {"use_flash_attention_2": True, "attn_implementation": "flash_attention_2"},
    ],
)
def test_flash_attention_in_every_spelling(kwargs):
    assert translate(dict(kwargs)).flash


@pytest.mark.parametrize("kwargs", [{}, {"use_flash_attention_2": False}, {"attn_implementation": "eager"}])
def test_other_attention_stays(kwargs):
    given = dict(kwargs)
    assert not translate(given).flash
    assert given.get("attn_implementation") == kwargs.get("attn_implementation")


def test_obsolete_arguments_are_taken():
    kwargs = {"low_cpu_mem_usage": True, "resume_download": True, "_fast_init": True, "use_auth_token": "secret"}
    translate(kwargs)
    assert kwargs["token"] == "secret" and not set(kwargs) & {"low_cpu_mem_usage", "resume_download", "_fast_init"}


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, ["load_in_4bit=True", "load_in_8bit=True", "one of them"]),
        ({"load_in_4bit": "yes"}, ["load_in_4bit='yes'", "True or False"]),
        ({"load_in_8bit": 1}, ["load_in_8bit=1", "True or False"]),
        ({"strict": "no"}, ["strict='no'", "True or False"]),
        (
            {"use_flash_attention_2": True, "attn_implementation": "eager"},
            ["use_flash_attention_2=True", "attn_implementation='eager'", "one of them"],
        ),
        ({"use_flash_attention_2": True, "attn_implementation": "sdpa"}, ["use_flash_attention_2=True", "'sdpa'"]),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, ["bnb_4bit_quant_type='nf3'", "'nf4' or 'fp4'"]),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}},
            ["bnb_4bit_quant_type='int4'", "'nf4' or 'fp4'"],
        ),
        ({"quantization_config": {"load_in_4bit": True, "load_in_8bit": True}}, ["quantization_config", "keep one"]),
        ({"quantization_config": BitsAndBytesConfig()}, ["quantization_config", "set load_in_4bit=True or"]),
        (
            {"load_in_4bit": True, "quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
            ["load_in_4bit=True", "put load_in_4bit into quantization_config"],
        ),
        (
            {"bnb_4bit_quant_type": "nf4", "quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
            ["bnb_4bit_quant_type='nf4'", "into quantization_config"],
        ),
        ({"bnb_4bit_quant_type": "nf4"}, ["bnb_4bit_quant_type='nf4'", "add load_in_4bit=True"]),
        ({"llm_int8_threshold": 4.0}, ["llm_int8_threshold=4.0", "load_in_8bit=True"]),
        ({"load_in_8bit": True, "llm_int8_threshold": "high"}, ["'high'", "llm_int8_threshold"]),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": 16}, ["bnb_4bit_compute_dtype", "16"]),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "int3"}, ["bnb_4bit_quant_storage", "int3"]),
        ({"load_in_4bit": True, "bnb_4bit_frobnicate": 1}, ["bnb_4bit_frobnicate=1", "use one of"]),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_tpye": "nf4"}},
            ["bnb_4bit_quant_tpye='nf4'", "did you mean bnb_4bit_quant_type?"],
        ),
        ({"dtype": "float13"}, ["dtype='float13'", "bfloat16"]),
        ({"dtype": torch.int8}, ["dtype=torch.int8", "float16, bfloat16 or float32"]),
        ({"dtype": 16}, ["dtype=16", "float16"]),
        ({"dtype": torch.float16, "torch_dtype": torch.float32}, ["torch_dtype=torch.float32", "torch.float16"]),
        ({"use_safetensors": False}, ["use_safetensors=False", "unpickle", "safetensors"]),
        ({"device_map": "cuda:7"}, ["device_map", "cuda:7"]),
        ({"device_map": 7}, ["device_map", "7"]),
        ({"device_map": {"": 7}}, ["device_map", "7"]),
        ({"device_map": "gpu"}, ["device_map='gpu'", "'cuda:0'"]),
    ],
)
def test_what_cannot_work_is_refused(kwargs, words):
    refused(kwargs, *words)


@pytest.mark.parametrize(("written", "read"), [("bfloat16", torch.bfloat16), (torch.half, torch.half), (None, None)])
def test_the_dtype_of_a_checkpoint(written, read):
    config = tiny_config("llama")
    config.dtype = written
    assert checkpoint_dtype("somewhere", config) == read
