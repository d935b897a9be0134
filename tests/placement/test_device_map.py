from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from onegpu.errors import ArgumentError, MemoryBudgetError
from onegpu.placement.device_map import POLICIES, Placement, Weights, Wish, place
from tests.placing import GB, TWO_GPUS, bloom, weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def u11() -> Weights:
    return bloom("fp4")


@pytest.fixture(scope="module")
def u13() -> Weights:
    return bloom("int8")


@pytest.fixture(scope="module")
def llama() -> Weights:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=112, num_hidden_layers=6, num_attention_heads=4, vocab_size=500
    )
    return weights(config, "nf4")


def check(model: Weights, placement: Placement) -> None:
    """Every tensor has one device, tied ones the same; the sums are right."""
    used: dict[Any, int] = {}
    for name, size in model.sizes.bytes.items():
        device = device_of(placement, name)
        key = device if isinstance(device, int) else "cpu"
        used[key] = used.get(key, 0) + size
    assert used == placement.used
    for name, source in model.sizes.tied.items():
        assert device_of(placement, name) == device_of(placement, source)


def device_of(placement: Placement, name: str) -> Any:
    entries = [key for key in placement.device_map if key == "" or name == key or name.startswith(f"{key}.")]
    assert len(entries) == 1, (name, entries)
    return placement.device_map[entries[0]]


def test_bloom_3b_in_4_bits_takes_2_61_gb(u11: Weights):
    assert 2.61 * GB < u11.sizes.total < 2.62 * GB


def test_u11_tied_embedding_and_head_on_the_cpu_alone_and_both_gpus_full(u11: Weights):
    budgets = {0: 600 * 10**6, 1: GB}
    placement = place(u11, Wish("auto", {0: "600MB", 1: "1GB"}, TWO_GPUS))
    check(u11, placement)
    on_cpu = {name for name, device in placement.device_map.items() if device == CPU}
    assert on_cpu == {"transformer.word_embeddings", "lm_head"}
    assert not placement.streamed
    for index, budget in budgets.items():
        assert 0.8 * budget <= placement.used[index] <= budget
    blocks = [placement.device_map[f"transformer.h.{n}"] for n in range(30)]
    assert blocks == sorted(blocks)
    assert placement.main == 0
    assert "1.28 GB in CPU memory (transformer.word_embeddings, lm_head; computed there)" in placement.text
    assert "on GPU 0 (11 blocks)" in placement.text


def test_u13_what_waits_is_still_8_bit_and_both_gpus_are_full(u13: Weights):
    budgets = {0: GB, 1: 2 * GB}
    placement = place(u13, Wish("auto", {0: "1GB", 1: "2GB"}, TWO_GPUS))
    check(u13, placement)
    block = max(size for name, size in by_block(u13).items() if name.startswith("transformer.h."))
    for index, budget in budgets.items():
        assert 0.8 * budget <= placement.used[index] <= budget
    assert placement.used[1] + block <= budgets[1]  # room to copy a block to
    assert set(placement.streamed.values()) == {1}
    assert set(placement.streamed) == {f"transformer.h.{n}" for n in range(20, 30)}
    assert "stay in int8 there and are copied to GPU 1" in placement.text


def by_block(model: Weights) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, size in model.sizes.bytes.items():
        key = ".".join(name.split(".")[:3])
        sizes[key] = sizes.get(key, 0) + size
    return sizes


def test_no_cpu_memory_is_an_error_with_the_bytes_and_what_would_fit(u11: Weights, u13: Weights):
    with pytest.raises(MemoryBudgetError, match="1284505600 bytes") as raised:
        place(u11, Wish("auto", {0: "600MB", 1: "1GB", "cpu": 0}, TWO_GPUS))
    message = str(raised.value)
    assert "BloomForCausalLM in fp4 takes 2.62 GB" in message
    assert "600.0 MB on GPU 0, 1.00 GB on GPU 1, 0 B of CPU memory" in message
    assert "load_in_4bit" not in message
    for advised in (
        {0: "600MB", 1: "1GB", "cpu": "1.29GB"},
        {0: "1.66GB", 1: "1GB", "cpu": 0},
    ):
        assert f"max_memory={advised}" in message
        place(u11, Wish("auto", advised, TWO_GPUS))
    with pytest.raises(MemoryBudgetError, match="What would fit: load_in_4bit=True; max_memory="):
        place(u13, Wish("auto", {0: "1GB", 1: "2GB", "cpu": 0}, TWO_GPUS))
    place(u11, Wish("auto", {0: "1GB", 1: "2GB", "cpu": 0}, TWO_GPUS))


def test_measured_memory_that_is_too_small(u11: Weights):
    with pytest.raises(MemoryBudgetError, match=r"free are .* missing") as raised:
        place(u11, Wish("auto", None, {0: GB, "cpu": GB}))
    assert "more CPU memory" in str(raised.value)
    assert "on GPU 0" in str(raised.value)


