"""Models spread over devices give the same answers. Without a GPU every "device" is the CPU, copies are made anyway."""

from __future__ import annotations

import copy
import gc
import logging
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules

import onegpu
from onegpu.errors import ArgumentError, MemoryBudgetError
from onegpu.nn import Linear4bit, Linear8bitLt
from onegpu.placement.device_map import Placement
from onegpu.placement.hooks import PlaceHook, attach
from onegpu.placement.sizes import stored_sizes
from onegpu.placement.units import find_units
from tests.tiny import tiny_model_dir

CPU = torch.device("cpu")
FORMS: list[dict[str, Any]] = [
    {},
    {"load_in_4bit": True},
    {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"},
    {"load_in_8bit": True},
]
KINDS = ["bloom", "llama", "mixtral", "falcon_old", "gpt2", "opt"]
PROMPT = torch.tensor([[5, 17, 99, 42, 7], [23, 8, 61, 101, 12]])


def load(tmp_path: Path, kind: str, **arguments: Any) -> Any:
    auto = onegpu.AutoModelForSeq2SeqLM if kind == "t5" else onegpu.AutoModelForCausalLM
    return auto.from_pretrained(tiny_model_dir(tmp_path / kind, kind), dtype=torch.float32, **arguments)


def spread_on_cpu(model: Any) -> Placement:
    """Every block streamed "to" the CPU: copied for its call, and dropped."""
    units = find_units(model, stored_sizes(model))
    streamed: Any = {unit.name: "cpu" for unit in units if unit.block}
    return Placement({unit.name: CPU for unit in units}, streamed, main="cpu")


def greedy(model: Any, prompt: torch.Tensor = PROMPT) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(prompt, max_new_tokens=8, do_sample=False)
    return tokens.cpu()


@pytest.mark.parametrize("arguments", FORMS)
@pytest.mark.parametrize("kind", [*KINDS, "t5"])
def test_streamed_blocks_give_the_same_tokens(tmp_path: Path, kind: str, arguments: dict[str, Any]):
    model = load(tmp_path, kind, **arguments)
    expected, before = greedy(model), {name: tensor for name, tensor in model.named_parameters()}
    attach(model, spread_on_cpu(model))
    assert torch.equal(greedy(model), expected)
    after = dict(model.named_parameters())
    assert all(after[name] is tensor for name, tensor in before.items())  # originals again, no copy is left
    assert torch.equal(greedy(copy.deepcopy(model)), expected)


@pytest.mark.parametrize("arguments", FORMS[1:])
def test_saved_files_are_those_of_a_model_in_one_place(tmp_path: Path, arguments: dict[str, Any]):
    model = load(tmp_path, "bloom", **arguments)
    model.save_pretrained(tmp_path / "whole")
    attach(model, spread_on_cpu(model))
    greedy(model)
    model.save_pretrained(tmp_path / "spread")
    files = [path.name for path in (tmp_path / "whole").glob("*.safetensors")]
    assert files
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "spread" / name).read_bytes()


def test_tensors_are_elsewhere_only_during_the_call():
    layer = torch.nn.Linear(3, 2)
    weight, seen = layer.weight, []
    layer.register_forward_hook(lambda module, *_: seen.append(module.weight))
    accelerate.hooks.add_hook_to_module(layer, PlaceHook("cpu", stream=True))
    layer(torch.ones(1, 3))
    assert layer.weight is weight

    layer._old_forward = lambda x: (_ for _ in ()).throw(RuntimeError("stop"))
    with pytest.raises(RuntimeError, match="stop"):
        layer(torch.ones(1, 3))
    layer._old_forward = lambda x: x
    layer(torch.ones(1, 3))
    assert layer.weight is weight


def test_copies_go_to_the_device():
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    layer[0].weight.requires_grad_(False)
    accelerate.hooks.add_hook_to_module(layer, PlaceHook("meta", stream=True))
    output = layer(torch.ones(4, 3))
    assert output.device.type == "meta"
    assert all(tensor.device.type == "cpu" for tensor in (*layer.parameters(), *layer.buffers()))


def test_gradients_reach_what_learns_in_cpu_memory(tmp_path: Path):
    model = load(tmp_path, "bloom")
    loss = model(PROMPT, labels=PROMPT).loss
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    attach(model, spread_on_cpu(model))
    model(PROMPT, labels=PROMPT).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-5, atol=1e-7)


def test_a_spread_model_does_not_move(tmp_path: Path):
    for form in ({}, {"load_in_8bit": True}):
        model = load(tmp_path, "bloom", **form)
        placement = spread_on_cpu(model)
        placement.device_map["lm_head"] = "cpu"  # a second name for the CPU: two "devices"
        attach(model, placement)
        for move, arguments in ((model.to, ["cpu"]), (model.to, ["cuda"]), (model.cuda, [])):
            with pytest.raises(ArgumentError, match="spread over several devices"):
                move(*arguments)
    assert load(tmp_path, "bloom").to("cpu") is not None


@pytest.mark.parametrize("arguments", [FORMS[1], FORMS[3]])
@pytest.mark.parametrize("kind", ["bloom", "falcon_old"])
def test_accelerates_own_offload_works_on_our_layers(tmp_path: Path, kind: str, arguments: dict[str, Any]):
    model = load(tmp_path, kind, **arguments)
    expected = greedy(model)
    units = find_units(model, stored_sizes(model))
    accelerate.dispatch_model(model, {u.name: CPU if n % 2 else "cpu" for n, u in enumerate(units)})
    assert any(p.is_meta for p in model.parameters())
    assert torch.equal(greedy(model), expected)
    remove_hook_from_submodules(model)
    assert all(m.weight.device.type == "cpu" for m in model.modules() if isinstance(m, (Linear4bit, Linear8bitLt)))
    assert torch.equal(greedy(model), expected)


