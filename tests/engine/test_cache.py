"""Cache layers: the same content as transformers' layers, in memory that stays where it is."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from onegpu.engine.cache import FullLayer, StepCache, StepLayer, fill_ring, read_ring, unsupported
from tests.tiny import tiny_config


def states(tokens: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, tokens, 8)


def layer(capacity: int, batch: int = 2) -> FullLayer:
    return FullLayer(lambda keys, values: (torch.zeros(batch, 3, capacity, 8), torch.zeros(batch, 3, capacity, 8)))


def test_tokens_are_written_behind_one_another_in_the_memory():
    ours, theirs = layer(16), DynamicLayer()
    for tokens in (5, 1, 1, 7):
        keys, values = states(tokens), states(tokens)
        for got, expected in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(got, expected)
    assert ours.get_seq_length() == 14 and ours.in_memory()
    assert ours.keys.data_ptr() == ours.memory[0].data_ptr()


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.crop(-3),
        lambda one: one.reorder_cache(torch.tensor([1, 0])),
        lambda one: one.batch_select_indices(torch.tensor([1])),
        lambda one: one.batch_repeat_interleave(2),
        lambda one: None,
    ],
    ids=["crop", "reorder", "select", "repeat", "overflow"],
)
def test_what_transformers_does_to_a_layer_works_on_ours(change):
    ours, theirs = layer(12), DynamicLayer()
    first = states(9), states(9)
    for one in (ours, theirs):
        one.update(*first)
        change(one)
    batch = theirs.keys.shape[0]
    for tokens in (1, 6, 1):
        more = states(tokens, batch), states(tokens, batch)
        for got, expected in zip(ours.update(*more), theirs.update(*more), strict=True):
            assert torch.equal(got, expected)


def test_a_copy_is_a_copy():
    ours = layer(12)
    ours.update(states(4), states(4))
    other = copy.deepcopy(ours)
    before = ours.keys.clone()
    other.update(states(3), states(3))
    ours.update(states(1), states(1))
    assert torch.equal(ours.keys[:, :, :4], before) and torch.equal(other.keys[:, :, :4], before)
    assert other.get_seq_length() == 7 and ours.get_seq_length() == 5


def test_autograd_keeps_its_past():
    ours = layer(12)
    ours.update(states(4), states(4))
    memory = ours.memory[0]
    weight = torch.ones((), requires_grad=True)
    keys, _ = ours.update(states(2) * weight, states(2) * weight)
    keys.sum().backward()
    assert weight.grad is not None and not memory.requires_grad and not ours.in_memory()


def test_a_step_layer_writes_where_the_device_says():
    keys, values, position = torch.zeros(2, 3, 6, 8), torch.zeros(2, 3, 6, 8), torch.tensor([4])
    step = StepLayer(keys, values, position, position, is_sliding=False)
    new = states(1)
    assert step.update(new, -new)[0] is keys
    assert torch.equal(keys[:, :, 4:5], new) and torch.equal(values[:, :, 4:5], -new) and not keys[:, :, :4].any()
    cache = StepCache([step])
    assert cache.is_compileable and int(cache.get_seq_length()) == 4 and cache.get_max_length() == 6
    assert cache.get_mask_sizes(1, 0) == (6, 0)


@pytest.mark.parametrize("tokens", [1, 4, 7, 8, 9, 23])
def test_a_ring_holds_the_window_and_gives_it_back(tokens: int):
    window = 8
    ours, theirs = (DynamicSlidingWindowLayer(window) for _ in range(2))
    first = states(tokens), states(tokens)
    ours.update(*first)
    theirs.update(*first)
    ring = torch.full((2, 3, window, 8), torch.nan), torch.full((2, 3, window, 8), torch.nan)
    fill_ring(ring, ours)
    for position in range(tokens, tokens + 11):
        new = states(1), states(1)
        for tensor, value in zip(ring, new, strict=True):
            tensor[:, :, position % window] = value[:, :, 0]
        theirs.update(*new)
        read_ring(ring, ours, position + 1, 2)
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_which_caches_are_served():
    from transformers import StaticCache

    config = tiny_config("gemma3_text")
    assert unsupported(DynamicCache(config=config)) is None
    assert "StaticCache" in unsupported(StaticCache(config=config, max_cache_len=8))
    assert "does not say" in unsupported(DynamicCache())
    assert unsupported(None) == "no cache is used"
    recording = DynamicCache(config=config)
    recording.activate_past_recording()
    assert "records" in unsupported(recording)
