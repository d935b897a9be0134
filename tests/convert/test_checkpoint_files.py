"""Config, class and companions of a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from onegpu.convert.checkpoint_files import auto_name, load_config, model_class, write_beside
from onegpu.convert.checkpoint_plan import meta_model
from onegpu.errors import CheckpointError
from onegpu.formats.folder import find_source
from tests.tiny import AUTO_CLASS, tiny_config


@pytest.mark.parametrize("model_type", ["llama", "t5", "bert", "falcon_new"])
def test_the_class_that_the_config_names(tiny, model_type):
    config = load_config(find_source(tiny(model_type)))
    cls = model_class(config)
    assert [cls.__name__] == config.architectures
    assert auto_name(meta_model(cls, config, torch.float32)) == AUTO_CLASS[model_type]


def test_an_unknown_or_foreign_class_falls_back_to_the_base_model():
    config = tiny_config("llama")
    for named in (["NoSuchModel"], ["GPT2LMHeadModel"], ["AutoModel"], None):
        config.architectures = named
        assert model_class(config) is transformers.LlamaModel
    assert auto_name(meta_model(transformers.LlamaModel, config, torch.float32)) == "AutoModel"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"model_type": "no_such_type"}', '{"model_type": "llama", "num_attention_heads": 3}']
)
def test_a_config_that_cannot_be_read(tiny, tmp_path, text):
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "m"))
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(find_source(folder))


def test_a_config_of_quantised_weights(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "m"))
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**fields, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(CheckpointError, match=r"quantised already \(gptq\)"):
        load_config(find_source(folder))


def test_an_old_checkpoints_generation_settings_come_from_its_config(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny("t5"), tmp_path / "m"))
    (folder / "generation_config.json").unlink()
    source = find_source(folder)
    config = load_config(source)
    (tmp_path / "out").mkdir()
    write_beside(tmp_path / "out", source, meta_model(model_class(config), config, torch.float32), None, "card\n")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["decoder_start_token_id"] == 0
    assert (tmp_path / "out" / "README.md").read_text() == "card\n"
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == (folder / "chat_template.jinja").read_bytes()
