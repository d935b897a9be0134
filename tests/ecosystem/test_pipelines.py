"""``pipeline`` by name and by model, for more tasks than writing text (that is in tests/test_use_cases.py)."""

from __future__ import annotations

import pytest
import torch

import onegpu
from onegpu.nn import Linear4bit, Linear8bitLt

FORMATS = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}
TEXT = "a model of <mask> letters"


@pytest.fixture(scope="module")
def bert(tiny, tmp_path_factory):
    """A tiny BERT whose tokenizer knows a mask token."""
    import shutil

    folder = tmp_path_factory.mktemp("bert") / "model"
    shutil.copytree(tiny("bert"), folder)
    tokenizer = onegpu.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"mask_token": tokenizer.convert_ids_to_tokens(100)})
    tokenizer.save_pretrained(folder)
    return folder


def quantized(model) -> int:
    return sum(isinstance(module, (Linear4bit, Linear8bitLt)) for module in model.modules())


def both(task: str, auto: str, folder, kind: str):
    """The pipeline by name and by model: what each says of its model's linears must be the same."""
    by_name = onegpu.pipeline(task, model=str(folder), model_kwargs=dict(FORMATS[kind]))
    model = getattr(onegpu, auto).from_pretrained(folder, **FORMATS[kind])
    by_model = onegpu.pipeline(task, model=model, tokenizer=onegpu.AutoTokenizer.from_pretrained(folder))
    assert type(by_name.model) is type(by_model.model)
    assert quantized(by_name.model) == quantized(by_model.model) > 0
    return by_name, by_model


@pytest.mark.parametrize("kind", FORMATS)
def test_fill_mask(bert, kind):
    by_name, by_model = both("fill-mask", "AutoModelForMaskedLM", bert, kind)
    text = TEXT.replace("<mask>", by_name.tokenizer.mask_token)
    first, second = by_name(text), by_model(text)
    assert [entry["token"] for entry in first] == [entry["token"] for entry in second]
    assert len(first) == 5 and all(0 < entry["score"] <= 1 for entry in first)


@pytest.mark.parametrize("kind", FORMATS)
def test_feature_extraction(bert, kind):
    by_name, by_model = both("feature-extraction", "AutoModel", bert, kind)
    # The checkpoint has no pooler: a new one is made, as floats that can be trained, and its numbers are not used.
    assert type(by_name.model.pooler.dense) is torch.nn.Linear
    first, second = (torch.tensor(each("some words")[0]) for each in (by_name, by_model))
    assert first.shape == (len("some words"), 64) and torch.equal(first, second)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_batch_through_text_generation(tiny, kind):
    by_name, by_model = both("text-generation", "AutoModelForCausalLM", tiny("llama"), kind)
    options = {"max_new_tokens": 6, "do_sample": False, "batch_size": 2}
    texts = ["Hello", "A longer prompt", "x"]
    first, second = by_name(texts, **options), by_model(texts, **options)
    assert first == second and len(first) == 3
    for text, (answer,) in zip(texts, first, strict=True):
        assert answer["generated_text"].startswith(text)
    (chat,) = by_name([{"role": "user", "content": "Hi"}], max_new_tokens=4, do_sample=False)
    assert chat["generated_text"][-1]["role"] == "assistant"


def test_transformers_own_pipeline_takes_our_model(tiny):
    import transformers

    model = onegpu.AutoModelForCausalLM.from_pretrained(tiny("llama"), load_in_4bit=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny("llama"))
    own = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert own("Hello", max_new_tokens=4)[0]["generated_text"].startswith("Hello")


def test_a_pipeline_of_a_model_with_an_adapter(tiny):
    peft = pytest.importorskip("peft")
    model = onegpu.AutoModelForCausalLM.from_pretrained(tiny("llama"), load_in_8bit=True)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    written = onegpu.pipeline(
        "text-generation", model=model, tokenizer=onegpu.AutoTokenizer.from_pretrained(tiny("llama"))
    )("Hello", max_new_tokens=4, do_sample=False)
    assert written[0]["generated_text"].startswith("Hello")
