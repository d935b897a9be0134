"""Norms and gated MLPs of whole models: converted, the same answers; taken back, the same modules."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import onegpu
from onegpu import optimize, restore
from onegpu.convert.report import Report
from onegpu.convert.structure_rule import UseKernels
from onegpu.nn.gated_mlp import GatedMLP
from onegpu.nn.norm import LayerNorm, RMSNorm
from tests.bnb_process import inputs
from tests.compare import assert_close
from tests.tiny import tiny_config, tiny_model

# model type -> norms, gated MLPs: of two layers
COUNTS = {
    "llama": (5, 2), "mistral": (5, 2), "qwen2": (5, 2), "gemma3_text": (13, 2), "mixtral": (5, 0),
    "falcon_old": (3, 0), "falcon_new": (5, 0), "bloom": (6, 0),
    "opt": (5, 0), "gpt2": (5, 0), "t5": (12, 0), "bert": (6, 0),
}  # fmt: skip
MORE = {"Olmo2": (9, 2), "Qwen3": (9, 2), "Gemma2": (9, 2), "Phi3": (5, 0), "Cohere": (0, 2)}


def model_of(kind, device="cpu", dtype=torch.float32):
    if kind in COUNTS:
        return tiny_model(kind, dtype=dtype).to(device)
    config = getattr(transformers, f"{kind}Config")(**{
        **{k: v for k, v in tiny_config("llama").to_dict().items() if k in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings")},
        "head_dim": 16,
    })  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(device, dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(**{name: ids.to(model.device) for name, ids in inputs(model).items()}).logits.float()


def converted(model):
    kinds = [type(module) for module in model.modules()]
    return kinds.count(RMSNorm) + kinds.count(LayerNorm), kinds.count(GatedMLP)


def apply(model):
    report = Report("optimize")
    UseKernels().apply(model, None, None, False, report)
    return report


@pytest.mark.parametrize("kind", [*COUNTS, *MORE])
def test_the_same_bits_and_back(kind):
    model = model_of(kind)
    before, modules = copy.deepcopy(model.state_dict()), {n: id(m) for n, m in model.named_modules()}
    parameters = {n: id(p) for n, p in model.named_parameters()}
    answer = logits(model)
    report = apply(model)
    assert converted(model) == (COUNTS | MORE)[kind]
    assert len(report.swapped) == sum(converted(model))
    assert torch.equal(logits(model), answer)
    assert list(model.state_dict()) == list(before) and list(modules) == [n for n, _ in model.named_modules()]
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    undone = Report("restore")
    UseKernels().restore(model, None, undone)
    assert {n: id(m) for n, m in model.named_modules()} == modules and torch.equal(logits(model), answer)
    assert sorted(c.name for c in undone.changes) == sorted(c.name for c in report.swapped)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*COUNTS, *MORE])
def test_logits_on_a_gpu(kind, dtype):
    exact = logits(model_of(kind)).double()
    exact = exact if dtype == torch.float32 else logits(model_of(kind, dtype=dtype).float()).double()
    other = logits(model_of(kind, "cuda", dtype)).cpu()
    model = model_of(kind, "cuda", dtype)
    apply(model)
    assert_close(logits(model).cpu().to(dtype), exact, other.to(dtype), what=kind)


def test_what_was_left_and_why():
    report = apply(model_of("Cohere"))
    assert {(c.before, c.reason) for c in report.left} == {("CohereLayerNorm", "a norm of another form")}
    model = tiny_model("llama")
    model.model.norm.register_forward_hook(lambda *_: None)
    left = apply(model).left
    assert [(c.name, c.reason) for c in left] == [("model.norm", "a norm of another form")]

    odd = nn.Sequential(nn.RMSNorm(64, eps=1e-6), nn.LayerNorm((4, 8)))
    assert [c.reason for c in apply(odd).changes] == [
        "a norm of another form: a small copy fails with RuntimeError",
        "hooks or a shape of more than one dimension",
    ]


def test_layers_that_differ_in_more_than_tensors_are_asked_each(monkeypatch):
    from onegpu.convert import structure_rule

    asked = []
    for name in ("form_of", "activation_of"):
        probe = getattr(structure_rule, name)
        monkeypatch.setattr(structure_rule, name, lambda m, probe=probe: asked.append(m) or probe(m))
    model = model_of("llama")
    first, second = model.model.layers
    optimize(model)
    assert len(asked) == 2
    restore(model)
    asked.clear()
    second.input_layernorm.variance_epsilon = 0.5  # another number, another function, another method
    first.mlp.act_fn = nn.GELU(approximate="tanh")
    first.post_attention_layernorm.forward = lambda x: x
    optimize(model)
    assert len(asked) == 5
    assert second.input_layernorm.eps == 0.5
    assert (first.mlp.activation, second.mlp.activation) == ("gelu_tanh", "silu")
    assert not isinstance(first.post_attention_layernorm, RMSNorm)
    assert isinstance(second.post_attention_layernorm, RMSNorm)


def test_applying_twice_changes_nothing_more():
    model = tiny_model("llama")
    assert apply(model).swapped and not apply(model).changes


def test_copies_files_and_training_mode(tmp_path):
    model = tiny_model("gemma3_text").train()
    apply(model)
    assert all(module.training for module in model.modules())
    copied = copy.deepcopy(model.eval())
    model.model.norm.weight.data.zero_()
    assert logits(copied).any()
    copied.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(copied))
    UseKernels().restore(copied, None, Report("restore"))
    assert converted(copied) == (0, 0) and torch.equal(logits(loaded), logits(copied))


def test_parameters_of_the_time_in_between_stay():
    model = tiny_model("llama")
    apply(model)
    trained = torch.optim.SGD(model.parameters(), 0.1)
    model(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
    trained.step()
    model.half().load_state_dict({n: v.double() for n, v in model.state_dict().items()}, assign=True)
    answer = logits(model.float())
    UseKernels().restore(model, None, Report("restore"))
    assert torch.equal(logits(model), answer) and model.model.norm.weight.dtype == torch.float32


@pytest.mark.parametrize("first", [True, False])
def test_with_quantised_layers(first):
    model, plain = tiny_model("llama"), tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    if first:
        optimize(model)
    optimize(model, quantize="nf4", keep_original=True)
    assert converted(model) == (5, 2) and isinstance(model.model.layers[0].mlp.gate_proj, onegpu.nn.Linear4bit)
    restore(model)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_adapters_on_top():
    peft = pytest.importorskip("peft")
    model, x = tiny_model("llama"), {"input_ids": torch.arange(8)[None]}
    plain = copy.deepcopy(model)
    apply(model)
    config = peft.LoraConfig(target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    ours = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(plain, config)
    with torch.no_grad():
        assert torch.equal(ours(**x).logits, theirs(**x).logits)
        merged = ours.merge_and_unload()
        assert torch.equal(merged(**x).logits, theirs.merge_and_unload()(**x).logits)
    UseKernels().restore(merged, None, Report("restore"))
    assert converted(merged) == (0, 0)
