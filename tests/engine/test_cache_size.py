from __future__ import annotations

import pytest

from onegpu.engine.cache_size import cache_bytes
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(("model_type", "kv_width"), [("llama", 2 * 16), ("gpt2", 64), ("falcon_old", 16)])
def test_dynamic_cache(model_type: str, kv_width: int) -> None:
    inputs = tiny_tokenizer()("Hello", return_tensors="pt")
    cache = tiny_model(model_type)(**inputs, use_cache=True).past_key_values
    assert cache_bytes(cache) == 2 * 2 * 5 * kv_width * 4  # layers, key and value, tokens, width, fp32


def test_encoder_decoder_counts_both_caches() -> None:
    model, inputs = tiny_model("t5"), tiny_tokenizer()("Hello", return_tensors="pt")
    cache = model(**inputs, decoder_input_ids=inputs["input_ids"][:, :2], use_cache=True).past_key_values
    assert cache_bytes(cache) == 2 * 2 * (2 + 5) * 64 * 4


def test_no_cache() -> None:
    assert cache_bytes(None) == 0
