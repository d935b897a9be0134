"""Memory of requests: kept, exclusive, and refused with numbers where it does not fit."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import DynamicCache

import onegpu.engine.slots as module
from onegpu.engine.slots import Slots, padded_batch
from onegpu.errors import MemoryBudgetError
from tests.tiny import tiny_config

CONFIG = tiny_config("llama")


def filled(slots: Slots, rows: int = 2, length: int = 100):
    cache = DynamicCache(config=CONFIG)
    slot = slots.lease(cache, rows, rows, length)
    for index in range(len(cache.layers)):
        cache.update(torch.randn(rows, 2, 5, 16), torch.randn(rows, 2, 5, 16), index)
    return slot, cache


def test_a_slot_is_used_again_by_one_at_a_time():
    slots = Slots()
    first, cache = filled(slots)
    assert first.capacity == 128 and first.owns(cache)
    memory = first.full[0][0].data_ptr()
    second, _ = filled(slots)
    assert second is not first
    slots.give_back(first)
    again, other = filled(slots, length=128)
    assert again is first and again.full[0][0].data_ptr() == memory and again.owns(other)
    slots.give_back(again)
    longer, _ = filled(slots, length=129)
    assert longer is not first and longer.capacity == 256
    short, _ = filled(slots, rows=1)
    assert short.batch == 1


def test_a_cache_that_the_user_holds_keeps_its_memory_until_it_dies():
    slots = Slots()
    slot, cache = filled(slots)
    slots.lend(slot, cache)
    content = cache.layers[0].keys.clone()
    other, _ = filled(slots)
    assert other is not slot and torch.equal(cache.layers[0].keys, content)
    assert slots.lease(cache, 2, 2, 110) is slot, "a cache that comes back finds its own memory"
    slots.lend(slot, cache)
    del cache, _
    gc.collect()
    back, _ = filled(slots)
    assert back is slot


def test_a_cache_that_outgrows_its_memory_moves():
    slots = Slots()
    slot, cache = filled(slots)
    slots.lend(slot, cache)
    content = cache.layers[1].values.clone()
    larger = slots.lease(cache, 2, 2, 400)
    assert larger is not slot and larger.capacity == 512 and larger.owns(cache) and not slot.owns(cache)
    assert torch.equal(cache.layers[1].values, content)
    slots.lend(larger, cache)
    assert filled(slots)[0] is slot, "its old place is free"


def test_a_request_that_does_not_fit_is_refused_with_numbers(monkeypatch):
    # Two layers, two rows, 2 heads of 16 float32 for keys and values: 1024 bytes a position.
    free = 300 * 1024
    monkeypatch.setattr(module, "free_bytes", lambda device: free)
    slots = Slots()
    slots.give_back(filled(slots, length=256)[0])
    with pytest.raises(
        MemoryBudgetError, match=r"2 x 384 tokens needs 393\.2 kB.*307\.2 kB are free beside 0 B.*is 300 tokens"
    ):
        filled(slots, length=380)
    assert not slots._idle, "idle memory was given up first"


def test_memory_is_usable_outside_of_inference_mode():
    slots = Slots()
    with torch.inference_mode():
        slot, _ = filled(slots)
    slot.full[0][0].add_(1)


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (17, 24), (64, 64)])
def test_padded_batches(rows: int, batch: int):
    assert padded_batch(rows) == batch
