"""The calls that people have in their scripts, as they wrote them: only the import and the model's name differ.

The numbers are those of the design's list of use cases; those of attention and of the GPU have their own tests.
"""

from __future__ import annotations

import pytest
import torch

from onegpu import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline
from onegpu.nn import Linear4bit, Linear8bitLt
from tests.tiny import PAD

FALCONS = ["falcon_old", "falcon_new", "falcon_alibi"]


def quantized(model: torch.nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def continues(model, tokenizer, count: int = 8, **options) -> list[str]:
    """Generate from two prompts of different length; check what is asked of any answer, return the texts."""
    inputs = tokenizer(["Hello, my llama is cute", "Hi"], return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=count, **options)
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    assert output.shape[0] == 2 and output.shape[1] > start
    assert output.min() >= 0 and output.max() < model.config.vocab_size
    return tokenizer.batch_decode(output)


@pytest.mark.parametrize("model_type", FALCONS)
def test_u1_16_bits_with_flash_attention(tiny, model_type):
    path = tiny(model_type)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.bfloat16, use_flash_attention_2=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert continues(model, tokenizer) == continues(model, tokenizer)


@pytest.mark.parametrize("model_type", FALCONS)
def test_u2_8_bits_with_flash_attention(tiny, model_type):
    path = tiny(model_type)
    model = AutoModelForCausalLM.from_pretrained(path, load_in_8bit=True, use_flash_attention_2=True)
    assert quantized(model, Linear8bitLt) == 8 and model.dtype == torch.bfloat16
    continues(model, AutoTokenizer.from_pretrained(path))


@pytest.mark.parametrize("model_type", FALCONS)
def test_u3_4_bits_with_flash_attention(tiny, model_type):
    path = tiny(model_type)
    model = AutoModelForCausalLM.from_pretrained(path, load_in_4bit=True, use_flash_attention_2=True)
    assert quantized(model, Linear4bit) == 8 and model.dtype == torch.bfloat16
    continues(model, AutoTokenizer.from_pretrained(path))


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("model_type", [*FALCONS, "llama", "mixtral"])
def test_u4_an_adapter_on_quantised_weights_learns_from_padded_batches(tiny, model_type, bits):
    from peft import LoraConfig

    path = tiny(model_type)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, use_flash_attention_2=True, **{bits: True})
    # PEFT knows no default for a Mixtral of transformers 5, quantised or not.
    named = {"target_modules": ["q_proj", "v_proj"]} if model_type == "mixtral" else {}
    model.add_adapter(LoraConfig(r=8, task_type="CAUSAL_LM", **named))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    batch = tokenizer(["to learn is to remember", "a b", "to be"], return_tensors="pt", padding=True)
    assert (batch["attention_mask"] == 0).any()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == PAD, -100)
    model.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0] and losses == sorted(losses, reverse=True), losses
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_u10_bloom_in_4_bits_wherever_it_fits(tiny):
    path = tiny("bloom")
    model = AutoModelForCausalLM.from_pretrained(path, device_map="auto", load_in_4bit=True)
    assert quantized(model, Linear4bit) == 8
    inputs = AutoTokenizer.from_pretrained(path)("Hello, my llama is cute", return_tensors="pt")
    # ALiBi: a token's logits do not depend on how far to the left padding moves it.
    padded = {name: torch.nn.functional.pad(value, (5, 0)) for name, value in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**padded).logits[:, 5:], model(**inputs).logits, rtol=1e-4, atol=1e-4)
    continues(model, AutoTokenizer.from_pretrained(path))


def test_u12_bloom_in_8_bits(tiny):
    path = tiny("bloom")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, device_map="auto", load_in_8bit=True)
    output = model.generate(**tokenizer("Hello, my llama is cute", return_tensors="pt"), max_new_tokens=8)
    (text,) = tokenizer.batch_decode(output)
    assert text.startswith("Hello, my llama is cute") and quantized(model, Linear8bitLt) == 8


NUCLEUS = {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "max_new_tokens": 8}


def test_u15_pipeline_with_an_8_bit_model_and_nucleus_sampling(tiny):
    path = tiny("llama")
    model = AutoModelForCausalLM.from_pretrained(path, load_in_8bit=True)
    generator = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(path))
    torch.manual_seed(1)
    (first,) = generator("Hello", **NUCLEUS)
    torch.manual_seed(1)
    assert generator("Hello", **NUCLEUS) == [first]
    assert first["generated_text"].startswith("Hello") and len(first["generated_text"]) > len("Hello")


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_u15_pipeline_by_name(tiny, bits):
    generator = pipeline("text-generation", model=str(tiny("llama")), model_kwargs={bits: True})
    assert quantized(generator.model, Linear8bitLt if bits == "load_in_8bit" else Linear4bit) == 14
    assert generator("Hello", **NUCLEUS)[0]["generated_text"].startswith("Hello")


def test_u16_t5_in_8_bits_with_beams(tiny):
    path = tiny("t5")
    model = AutoModelForSeq2SeqLM.from_pretrained(path, load_in_8bit=True)
    assert quantized(model, Linear8bitLt) > 20
    tokenizer = AutoTokenizer.from_pretrained(path)
    greedy, beams = continues(model, tokenizer), continues(model, tokenizer, num_beams=3)
    assert len(greedy) == len(beams) == 2


def test_u16_bloom_in_8_bits_with_beams(tiny):
    path = tiny("bloom")
    model = AutoModelForCausalLM.from_pretrained(path, load_in_8bit=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert score(model, continues(model, tokenizer, num_beams=4), tokenizer) >= score(
        model, continues(model, tokenizer), tokenizer
    )


def score(model, texts: list[str], tokenizer) -> float:
    """Log-probability of the shorter prompt's continuation, which beams exist to raise."""
    ids = tokenizer(texts[1].replace("<pad>", ""), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        steps = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    return float(steps[1:].sum())  # after "Hi"


@pytest.mark.parametrize("kind", ["nf4", "nf4_double", "int8"])
def test_u18_a_checkpoint_of_bitsandbytes_generates(tiny, tmp_path_factory, kind):
    """Both directions, bit by bit, are in formats/test_bitsandbytes.py."""
    pytest.importorskip("bitsandbytes")
    from tests.bnb_process import checkpoints

    model = AutoModelForCausalLM.from_pretrained(checkpoints(tmp_path_factory).theirs("llama", kind))
    assert quantized(model, Linear8bitLt if kind == "int8" else Linear4bit) == 14
    continues(model, AutoTokenizer.from_pretrained(tiny("llama")))
