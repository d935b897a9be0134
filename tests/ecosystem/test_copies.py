"""Models that are copied, replicated and compiled, as PyTorch does it."""

from __future__ import annotations

import copy
import importlib
import io
import shutil

import pytest
import torch

import onegpu
from onegpu.nn import Linear4bit, Linear8bitLt
from tests.tiny import tiny_model

FORMATS = {
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
TYPES = ["llama", "mixtral", "gpt2", "bert"]
IDS = torch.arange(24).reshape(2, 12) + 5


def load(tiny, model_type: str, kind: str):
    auto = onegpu.AutoModelForMaskedLM if model_type == "bert" else onegpu.AutoModelForCausalLM
    return auto.from_pretrained(tiny(model_type), **FORMATS[kind]).eval()


def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("model_type", TYPES)
def test_a_deep_copy_shares_nothing_and_answers_the_same(tiny, model_type, kind):
    model = load(tiny, model_type, kind)
    before = logits(model)
    twin = copy.deepcopy(model)
    mine = {t.data_ptr() for t in [*model.parameters(), *model.buffers()] if t.numel()}
    theirs = {t.data_ptr() for t in [*twin.parameters(), *twin.buffers()] if t.numel()}
    assert not mine & theirs
    assert all(type(a) is type(b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)), (
        "a copied parameter lost its class"
    )
    del model
    assert torch.equal(logits(twin), before)
    assert torch.equal(logits(copy.deepcopy(twin)), before)


@pytest.mark.parametrize("kind", FORMATS)
def test_torch_save_of_a_whole_model(tiny, kind):
    model = load(tiny, "llama", kind)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False)), logits(model))


def replicas(model, count: int, monkeypatch):
    """``torch.nn.parallel.replicate``, with copies in CPU memory in place of copies on GPUs."""
    module = importlib.import_module("torch.nn.parallel.replicate")  # the package has a function of this name

    def broadcast(tensors, devices, detach=False):
        return [[tensor.detach().as_subclass(torch.Tensor).clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    return module.replicate(model, list(range(count)), detach=True)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("model_type", TYPES)
def test_replicas_of_data_parallel_use_their_own_tensors(tiny, model_type, kind, monkeypatch):
    """Replicas get plain tensors in place of parameters and buffers: nothing may hang on the parameter's class."""
    model = load(tiny, model_type, kind)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.expand_on_cpu = False  # the CPU's float copy, which a GPU never has, would hide the codes
    before = logits(model)
    twins = replicas(model, 2, monkeypatch)
    for twin in twins:
        assert torch.equal(logits(twin), before)
    # What replica 0 computes comes from its own codes and scales.
    for module in twins[0].modules():
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            scales = module.SCB if isinstance(module, Linear8bitLt) else module.nested_absmax
            scales.zero_()
            module.weight.zero_()
    assert not torch.allclose(logits(twins[0]), before)
    assert torch.equal(logits(twins[1]), before) and torch.equal(logits(model), before)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FORMATS)
def test_replicas_on_gpus(tiny, kind):
    model = load(tiny, "llama", kind)
    ids = IDS.to(model.device)
    before = logits(model, ids)
    devices = list(range(torch.cuda.device_count()))
    for device, twin in zip(devices, torch.nn.parallel.replicate(model, devices, detach=True), strict=True):
        torch.testing.assert_close(logits(twin, ids.to(device)).to(before.device), before)
    if len(devices) > 1:
        torch.testing.assert_close(torch.nn.DataParallel(model)(input_ids=ids).logits, before)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("model_type", "backend"), [("llama", "aot_eager"), ("gpt2", "eager"), ("bert", "eager")])
def test_torch_compile_has_one_graph_and_the_same_logits(tiny, model_type, kind, backend):
    torch.compiler.reset()
    model = load(tiny, model_type, kind)
    before = logits(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(logits(compiled), before, rtol=1e-5, atol=1e-5)
    # Another length: dynamic shapes, no error.
    torch.testing.assert_close(logits(compiled, IDS[:, :7]), logits(model, IDS[:, :7]), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("kind", FORMATS)
def test_torch_compile_trains_an_adapter(tiny, kind):
    peft = pytest.importorskip("peft")
    torch.compiler.reset()
    model = onegpu.AutoModelForCausalLM.from_pretrained(tiny("llama", num_hidden_layers=1), **FORMATS[kind])
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)

    def gradients(run) -> list[torch.Tensor]:
        model.zero_grad()
        run(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, compiled = gradients(model), gradients(torch.compile(model, backend="aot_eager"))
    assert len(plain) == len(compiled) == 4
    for left, right in zip(compiled, plain, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, and there is none")
@pytest.mark.parametrize("kind", FORMATS)
def test_torch_compile_with_inductor(kind):
    torch.compiler.reset()
    model = tiny_model("bert", num_hidden_layers=1)
    onegpu.optimize(model, quantize="int8" if kind == "int8" else "nf4")
    layer = model.bert.encoder.layer[0].intermediate
    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer)(x), layer(x), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
