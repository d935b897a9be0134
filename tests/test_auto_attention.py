"""FlashAttention by the arguments of the Auto classes and by BetterTransformer's methods (U1, U5 to U9, U14)."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
import transformers

import onegpu
from onegpu import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from onegpu.nn import Linear4bit
from tests.contract import harness
from tests.contract.harness import assert_near, counted
from tests.tiny import AUTO_CLASS

ASKED = [
    {"use_flash_attention_2": True},
    {"attn_implementation": "flash_attention_2"},
    {"attn_implementation": "onegpu"},
]


@pytest.mark.parametrize("asked", ASKED, ids=["2023", "today", "by name"])
@pytest.mark.parametrize("name", ["llama", "opt", "falcon_old", "falcon_new", "bert"])
def test_it_serves_what_it_is_asked_for(tiny, name, asked, monkeypatch):
    auto = getattr(onegpu, AUTO_CLASS[name])
    batch = harness.text(padding="right")
    real = batch["attention_mask"].bool()
    plain = getattr(transformers, AUTO_CLASS[name]).from_pretrained(tiny(name))
    model = auto.from_pretrained(tiny(name), dtype=torch.float32, **asked)
    with counted(monkeypatch) as calls:
        assert_near(model(**batch).logits[real], plain(**batch).logits[real])
    assert calls.ours == 2 and type(model) is type(plain)


@pytest.mark.parametrize("name", ["bloom", "falcon_alibi", "t5"])
def test_models_that_it_does_not_serve_load_and_it_says_so(tiny, name, caplog):
    model = getattr(onegpu, AUTO_CLASS[name]).from_pretrained(
        tiny(name), dtype=torch.float32, use_flash_attention_2=True
    )
    assert model.config._attn_implementation != "onegpu"
    (said,) = [r.message for r in caplog.records if "FlashAttention does not serve" in r.message]
    assert type(model).__name__ in said


@pytest.mark.parametrize("name", ["flash_attention_2", "onegpu"])
def test_a_config_may_carry_the_name(tiny, tmp_path, name, monkeypatch):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"attn_implementation": name}
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config._attn_implementation == "onegpu" and model.dtype == torch.float32
    model.save_pretrained(tmp_path / "again")
    assert "onegpu" not in (tmp_path / "again" / "config.json").read_text()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_not_asked_for_it_is_transformers_choice(tiny):
    assert AutoModelForCausalLM.from_pretrained(tiny("llama")).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["bert", "llama", "falcon_new"])
def test_u5_u6_u7_there_and_back(tiny, name, tmp_path, monkeypatch):
    model = getattr(onegpu, AUTO_CLASS[name]).from_pretrained(tiny(name))
    batch = harness.text(padding="right")
    before = model(**batch).logits
    assert model.to_bettertransformer() is model
    with counted(monkeypatch) as calls:
        after = model(**batch).logits
    real = batch["attention_mask"].bool()
    assert calls.ours == 2
    assert_near(after[real], before[real])
    model.save_pretrained(tmp_path / "converted")
    model = model.reverse_bettertransformer()
    model.save_pretrained(tmp_path / "reversed")
    for file in ("config.json", "model.safetensors"):
        contents = [
            (folder / file).read_bytes() for folder in (tmp_path / "converted", tmp_path / "reversed", tiny(name))
        ]
        assert contents[0] == contents[1] == contents[2]
    assert torch.equal(model(**batch).logits, before)


ENCODERS = {
    "bert": "AutoModelForMaskedLM",
    "vit": "AutoModelForImageClassification",
    "wav2vec2": "AutoModelForCTC",
    "clip": "AutoModel",
}


@pytest.mark.parametrize("name", ENCODERS)
def test_u5_encoders(name, tmp_path, monkeypatch):
    both = harness.pair(name)
    both.eager.save_pretrained(tmp_path)
    model = getattr(onegpu, ENCODERS[name]).from_pretrained(tmp_path)
    inputs, real = harness.inputs_of(both, None)
    model = model.to_bettertransformer()
    with counted(monkeypatch) as calls:
        after = harness.answers(model, inputs, real)
    assert calls.ours and not calls.sdpa
    for one, other in zip(after, harness.answers(model.reverse_bettertransformer(), inputs, real), strict=True):
        assert_near(one, other)


def test_u7_in_place(tiny, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny("opt"))
    model.to_bettertransformer()
    with counted(monkeypatch) as calls:
        model(**harness.text())
    assert calls.ours == 2 and not calls.sdpa


def only_flash():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.backends.cuda.sdp_kernel(enable_flash=True, enable_math=False, enable_mem_efficient=False)


U14 = [
    {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    for kind in ("nf4", "fp4")
    for double in (True, False)
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("quantized", [None, *U14], ids=["u8", *("-".join(map(str, x.values())) for x in U14)])
def test_u8_u14_generate_with_flash_only(tiny, quantized, device, monkeypatch):
    path = tiny("opt")
    tokenizer = AutoTokenizer.from_pretrained(path)
    options = {"device_map": device, "torch_dtype": torch.float16 if device == "cuda" else torch.float32}
    if quantized:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16, **quantized
        )
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    model.to_bettertransformer()
    inputs = tokenizer("Hello my dog is cute and", return_tensors="pt").to(device)
    with counted(monkeypatch) as calls, only_flash():
        outputs = model.generate(**inputs, max_new_tokens=5)
    assert calls.ours and not calls.sdpa and outputs.shape[1] == inputs["input_ids"].shape[1] + 5
    assert tokenizer.decode(outputs[0]).startswith("Hello my dog is cute and") or quantized
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == (12 if quantized else 0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_u9_flash_only_where_it_cannot_serve(tiny):
    path = tiny("opt")
    model = AutoModelForCausalLM.from_pretrained(path).to("cuda")
    model.to_bettertransformer()
    inputs = AutoTokenizer.from_pretrained(path)("Hello my dog is cute and", return_tensors="pt").to("cuda")
    with only_flash(), pytest.raises(RuntimeError, match=r"^No available kernel.*float32 on a GPU"):
        model.generate(**inputs)
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
