"""What `from_pretrained` gives: a genuine transformers model, quantised by us, in everything its owner does with it."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.auto_factory import _BaseAutoModelClass

import onegpu
from onegpu import BitsAndBytesConfig, auto
from onegpu.errors import ArgumentError, CheckpointError, MemoryBudgetError
from onegpu.nn import Linear4bit, Linear8bitLt
from onegpu.nn.experts import ExpertStack
from tests.bnb_process import ROOT, logits
from tests.tiny import AUTO_CLASS

NAMED = ["llama", "mistral", "falcon_old", "falcon_new", "bloom", "opt", "gpt2", "t5", "qwen2", "gemma3_text"]
NAMED += ["mixtral"]
FORMATS = {
    "fp4": {"load_in_4bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
LLAMA_LIKE = {"hidden_size": 256, "intermediate_size": 512}
WIDE = {
    "falcon_old": {"hidden_size": 256},
    "falcon_new": {"hidden_size": 256},
    "bloom": {"hidden_size": 256},
    "opt": {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 512},
    "gpt2": {"n_embd": 256},
    "t5": {"d_model": 256, "d_kv": 64, "d_ff": 512},
    "gemma3_text": {**LLAMA_LIKE, "head_dim": 64},
}


def load(path: Path, model_type: str = "llama", **options):
    return getattr(onegpu, AUTO_CLASS[model_type]).from_pretrained(path, **options)


def quantized(model) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (Linear4bit, Linear8bitLt, ExpertStack))}


# The classes


def test_every_auto_class_of_transformers_is_here():
    names = [name for name in dir(transformers) if name.startswith("Auto")]
    assert len(names) > 30
    for name in names:
        theirs, ours = getattr(transformers, name), getattr(onegpu, name)
        if isinstance(theirs, type) and issubclass(theirs, _BaseAutoModelClass):
            assert issubclass(ours, theirs) and ours is not theirs and ours is getattr(onegpu, name)
            assert "load_in_4bit" in ours.from_pretrained.__doc__ and ours.__name__ == name
        elif "Placeholder" in repr(theirs):  # transformers' own for a package that is not installed, made anew at times
            assert repr(ours) == repr(theirs)
        else:
            assert ours is theirs
    assert onegpu.BitsAndBytesConfig is transformers.BitsAndBytesConfig


def test_an_auto_class_that_does_not_exist():
    with pytest.raises(AttributeError, match="AutoModelForNothing"):
        onegpu.AutoModelForNothing  # noqa: B018


@pytest.mark.parametrize("model_type", NAMED)
@pytest.mark.parametrize("kind", FORMATS)
def test_the_model_is_transformers_own_and_small(tiny, model_type, kind):
    path = tiny(model_type, **WIDE.get(model_type, LLAMA_LIKE))
    model = load(path, model_type, **FORMATS[kind])
    plain = getattr(transformers, AUTO_CLASS[model_type]).from_pretrained(path)
    assert type(model) is type(plain)
    modules = quantized(model)
    dense = sum(type(m).__name__ in ("Linear", "FalconLinear", "Conv1D") for m in model.modules())
    assert dense == (5 if model_type == "t5" else 1), "only the head stays, and what T5 keeps in float32"
    weights, stored = 0, 0
    for name, module in modules.items():
        weights += plain.get_parameter(name if isinstance(module, ExpertStack) else f"{name}.weight").numel()
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        stored += sum(t.numel() * t.element_size() for key, t in tensors.items() if key != "bias")
    least = {"fp4": 7.1, "nf4": 7.1, "nf4_double": 7.7, "int8": 3.9}[kind]
    assert 4 * weights / stored >= least
    if kind == "int8":
        assert 2 * weights / stored >= 1.95
    # The footprint is that of the float model, less what the quantised layers gave up: scales are counted.
    assert model.get_memory_footprint() == plain.get_memory_footprint() - 4 * weights + stored
    assert model.num_parameters() == plain.num_parameters()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("model_type", NAMED)
def test_dequantize_gives_the_float_model_of_the_same_codes(tiny, model_type, kind):
    path = tiny(model_type)
    plain = getattr(transformers, AUTO_CLASS[model_type]).from_pretrained(path)
    model = load(path, model_type, **FORMATS[kind])
    before = logits(model)
    assert model.dequantize() is model
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    state, original = model.state_dict(), plain.state_dict()
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in original.items()}
    for name, tensor in state.items():
        assert (tensor - original[name]).abs().max() <= 0.2 * original[name].abs().max(), name
    if kind != "int8":  # int8 rounds activations as well
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert not getattr(model.config, "quantization_config", None) and not hasattr(model, "is_loaded_in_4bit")
    assert model.half().dtype == torch.float16


def test_a_dequantised_model_saves_as_an_ordinary_one(tiny, tmp_path):
    model = load(tiny("llama"), load_in_4bit=True).dequantize()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    torch.testing.assert_close(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


# Arguments


def test_dtype_in_both_spellings(tiny):
    for name in ("dtype", "torch_dtype"):
        for value in (torch.float16, "float16"):
            model = load(tiny("llama"), load_in_4bit=True, **{name: value})
            assert model.dtype == torch.float16 and model.model.embed_tokens.weight.dtype == torch.float16
    assert load(tiny("llama"), load_in_4bit=True).dtype == torch.float32
    assert load(tiny("llama", dtype=torch.bfloat16), load_in_4bit=True).dtype == torch.bfloat16


def test_float32_with_flash_becomes_16_bits_and_says_so_once(tiny, caplog):
    auto._say_once.cache_clear()
    path = tiny("llama")
    with caplog.at_level(logging.WARNING, logger="onegpu"):
        models = [load(path, use_flash_attention_2=True), load(path, attn_implementation="flash_attention_2")]
    assert [model.dtype for model in models] == [torch.bfloat16] * 2
    assert [record.getMessage() for record in caplog.records].count(caplog.records[0].getMessage()) == 1
    assert "bfloat16" in caplog.text and "dtype=" in caplog.text
    assert load(path, use_flash_attention_2=True, dtype=torch.float32).dtype == torch.float32


def test_defaults_are_fp4_without_double_quantisation_and_a_dense_head(tiny):
    model = load(tiny("llama"), load_in_4bit=True)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer) is Linear4bit and layer.weight.quant_type == "fp4" and layer.nested_absmax is None
    assert layer.weight.blocksize == 64 and layer.weight.dtype == torch.uint8 and layer.compute_dtype == torch.float32
    assert type(model.lm_head) is nn.Linear and not model.training
    assert model.config.quantization_config.to_dict() == BitsAndBytesConfig(load_in_4bit=True).to_dict()


@pytest.mark.parametrize("spell", [lambda c: c, lambda c: c.to_dict()], ids=["object", "dict"])
def test_quantization_config(tiny, spell):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=4.0)
    model = load(tiny("llama"), quantization_config=spell(config))
    assert model.model.layers[0].mlp.up_proj.threshold == 4.0 and type(model.lm_head) is nn.Linear


def test_the_papers_arithmetic_can_be_asked_for(tiny, tmp_path):
    """In training mode a CPU rounds no activations either, as a GPU; asked for, it does."""
    plain = load(tiny("llama"), load_in_8bit=True)
    plain.save_pretrained(tmp_path)
    ids, asked = torch.tensor([[5, 6, 7]]), load(tiny("llama"), load_in_8bit=True, llm_int8_exact=True)
    expected = plain(ids).logits
    assert not torch.equal(plain.train()(ids).logits, expected)
    for model in (asked, load(tmp_path, llm_int8_exact=True), copy.deepcopy(asked)):
        assert torch.equal(model.train()(ids).logits, expected)
    for options in ({}, {"load_in_4bit": True}):
        with pytest.raises(ArgumentError, match=r"llm_int8_exact=True is about int8 layers.* add load_in_8bit=True"):
            load(tiny("llama"), llm_int8_exact=True, **options)


def test_a_skip_list_adds_to_the_default_unless_told_otherwise(tiny):
    path = tiny("llama")
    model = load(path, load_in_4bit=True, llm_int8_skip_modules=["down_proj"])
    assert type(model.model.layers[0].mlp.down_proj) is type(model.lm_head) is nn.Linear
    model = load(path, load_in_4bit=True, llm_int8_skip_modules=["down_proj"], replace_default_skips=True)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear and type(model.lm_head) is Linear4bit


def test_loading_info(tiny):
    model, info = load(tiny("llama"), load_in_4bit=True, output_loading_info=True)
    assert isinstance(model, transformers.LlamaForCausalLM) and not info["missing_keys"] and not info["unexpected_keys"]


def test_a_config_object_and_a_config_field(tiny):
    path = tiny("llama")
    config = transformers.AutoConfig.from_pretrained(path)
    model = load(path, config=config, load_in_4bit=True)
    assert len(quantized(model)) == 14 and getattr(config, "quantization_config", None) is None
    assert load(path, use_cache=False, load_in_4bit=True).config.use_cache is False


def test_a_classifier_on_a_language_model_loads(tiny):
    model = onegpu.AutoModelForSequenceClassification.from_pretrained(tiny("llama"), num_labels=3, load_in_4bit=True)
    assert type(model) is transformers.LlamaForSequenceClassification and type(model.score) is nn.Linear
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_model_without_linear_layers_is_refused(tmp_path, bits):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_channels=3)
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=rf"{bits}=True finds no linear layer .*ResNetModel.*without it"):
        onegpu.AutoModel.from_pretrained(tmp_path, **{bits: True})


def test_a_gpu_that_does_not_exist_is_refused(tiny):
    for device_map in (99, "cuda:99", {"": 99}):
        with pytest.raises(ArgumentError, match=r"device_map.*99"):
            load(tiny("llama"), load_in_4bit=True, device_map=device_map)


def test_too_little_memory_says_how_much_is_missing(tiny, monkeypatch):
    from onegpu.placement import fit

    path = tiny("llama")
    load(path, load_in_4bit=True, device_map="cpu")
    monkeypatch.setattr(fit, "free_host_bytes", lambda *_: 50_000)
    for options in ({"load_in_4bit": True}, {"load_in_8bit": True}, {"load_in_4bit": True, "device_map": "cpu"}):
        with pytest.raises(MemoryBudgetError, match=r"\d kB .*missing"):
            load(path, **options)


# Where it comes from


def test_what_is_no_model_is_refused(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny("llama"), pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for path, error, words in (
        (tmp_path / "nowhere", ArgumentError, "does not exist"),
        ("", ArgumentError, "empty"),
        (tmp_path / "file", ArgumentError, "is a file"),
        (tmp_path / "empty", CheckpointError, "no config.json"),
        (pickled, CheckpointError, "pickled"),
    ):
        for options in ({}, {"load_in_4bit": True}):
            with pytest.raises(error, match=words):
                load(path, **options)


def test_a_name_that_no_hub_can_be_asked_about():
    with pytest.raises(ArgumentError, match="owner/not-here"):
        load("owner/not-here", load_in_4bit=True)


def edit_config(path: Path, target: Path, **fields) -> Path:
    shutil.copytree(path, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **fields}))
    return target


def test_code_named_by_a_downloaded_config_is_dropped(tiny, tmp_path, caplog):
    fields = {"attn_implementation": "evil/kernel", "experts_implementation": "evil/experts"}
    path = edit_config(tiny("mixtral"), tmp_path, **fields)
    with caplog.at_level(logging.WARNING, logger="onegpu"):
        model = load(path, load_in_4bit=True)
    assert "evil/kernel" in caplog.text and "evil/experts" in caplog.text
    torch.testing.assert_close(logits(model), logits(load(tiny("mixtral"), load_in_4bit=True)))


@pytest.mark.parametrize("model_type", ["llama", "made_up"])
def test_code_of_a_checkpoint_does_not_run_unasked(tiny, tmp_path, model_type, monkeypatch):
    path = edit_config(
        tiny("llama"),
        tmp_path,
        model_type=model_type,
        auto_map={"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"},
    )
    (path / "trap.py").write_text("raise SystemExit('code of a checkpoint ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    if model_type == "llama":
        assert type(load(path, load_in_4bit=True)) is transformers.LlamaForCausalLM
    else:
        with pytest.raises(ArgumentError, match=r"trust_remote_code=False .*trust_remote_code=True"):
            load(path, load_in_4bit=True)


QUANTIZED_BY_OTHERS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"},
}


@pytest.mark.parametrize("method", QUANTIZED_BY_OTHERS)
def test_another_quantizers_checkpoint_is_left_to_transformers(tiny, tmp_path, method, monkeypatch):
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    path = edit_config(tiny("llama"), tmp_path, quantization_config=QUANTIZED_BY_OTHERS[method])
    reached = []

    class Probe(AUTO_QUANTIZER_MAPPING[method]):
        def __init__(self, *args, **kwargs):
            reached.append(method)
            raise ImportError("the package of transformers' own quantizer")

    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, method, Probe)
    with pytest.raises(ImportError, match="the package of transformers' own quantizer"):
        load(path)
    assert reached == [method]
    for bits in ("load_in_4bit", "load_in_8bit"):
        with pytest.raises(ArgumentError, match=f"{bits}=True .*{method} already.*load it without"):
            load(path, **{bits: True})


def test_other_bits_than_the_checkpoints_are_refused(tiny, tmp_path):
    load(tiny("llama"), load_in_4bit=True).save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=r"load_in_8bit=True .*4 bits already"):
        load(tmp_path, load_in_8bit=True)
    assert len(quantized(load(tmp_path, load_in_4bit=True))) == 14  # the same is no contradiction


# What people do with it


def test_a_dtype_cast_is_refused_with_the_fix(tiny):
    model = load(tiny("llama"), load_in_4bit=True)
    for cast in (model.half, model.float, lambda: model.to(torch.float16), lambda: model.to(dtype=torch.bfloat16)):
        with pytest.raises(ValueError) as caught:
            cast()
        assert "dequantize()" in str(caught.value) or "dtype" in str(caught.value)
    with pytest.raises(ArgumentError, match=r"dtype=torch.float16 .*from_pretrained.*dequantize\(\)"):
        model.to("cpu", torch.float16)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_move_and_a_deep_copy(tiny, tmp_path, kind):
    model = load(tiny("mixtral"), "mixtral", **FORMATS[kind])
    before = logits(model)
    assert model.to("cpu") is model and model.cpu() is model
    twin = copy.deepcopy(model)
    for name in ("num_parameters", "to", "save_pretrained"):
        assert getattr(twin, name).__self__ is twin and getattr(model, name).__self__ is model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(logits(twin), before, rtol=0, atol=0)
    twin.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path, "mixtral")), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["nf4_double", "int8"])
def test_prepare_for_kbit_training(tiny, kind):
    from peft import prepare_model_for_kbit_training

    model = load(tiny("llama"), dtype=torch.bfloat16, **FORMATS[kind])
    before = {name: module.dequantize(torch.float32) for name, module in quantized(model).items()}
    model = prepare_model_for_kbit_training(model)
    assert model.is_gradient_checkpointing and not any(p.requires_grad for p in model.parameters())
    assert model.model.norm.weight.dtype == torch.float32
    for name, module in quantized(model).items():
        torch.testing.assert_close(module.dequantize(torch.float32), before[name], rtol=0, atol=0)
        scales = module.SCB if kind == "int8" else module.nested_absmax
        assert scales.dtype == torch.float32


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trainer_with_an_adapter(tiny, tmp_path, kind):
    from peft import LoraConfig, get_peft_model

    model = load(tiny("llama"), **FORMATS[kind])
    weights = model.num_parameters(exclude_embeddings=True)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = [{"input_ids": list(range(5, 15)), "labels": list(range(5, 15))} for _ in range(6)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[2] < losses[0]
    # 6 operations for each of 20 tokens and weights, the adapter's among them.
    assert 3 * 6 * 20 * weights < trainer.state.total_flos < 1.5 * 3 * 6 * 20 * weights


def test_push_to_hub_saves_what_save_pretrained_does(tiny):
    assert callable(load(tiny("llama"), load_in_4bit=True).push_to_hub)


# With and without bitsandbytes: in processes of their own


def run(code: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_bitsandbytes_is_not_needed(tiny, tmp_path):
    code = """