@pytest.mark.parametrize("policy", POLICIES)
def test_room_to_spare(u11: Weights, policy: str):
    placement = place(u11, Wish(policy, None, TWO_GPUS))
    check(u11, placement)
    assert "cpu" not in placement.used
    if policy in ("auto", "sequential"):
        assert placement.device_map == {"": 0}
        assert not placement.spread
    if policy == "balanced":
        assert abs(placement.used[0] - placement.used[1]) < 0.1 * u11.sizes.total
    if policy == "balanced_low_0":
        assert placement.used.get(0, 0) == 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_every_policy_within_its_budgets(llama: Weights, policy: str, share: float):
    budget = int(llama.sizes.total * share)
    placement = place(llama, Wish(policy, {0: budget // 2, 1: budget // 2}, TWO_GPUS))
    check(llama, placement)
    assert all(placement.used.get(index, 0) <= budget // 2 for index in (0, 1))


def test_auto_without_a_gpu_is_the_cpu(llama: Weights):
    assert place(llama, Wish("auto", None, {"cpu": GB})).device_map == {"": "cpu"}
    assert place(llama, Wish("auto", {"cpu": "1GB"}, {0: GB, "cpu": GB})).device_map == {"": "cpu"}


def test_max_memory_alone_is_auto(llama: Weights):
    placement = place(llama, Wish(None, {0: llama.sizes.total}, TWO_GPUS))
    assert placement.device_map == {"": 0}


def test_one_gpu_refuses_the_second_budget(u11: Weights):
    with pytest.raises(ArgumentError, match=r"max_memory=1 names a GPU that does not exist.*only GPU 0"):
        place(u11, Wish("auto", {0: "600MB", 1: "1GB"}, {0: GB, "cpu": GB}))


def test_disk_is_refused(llama: Weights):
    for wish in (Wish("auto", {0: 1, "disk": "1GB"}, TWO_GPUS), Wish({"": "disk"}, None, TWO_GPUS)):
        with pytest.raises(ArgumentError, match="disk, which holds no weights here"):
            place(llama, wish)


def test_a_map_of_the_users(u11: Weights):
    # from transformers' documentation; the head shares its weight with the embedding, so it is where that is
    mine = {
        "transformer.word_embeddings": 0,
        "transformer.word_embeddings_layernorm": 0,
        "lm_head": "cpu",
        "transformer.h": 1,
        "transformer.ln_f": "cuda:1",
    }
    placement = place(u11, Wish(mine, None, TWO_GPUS))
    check(u11, placement)
    assert placement.device_map["lm_head"] == 0
    assert placement.device_map["transformer.h.29"] == 1
    assert set(placement.used) == {0, 1}


def test_a_map_with_blocks_on_the_cpu(llama: Weights):
    mine = {"model": 0, "model.layers.2": "cpu", "model.layers.3.mlp": CPU, "model.embed_tokens": "cpu", "lm_head": 0}
    placement = place(llama, Wish(mine, None, TWO_GPUS))
    check(llama, placement)
    assert placement.device_map["model.embed_tokens"] == CPU
    assert placement.streamed == {"model.layers.2": 0, "model.layers.3.mlp": 0}
    assert placement.device_map["model.layers.3.self_attn"] == 0


def test_a_map_for_one_device(llama: Weights):
    assert place(llama, Wish({"": 1}, None, TWO_GPUS)).device_map == {"": 1}
    assert place(llama, Wish({"model": "cpu", "lm_head": "cpu"}, None, TWO_GPUS)).device_map == {"": "cpu"}
    assert place(llama, Wish("cpu")).device_map == {"": CPU}
    assert place(llama, Wish(CPU)).device_map == {"": CPU}


def test_a_map_with_a_gap(llama: Weights):
    with pytest.raises(ArgumentError, match=r"device_map=.*names no device for 'lm_head'"):
        place(llama, Wish({"model": 0}, None, TWO_GPUS))


def test_a_map_with_a_gpu_that_is_not_there(llama: Weights):
    with pytest.raises(ArgumentError, match="device_map=5 names a GPU that does not exist"):
        place(llama, Wish({"": 5}, None, TWO_GPUS))
    with pytest.raises(ArgumentError, match="device_map='gpu' is not a device"):
        place(llama, Wish({"": "gpu"}, None, TWO_GPUS))


def test_a_map_that_does_not_fit(llama: Weights):
    total = llama.sizes.total
    with pytest.raises(MemoryBudgetError, match=r"on GPU 0, .* \(1 bytes\) are missing"):
        place(llama, Wish({"": 0}, None, {0: total - 1, "cpu": GB}))
    with pytest.raises(MemoryBudgetError, match="into CPU memory"):
        place(llama, Wish({"": "cpu"}, {"cpu": 10}, TWO_GPUS))


def test_one_device_that_is_too_small(monkeypatch: pytest.MonkeyPatch, llama: Weights):
    monkeypatch.setattr("onegpu.placement.fit.free_bytes", lambda _: llama.sizes.total - 7)
    with pytest.raises(MemoryBudgetError, match="7 B are missing"):
        place(llama, Wish("cpu"))
