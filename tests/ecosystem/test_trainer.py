"""``transformers.Trainer`` and a LoRA adapter on quantised weights: beside bitsandbytes, and without it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import onegpu
from onegpu.nn import Linear4bit, Linear8bitLt
from tests.ecosystem import peft_process

peft = pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]
FORMATS = {
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def load(path, kind: str):
    return onegpu.AutoModelForCausalLM.from_pretrained(path, **FORMATS[kind])


@pytest.fixture(scope="module")
def theirs(tiny, tmp_path_factory) -> Path:
    """What PEFT + bitsandbytes did: losses, the trained adapter, and its logits, for each format."""
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed here: nothing to compare with")
    folder = tmp_path_factory.mktemp("bitsandbytes")
    source = tiny("llama", **peft_process.SIZES)
    jobs = [
        {
            "source": source,
            "options": options,
            "train": folder / kind,
            "losses": folder / f"{kind}.json",
            "logits": folder / f"{kind}.pt",
        }
        for kind, options in FORMATS.items()
    ]
    peft_process.run_jobs(jobs, folder)
    return folder


@pytest.mark.parametrize("kind", FORMATS)
def test_the_loss_curve_is_that_of_bitsandbytes(tiny, tmp_path, theirs, kind):
    model = load(tiny("llama", **peft_process.SIZES), kind)
    codes = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = peft_process.adapt(peft.prepare_model_for_kbit_training(model))
    ours = torch.tensor(peft_process.train(model, tmp_path))
    reference = torch.tensor(json.loads((theirs / f"{kind}.json").read_text()))
    assert ours.shape == reference.shape == (peft_process.STEPS,)
    assert ours[-5:].mean() < 0.6 * ours[:5].mean(), "nothing was learnt: equal curves would say nothing"
    apart = ((ours - reference) / reference).abs()
    assert apart.max() < 0.01
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in codes.items())


@pytest.mark.parametrize("kind", FORMATS)
def test_an_adapter_trained_on_bitsandbytes_answers_the_same_here(tiny, theirs, kind):
    model = peft.PeftModel.from_pretrained(load(tiny("llama", **peft_process.SIZES), kind), theirs / kind)
    expected = torch.load(theirs / f"{kind}.pt")
    # LLM.int8 rounds activations: where one falls between two codes, the last bit of a sum decides.
    close = 1e-4 if kind != "int8" else 2e-2
    torch.testing.assert_close(peft_process.logits(model), expected, rtol=close, atol=close * expected.abs().max())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", FORMATS)
def test_checkpointing_changes_memory_not_gradients(tiny, kind, reentrant):
    model = peft_process.adapt(load(tiny("llama"), kind)).train()
    batch = peft_process.collate(peft_process.rows(3))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    calls = [0]
    inner = next(module for module in model.modules() if isinstance(module, (Linear4bit, Linear8bitLt)))
    inner.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again = gradients()
    assert calls[0] == 2, "nothing was computed twice: no checkpointing"
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)


def test_accumulation_clipping_and_16_bit_autocast(tiny, tmp_path):
    model = peft_process.adapt(peft.prepare_model_for_kbit_training(load(tiny("llama"), "nf4_double")))
    before = peft_process.loss(model)
    peft_process.train(model, tmp_path, steps=12, gradient_accumulation_steps=2, max_grad_norm=0.5, bf16=True)
    assert peft_process.loss(model) < 0.95 * before


def test_a_run_is_resumed_from_its_checkpoint(tiny, tmp_path):
    """Adapter, optimiser and data order come back: the losses are those of a run that was not interrupted."""
    whole = peft_process.train(
        peft_process.adapt(load(tiny("llama"), "nf4_double")), tmp_path, steps=6, save_strategy="steps", save_steps=3
    )
    import transformers

    model = peft_process.adapt(load(tiny("llama"), "nf4_double"))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, gradient_checkpointing=True, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=peft_process.rows(), data_collator=peft_process.collate
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    resumed = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.testing.assert_close(resumed[-3:], whole[-3:], rtol=1e-5, atol=1e-6)


def test_all_of_it_without_bitsandbytes(tiny, tmp_path):
    code = """
import importlib.util, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.partition(".")[0] == "bitsandbytes" else real(name, *a)
sys.meta_path.insert(0, Blocker())
import torch, onegpu
from peft import PeftModel, prepare_model_for_kbit_training
from tests.ecosystem import peft_process
source, folder = sys.argv[1:]
for options in ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, {"load_in_8bit": True}):
    for extra in ({}, {"use_dora": True}):
        model = onegpu.AutoModelForCausalLM.from_pretrained(source, **options)
        model = prepare_model_for_kbit_training(model)
        assert model.is_gradient_checkpointing
        model = peft_process.adapt(model, **extra)
        before = peft_process.loss(model)
        peft_process.train(model, folder, steps=16)
        assert peft_process.loss(model) < 0.95 * before
        model.save_pretrained(folder)
        expected = peft_process.logits(model)
        base = onegpu.AutoModelForCausalLM.from_pretrained(source, **options)
        again = PeftModel.from_pretrained(base, folder)
        torch.testing.assert_close(peft_process.logits(again), expected, rtol=1e-4, atol=1e-4)
        merged = again.merge_and_unload()
        assert peft_process.logits(merged).isfinite().all()
assert "bitsandbytes" not in sys.modules
"""
    arguments = [str(tiny("llama")), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
