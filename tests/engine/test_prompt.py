from __future__ import annotations

import pytest

from onegpu.engine.prompt import check_prompt, context_length, room_for
from onegpu.errors import ArgumentError
from tests.tiny import CONTEXT, tiny_config


@pytest.mark.parametrize("model_type", ["llama", "mistral", "opt", "gpt2", "falcon_old", "gemma3_text"])
def test_limits(model_type: str) -> None:
    config = tiny_config(model_type)
    assert context_length(config) == CONTEXT
    check_prompt(1, config)
    check_prompt(CONTEXT - 1, config, 1)
    with pytest.raises(ArgumentError, match=rf"prompt='{CONTEXT} tokens' does not fit .*{CONTEXT} tokens.*Shorten"):
        check_prompt(CONTEXT, config)
    with pytest.raises(ArgumentError, match=r"max_new_tokens=57 .*200 tokens.*at most 56"):
        check_prompt(200, config, 57)


@pytest.mark.parametrize("model_type", ["bloom", "falcon_alibi", "t5"])
def test_models_without_a_limit(model_type: str) -> None:
    config = tiny_config(model_type)
    assert context_length(config) is None and room_for(config, 10**6) is None
    check_prompt(10**6, config, 10**6)


def test_empty_prompt() -> None:
    with pytest.raises(ArgumentError, match="prompt='' is empty"):
        check_prompt(0, tiny_config("bloom"))


def test_room_of_an_encoder_decoder_is_the_decoders() -> None:
    import transformers

    config = transformers.BartConfig(max_position_embeddings=100)
    assert room_for(config, 90) == 100
    check_prompt(100, config, 100)
    with pytest.raises(ArgumentError):
        check_prompt(101, config)
