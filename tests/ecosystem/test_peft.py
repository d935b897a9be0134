"""Adapters on whole quantised models: attached, saved, loaded here and onto bitsandbytes, merged."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import onegpu
from onegpu.nn import Linear4bit, Linear8bitLt
from tests.ecosystem import peft_process

peft = pytest.importorskip("peft")

FORMATS = {
    "fp4": {"load_in_4bit": True},
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def load(path, kind: str, **options):
    return onegpu.AutoModelForCausalLM.from_pretrained(path, **FORMATS[kind], **options)


def disturb(model) -> None:
    """Adapters start as zero: give them something to say."""
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)


def close(kind: str, expected: torch.Tensor) -> dict[str, float]:
    # LLM.int8 rounds activations: where one falls between two codes, the last bit of a sum decides.
    share = 2e-2 if kind == "int8" else 1e-4
    return {"rtol": share, "atol": share * float(expected.abs().max())}


@pytest.fixture(scope="module")
def exchanged(tiny, tmp_path_factory) -> Path:
    """For each format: an adapter saved here, the model with it merged in, and what bitsandbytes makes of both."""
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed here: nothing to compare with")
    folder, source, jobs = tmp_path_factory.mktemp("peft"), tiny("llama", **peft_process.SIZES), []
    for kind, options in FORMATS.items():
        model = peft_process.adapt(load(source, kind))
        disturb(model)
        model.save_pretrained(folder / kind)
        torch.save(peft_process.logits(model), folder / f"{kind}-ours.pt")
        jobs.append({"source": source, "options": options, "adapter": folder / kind, "logits": folder / f"{kind}.pt"})
        merged = model.merge_and_unload()
        merged.save_pretrained(folder / f"{kind}-merged")
        torch.save(peft_process.logits(merged), folder / f"{kind}-merged-ours.pt")
        jobs.append({"source": folder / f"{kind}-merged", "logits": folder / f"{kind}-merged.pt"})
    peft_process.run_jobs(jobs, folder)
    return folder


@pytest.mark.parametrize("what", ["", "-merged"])
@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_saved_here_answers_the_same_on_bitsandbytes(exchanged, kind, what):
    ours, theirs = (torch.load(exchanged / f"{kind}{what}{side}.pt") for side in ("-ours", ""))
    torch.testing.assert_close(ours, theirs, **close(kind, theirs))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_saved_adapter_comes_back_in_every_way(tiny, exchanged, kind):
    from onegpu.convert.peft import QuantizedLoraLinear

    source, expected = tiny("llama", **peft_process.SIZES), torch.load(exchanged / f"{kind}-ours.pt")
    wrapped = peft.PeftModel.from_pretrained(load(source, kind), exchanged / kind)
    inside = load(source, kind)
    inside.load_adapter(str(exchanged / kind))
    for model in (wrapped, inside):
        assert sum(isinstance(module, QuantizedLoraLinear) for module in model.modules()) == 14
        assert torch.equal(peft_process.logits(model), expected)
    assert isinstance(wrapped.merge_and_unload().model.layers[0].mlp.up_proj, (Linear4bit, Linear8bitLt))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_merged_model_comes_back_bit_for_bit(exchanged, kind):
    again = onegpu.AutoModelForCausalLM.from_pretrained(exchanged / f"{kind}-merged")
    assert torch.equal(peft_process.logits(again), torch.load(exchanged / f"{kind}-merged-ours.pt"))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon_new", "bloom"])
def test_merge_and_unmerge(tiny, model_type, kind):
    """Merged it is the float model of dequantised weights and adapter, but for rounding; unmerged it is as before."""
    model = peft_process.adapt(load(tiny(model_type), kind))
    disturb(model)
    before = peft_process.logits(model)
    exact = copy.deepcopy(model)
    for module in list(exact.modules()):
        if isinstance(getattr(module, "base_layer", None), (Linear4bit, Linear8bitLt)):
            base = module.base_layer
            floats = torch.nn.Linear(base.in_features, base.out_features, base.bias is not None)
            floats.weight.data = base.dequantize(torch.float32)
            if base.bias is not None:
                floats.bias = base.bias
            module.base_layer = floats
    expected = peft_process.logits(exact)
    model.merge_adapter()
    merged = peft_process.logits(model)

    def apart(left, right) -> float:
        return float((left - right).norm() / right.norm())

    plain = peft_process.logits(load(tiny(model_type), kind))
    assert 0 < apart(merged, expected) < apart(plain, expected), "the merge must not lose more than the adapter is"
    assert apart(merged, expected) < (0.05 if kind == "int8" else 0.5)
    model.unmerge_adapter()
    assert torch.equal(peft_process.logits(model), before)


@pytest.mark.parametrize("kind", FORMATS)
def test_add_adapter_of_transformers(tiny, kind):
    """``model.add_adapter`` and its company, which PEFT's own model class does not see."""
    model = load(tiny("llama"), kind)
    plain = peft_process.logits(model)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"), "first")
    disturb(model)
    adapted = peft_process.logits(model)
    assert not torch.equal(adapted, plain) and model.active_adapters() == ["first"]
    model.disable_adapters()
    assert torch.equal(peft_process.logits(model), plain)
    model.enable_adapters()
    assert torch.equal(peft_process.logits(model), adapted)


def test_several_adapters_in_one_batch(tiny):
    model = peft_process.adapt(load(tiny("llama"), "nf4_double"))
    model.add_adapter("other", model.peft_config["default"])
    disturb(model)
    ids = torch.arange(24).reshape(2, 12) + 5
    with torch.no_grad():
        model.eval()
        apart = [model(input_ids=ids, adapter_names=[name] * 2).logits for name in ("default", "other")]
        mixed = model(input_ids=ids, adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed, torch.stack([apart[0][0], apart[1][1]]), rtol=1e-5, atol=1e-5)
    assert not torch.equal(apart[0], apart[1])


@pytest.mark.parametrize("kind", ["nf4_double", "int8"])
def test_all_linear_and_a_footprint_that_stays(tiny, kind):
    model = load(tiny("llama"), kind, dtype=torch.bfloat16)
    before = model.get_memory_footprint()
    model = peft_process.adapt(peft.prepare_model_for_kbit_training(model))
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    quantized = [m for m in model.modules() if isinstance(m, (Linear4bit, Linear8bitLt))]
    assert all(m.weight.dtype in (torch.uint8, torch.int8) and not m.weight.requires_grad for m in quantized)
    assert all((m.SCB if kind == "int8" else m.nested_absmax).dtype == torch.float32 for m in quantized)
    adapters = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    floats = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32 and not p.requires_grad)
    # What was in bfloat16 is in float32 now, the codes are as they were.
    assert model.get_memory_footprint() <= before + adapters + 2 * floats + 64
