"""Which parameter a tensor feeds, and names that only look as if they fed one."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import onegpu
from onegpu.convert.checkpoint_plan import meta_model
from onegpu.convert.names import Fed, check_expert_names, missing_and_unexpected, model_names
from onegpu.errors import CheckpointError
from tests.tiny import tiny_config


def build(model_type: str):
    import transformers

    config = tiny_config(model_type)
    classes = {"gpt2": "GPT2LMHeadModel", "mixtral": "MixtralForCausalLM", "bert": "BertForMaskedLM"}
    return meta_model(getattr(transformers, classes[model_type]), config, torch.float32)


def stored(folder) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "bert"])
def test_every_tensor_of_a_checkpoint_feeds_the_model(tiny, model_type):
    model, state = build(model_type), set(build(model_type).state_dict())
    fed = model_names(model, stored(tiny(model_type)))
    assert {entry.name for entry in fed.values()} <= state
    assert missing_and_unexpected(model, fed.values()) == ([], [])


def test_a_base_models_names_get_its_prefix_and_old_names_the_new():
    fed = model_names(build("gpt2"), ["h.0.attn.c_attn.weight", "wte.weight"])
    assert fed["h.0.attn.c_attn.weight"] == Fed("transformer.h.0.attn.c_attn.weight")
    name = "bert.encoder.layer.0.output.LayerNorm.gamma"
    assert model_names(build("bert"), [name])[name].name == "bert.encoder.layer.0.output.LayerNorm.weight"


def test_what_is_missing_and_what_is_unknown():
    model = build("gpt2")
    fed = {name: Fed(name) for name in model.state_dict()}
    del fed["lm_head.weight"]  # tied
    assert missing_and_unexpected(model, fed.values()) == ([], [])
    del fed["transformer.wte.weight"]
    fed["extra"] = Fed("extra")
    missing, unexpected = missing_and_unexpected(model, fed.values())
    assert set(missing) == {"lm_head.weight", "transformer.wte.weight"} and unexpected == ["extra"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("experts.0.w1", "experts*0.w1", "is no name of an expert's matrix"),
        ("experts.0.w1", "experts.00.w1", "is no name of an expert's matrix"),
        ("experts.0.w1", "experts.4.w1", "7 of its 8 expert matrices"),
        ("experts.3.w2.", "experts.3.w2,", "is no name of an expert's matrix"),
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_experts_under_damaged_names_are_refused(tiny, tmp_path, old, new, message, quantized):
    source = tiny("mixtral")
    options = {} if quantized else {"load_in_4bit": True}
    if quantized:
        onegpu.AutoModelForCausalLM.from_pretrained(source, load_in_4bit=True).save_pretrained(tmp_path / "q")
        source = tmp_path / "q"
    names = stored(source)
    damaged = {
        name: name.replace(f"layers.0.block_sparse_moe.{old}", f"layers.0.block_sparse_moe.{new}") for name in names
    }
    check_expert_names(build("mixtral"), model_names(build("mixtral"), stored(tiny("mixtral"))), "file")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {damaged[name]: value for name, value in load_file(source / "model.safetensors").items()}
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=None if quantized else message):
        onegpu.AutoModelForCausalLM.from_pretrained(tmp_path / "m", **options)
