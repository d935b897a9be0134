from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from onegpu.cli.answer import Answer, encode, plan_length, speed_line
from onegpu.engine.streaming import Timings
from onegpu.errors import ArgumentError, CheckpointError
from tests.tiny import CONTEXT, tiny_config, tiny_model_dir, tiny_tokenizer


def test_encode_gives_what_generate_takes() -> None:
    for prompt in ("Hi", [{"role": "user", "content": "Hi"}]):
        assert encode(tiny_tokenizer(), prompt).keys() == {"input_ids", "attention_mask"}


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path, "gpt2", tokenizer=False)
    with pytest.raises(CheckpointError, match="makes no tokens of the prompt"):
        encode(transformers.AutoTokenizer.from_pretrained(folder), "Hello")


def test_length_of_the_answer() -> None:
    config = tiny_config("llama")
    assert plan_length(10, config, 7) == 7
    assert plan_length(10, config, None) == CONTEXT - 10
    assert plan_length(10, tiny_config("bloom"), None) == 256
    with pytest.raises(ArgumentError):
        plan_length(CONTEXT, config, None)


def test_speed_line_says_what_is_known() -> None:
    assert speed_line(Answer("", 1, Timings(0, None, None, 0.1), 0)) == "0 tokens"
    full = Answer("x", 1, Timings(9, 0.25, 31.44, 0.5), 0, interrupted=True)
    assert speed_line(full) == "9 tokens, 31.4 tokens/s, first after 0.25 s (interrupted)"