import importlib.util, sys, types
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.partition(".")[0] == "bitsandbytes" else real(name, *a)
sys.meta_path.insert(0, Blocker())
import torch, transformers, onegpu
assert not transformers.utils.is_bitsandbytes_available()
source, target = sys.argv[1:]
for options in ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}):
    model = onegpu.AutoModelForCausalLM.from_pretrained(source, **options)
    ids = torch.tensor([[5, 6, 7]])
    tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert model.num_parameters() > model.num_parameters(exclude_embeddings=True) > 50_000
    trainer = types.SimpleNamespace(model=model)  # what Trainer logs after every step
    assert transformers.Trainer.floating_point_ops(trainer, {"input_ids": ids}) > 50_000
    model.save_pretrained(target)
    again = onegpu.AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(again.generate(input_ids=ids, max_new_tokens=4, do_sample=False), tokens)
assert "bitsandbytes" not in sys.modules
"""
    run(code, tiny("llama"), tmp_path)


def test_plain_transformers_beside_us_keeps_using_bitsandbytes(tiny):
    pytest.importorskip("bitsandbytes")
    code = """
import sys, tempfile, transformers, onegpu
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
before = {name: AUTO_QUANTIZER_MAPPING[name] for name in ("bitsandbytes_4bit", "bitsandbytes_8bit")}
classes = dict(vars(transformers.AutoModelForCausalLM))
for options in ({"load_in_4bit": True}, {"load_in_8bit": True}):
    config = transformers.BitsAndBytesConfig(**options)
    ours = onegpu.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
    assert "bitsandbytes" not in type(ours.model.layers[0].mlp.up_proj).__module__
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        again = onegpu.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    assert type(again.model.layers[0].mlp.up_proj).__module__.startswith("onegpu")
    assert type(theirs) is type(ours) and "to" not in vars(theirs)
assert before == {name: AUTO_QUANTIZER_MAPPING[name] for name in before}
assert before["bitsandbytes_4bit"].__module__ == "transformers.quantizers.quantizer_bnb_4bit"
assert AUTO_QUANTIZATION_CONFIG_MAPPING["bitsandbytes_4bit"] is transformers.BitsAndBytesConfig
assert classes == dict(vars(transformers.AutoModelForCausalLM))
"""
    run(code, tiny("llama"))
