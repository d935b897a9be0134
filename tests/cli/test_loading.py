from __future__ import annotations

from pathlib import Path

import pytest

from onegpu.cli.loading import load, prepare
from onegpu.cli.options import ModelOptions
from onegpu.errors import CheckpointError
from tests.tiny import tiny_model_dir


def test_prepare_reads_no_weights(llama: Path, loads: list) -> None:
    prepared = prepare(ModelOptions(str(llama), load_in_8bit=True))
    assert prepared.config.model_type == "llama" and prepared.arguments == {"load_in_8bit": True} and loads == []
    model, seconds = load(prepared)
    assert type(model).__name__ == "LlamaForCausalLM" and seconds > 0 and len(loads) == 1


def test_an_encoder_decoder_gets_its_class(t5: Path) -> None:
    assert type(load(prepare(ModelOptions(str(t5))))[0]).__name__ == "T5ForConditionalGeneration"


def test_a_tokenizer_that_cannot_be_read(llama: Path, tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path, "llama")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read"):
        prepare(ModelOptions(str(folder)))
