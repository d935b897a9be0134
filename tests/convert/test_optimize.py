"""A model in memory, quantised in place and given back: the same as loading it quantised, and bit for bit undone."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import onegpu
from onegpu import optimize, restore
from onegpu.errors import ArgumentError
from onegpu.nn import Linear4bit, Linear8bitLt
from onegpu.nn.experts import ExpertStack
from tests.bnb_process import logits
from tests.tiny import AUTO_CLASS, tiny_model

TYPES = ["llama", "falcon_old", "gpt2", "t5", "mixtral"]
FORMATS = {
    "fp4": {"load_in_4bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}


def quantized(model) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, (Linear4bit, Linear8bitLt, ExpertStack))]


def same_files(one: Path, two: Path) -> list[str]:
    """Names of files that differ."""
    names = {file.name for folder in (one, two) for file in folder.iterdir()}
    return [name for name in sorted(names) if (one / name).read_bytes() != (two / name).read_bytes()]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("model_type", TYPES)
def test_optimize_is_a_quantised_load(tiny, tmp_path, model_type, kind):
    auto = getattr(onegpu, AUTO_CLASS[model_type])
    model = auto.from_pretrained(tiny(model_type))
    same_attention = {"attn_implementation": "onegpu", "dtype": torch.float32}
    loaded = auto.from_pretrained(tiny(model_type), **FORMATS[kind], **same_attention)
    optimize(model, quantize=kind)
    assert quantized(model) == quantized(loaded) and type(model) is type(loaded)
    torch.testing.assert_close(logits(model), logits(loaded), rtol=0, atol=0)
    model.save_pretrained(tmp_path / "optimized")
    loaded.save_pretrained(tmp_path / "loaded")
    assert same_files(tmp_path / "optimized", tmp_path / "loaded") == []
    assert model.num_parameters() == loaded.num_parameters()
    assert model.is_loaded_in_8bit == (kind == "int8") == (not model.is_loaded_in_4bit)
    again = auto.from_pretrained(tmp_path / "optimized", **same_attention)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_double_quantisation_and_a_skip_list(tiny, tmp_path):
    options = {**FORMATS["nf4"], "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["q_proj"]}
    loaded = onegpu.AutoModelForCausalLM.from_pretrained(tiny("llama"), **options)
    model = onegpu.AutoModelForCausalLM.from_pretrained(tiny("llama"))
    report = optimize(model, quantize="nf4", double_quant=True, skip_modules=["q_proj"])
    assert {change.name for change in report.left} == {
        "lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    }  # fmt: skip
    model.save_pretrained(tmp_path / "optimized")
    loaded.save_pretrained(tmp_path / "loaded")
    assert same_files(tmp_path / "optimized", tmp_path / "loaded") == []


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("model_type", TYPES)
def test_what_was_kept_comes_back_bit_for_bit(model_type, kind):
    model = tiny_model(model_type)
    model.config.dtype = torch.float32
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    modules = {name: module for name, module in model.named_modules()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    answer = logits(model)
    optimize(model, quantize=kind, keep_original=True)
    assert quantized(model)
    kept = [module for name, module in modules.items() if name in quantized(model) and isinstance(module, nn.Linear)]
    assert all(module.weight.numel() == 0 for module in kept), "the float weights still take device memory"
    report = restore(model)
    assert not quantized(model) and len(report.swapped) > 0 and not report.notes
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert model.config.to_dict() == config
    assert not [name for name in vars(model) if name in ("to", "num_parameters", "save_pretrained", "_onegpu")]
    torch.testing.assert_close(logits(model), answer, rtol=0, atol=0)
    assert model.half().dtype == torch.float16


@pytest.mark.parametrize("model_type", TYPES)
def test_without_originals_restore_leaves_the_codes_and_says_so(model_type):
    model = tiny_model(model_type)
    names = [name for name, _ in model.named_modules()]
    optimize(model, quantize="nf4")
    answer, modules = logits(model), quantized(model)
    report = restore(model)
    assert quantized(model) == modules and all(change.reason == "as it was" for change in report.changes)
    assert "keep_original=True" in report.notes[0] and "dequantize=True" in report.notes[0]
    torch.testing.assert_close(logits(model), answer, rtol=1e-4, atol=1e-4)
    report = restore(model, dequantize=True)
    assert {change.name for change in report.swapped} == set(modules) and not quantized(model)
    assert [name for name, _ in model.named_modules()] == names
    torch.testing.assert_close(logits(model), answer, rtol=1e-4, atol=1e-4)
    optimize(model, quantize="int8")  # and again


def test_the_report(capsys):
    model = tiny_model("gpt2")
    report = optimize(model, quantize="nf4")
    assert {(c.before, c.after, c.reason) for c in report.swapped} == {
        ("Conv1D", "nf4 Linear4bit", "linear"),
        ("LayerNorm", "onegpu LayerNorm", "layer norm"),
        ("GPT2Attention (sdpa)", "onegpu attention", "attention interface"),
    }
    assert [(c.name, c.before, c.after) for c in report.left] == [("lm_head", "Linear", None)]
    assert "tied weights" in report.left[0].reason or "output" in report.left[0].reason
    data = json.loads(report.json())
    assert data["action"] == "optimize" and len(data["changes"]) == 16 and data == report.to_dict()
    print(report)
    shown = capsys.readouterr().out
    assert "8" in shown and "Conv1D" in shown and "nf4 Linear4bit" in shown and "keep_original" in shown


def test_restore_of_a_model_that_was_not_touched():
    report = restore(tiny_model("llama"))
    assert not report.changes and "Nothing to restore" in report.notes[0]


def test_structure_only_changes_no_weight():
    model = tiny_model("llama")
    answer, before = logits(model), copy.deepcopy(model.state_dict())
    assert {c.after for c in optimize(model).swapped} == {"onegpu RMSNorm", "onegpu GatedMLP", "onegpu attention"}
    torch.testing.assert_close(logits(model), answer, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    restore(model)
    torch.testing.assert_close(logits(model), answer, rtol=0, atol=0)


def test_a_plain_module_is_taken_too():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    x, before = torch.randn(3, 64), copy.deepcopy(model.state_dict())
    exact = model(x)
    report = optimize(model, quantize="nf4", keep_original=True)
    assert len(report.swapped) == 2 and 0 < (model(x) - exact).abs().max() < 0.5
    restore(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_biases_and_training_mode_survive():
    model = tiny_model("opt").train()
    bias = model.model.decoder.layers[0].fc1.bias
    optimize(model, quantize="int8")
    layer = model.model.decoder.layers[0].fc1
    assert layer.bias is bias and layer.training


@pytest.mark.parametrize("value", ["nf3", "int4", "", "4bit", 4, True])
def test_an_unknown_format(value):
    with pytest.raises(ArgumentError, match=r"quantize=.*nf4, fp4, int8"):
        optimize(tiny_model("llama"), quantize=value)


def test_a_model_without_linear_layers_stays_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU())
    with pytest.raises(ArgumentError, match=r"quantize='nf4' finds no linear layer in Sequential"):
        optimize(model, quantize="nf4")
    assert "_onegpu" not in vars(model)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_model_that_is_quantised_already(tiny, kind):
    model = onegpu.AutoModelForCausalLM.from_pretrained(tiny("llama"), **FORMATS[kind])
    with pytest.raises(ArgumentError, match=r"quantize='nf4' .*already.*dequantize\(\)"):
        optimize(model, quantize="nf4")
    model = tiny_model("llama")
    optimize(model, quantize=kind)
    with pytest.raises(ArgumentError, match="already"):
        optimize(model, quantize="int8")
    optimize(model)  # structure only is no contradiction
    plain = nn.Sequential(nn.Linear(64, 32))
    optimize(plain, quantize=kind)
    with pytest.raises(ArgumentError):
        optimize(plain, quantize=kind)


def test_weights_that_are_not_numbers_are_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    for kind in FORMATS:
        with pytest.raises(ArgumentError, match=r"NaN or infinity in model.layers.1.mlp.up_proj"):
            optimize(model, quantize=kind)
        assert not quantized(model), "half converted"


def test_weights_past_float16_go_to_4_bits_only():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e6
    with pytest.raises(ArgumentError, match=r"past float16's 65504 in model.layers.1.mlp.up_proj"):
        optimize(model, quantize="int8")
    optimize(model, quantize="nf4")


def test_dequantize_as_a_method_after_optimize():
    model = tiny_model("llama")
    optimize(model, quantize="nf4", keep_original=True)
    answer = logits(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), answer, rtol=1e-4, atol=1e-4)
    assert not quantized(model)
    optimize(model, quantize="nf4")  # its state is gone with it