def test_accelerates_own_offload_of_experts_is_an_error_not_nonsense(tmp_path: Path):
    model = load(tmp_path, "mixtral", load_in_4bit=True)
    accelerate.dispatch_model(model, {"model": "cpu", "lm_head": CPU})
    with pytest.raises(RuntimeError, match="device_map= and max_memory="):
        greedy(model)


@pytest.mark.parametrize("arguments", FORMS)
def test_loading_with_words_on_the_cpu(tmp_path: Path, arguments: dict[str, Any], caplog: pytest.LogCaptureFixture):
    expected = greedy(load(tmp_path, "bloom", **arguments))
    for wish in ({"device_map": "auto", "max_memory": {"cpu": "1GB"}}, {"max_memory": {"cpu": 10**9}}):
        assert torch.equal(greedy(load(tmp_path, "bloom", **arguments, **wish)), expected)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING and record.name == "onegpu"]


@pytest.mark.parametrize("arguments", FORMS)
def test_loading_what_does_not_fit(tmp_path: Path, arguments: dict[str, Any]):
    with pytest.raises(MemoryBudgetError, match=r"BloomForCausalLM in .* missing"):
        load(tmp_path, "bloom", device_map="auto", max_memory={"cpu": "10KB"}, **arguments)


@pytest.mark.parametrize("arguments", FORMS)
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="this machine has a GPU 1")
def test_loading_on_a_gpu_that_is_not_there(tmp_path: Path, arguments: dict[str, Any]):
    with pytest.raises(ArgumentError, match="max_memory=1 "):
        load(tmp_path, "bloom", device_map="auto", max_memory={1: "1GB"}, **arguments)
    with pytest.raises(ArgumentError, match="device_map"):
        load(tmp_path, "bloom", device_map={"transformer": 1, "lm_head": "cpu"}, **arguments)


def test_loading_to_the_disk_is_refused_for_quantised_weights(tmp_path: Path):
    for wish in ({"device_map": {"": "disk"}}, {"device_map": "auto", "max_memory": {"cpu": 0, "disk": "1GB"}}):
        with pytest.raises(ArgumentError, match="disk, which holds no weights here"):
            load(tmp_path, "bloom", load_in_4bit=True, **wish)


# On a GPU: a part of the model in CPU memory.

LARGER = {"hidden_size": 256, "n_layer": 24, "n_head": 8}


def split(folder: Path, share: float, **arguments: Any) -> tuple[Any, torch.Tensor, int, int]:
    """A BLOOM that gets this share of what it takes on GPU 0; the tokens of the whole one; the budget; bytes before."""
    whole = onegpu.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=0, **arguments)
    expected, total = greedy(whole, PROMPT.cuda()), stored_sizes(whole).total
    del whole
    gc.collect()  # its bound methods refer to it
    before = torch.cuda.memory_allocated()  # with the workspaces that libraries took
    budget = int(total * share)
    model = onegpu.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="auto", max_memory={0: budget, "cpu": "4GB"}, **arguments
    )
    return model, expected, budget, before


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", FORMS)
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_split_between_gpu_and_cpu(tmp_path: Path, share: float, arguments: dict[str, Any]):
    folder = tiny_model_dir(tmp_path / "larger", "bloom", **LARGER)
    model, expected, budget, before = split(folder, share, **arguments)
    weights_on_gpu = torch.cuda.memory_allocated() - before
    assert 0.8 * budget <= weights_on_gpu <= 1.02 * budget  # the allocator rounds every tensor up to 512 bytes
    assert {0, CPU} == set(model.hf_device_map.values())
    for prompt in (PROMPT, PROMPT.cuda()):
        assert torch.equal(greedy(model, prompt), expected)
    model.generate.engine.slots.drop()  # the cache, which is kept for the next request, comes on top of the weights
    gc.collect()
    assert torch.cuda.memory_allocated() - before <= 1.02 * budget  # no copy of a block is left


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_tiny_models_split_block_by_block(tmp_path: Path, kind: str, arguments: dict[str, Any]):
    folder = tiny_model_dir(tmp_path / kind, kind)
    whole = onegpu.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=0, **arguments)
    expected = greedy(whole, PROMPT.cuda())
    blocks = [unit.name for unit in find_units(whole, stored_sizes(whole)) if unit.block]
    model = onegpu.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": 0, blocks[0]: "cpu"}, **arguments
    )
    assert model.get_submodule(blocks[0])._hf_hook.stream
    assert torch.equal(greedy(model), expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("arguments", FORMS)
def test_split_over_two_gpus_and_the_cpu(tmp_path: Path, arguments: dict[str, Any]):
    folder = tiny_model_dir(tmp_path / "larger", "bloom", **LARGER)
    whole = onegpu.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=0, **arguments)
    expected, total = greedy(whole, PROMPT.cuda()), stored_sizes(whole).total
    model = onegpu.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="auto", max_memory={0: total // 3, 1: total // 3}, **arguments
    )
    assert {0, 1, CPU} == set(model.hf_device_map.values())
    assert torch.equal(greedy(model), expected)
