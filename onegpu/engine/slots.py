"""The memory of requests: allocated once for the final length, kept for the next one, refused where it cannot be.

A slot belongs to one request at a time, so whatever was captured over it is never replayed twice at once.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from onegpu.engine.cache import FullLayer, Pair
from onegpu.errors import MemoryBudgetError
from onegpu.placement.fit import format_bytes, free_bytes

_ROUND = 128  # of capacities: attention kernels want even masks, and more requests find a slot that fits
_KEPT = 2  # idle slots that a model keeps


class Slot:
    """Memory for one batch: keys and values of each layer, and what was captured over them.

    Args:
        batch: rows, padded. capacity: positions. layers: how many layers the cache has.

    Attributes:
        step: what runs one step over this memory once it was made (:mod:`onegpu.engine.step`), with its graph.
        fingerprint: of the model that it was made of.
        history: int64 [B, capacity + 1], tokens. lengths: int64 [B], how many.
    """

    def __init__(self, batch: int, capacity: int, layers: int) -> None:
        self.batch, self.capacity = batch, capacity
        self.full: list[Pair | None] = [None] * layers
        self.step: Any = None
        self.fingerprint: Any = None
        self.history: torch.Tensor | None = None
        self.lengths: torch.Tensor | None = None
        self._done: Any = None  # an event behind the last request's work, which may have run on another stream

    def adopt(self, cache: Any, rows: int, before_allocating: Any) -> None:
        """Give the full-attention layers of transformers' ``cache`` this memory; what they hold is copied into it.

        Args:
            rows: real rows, at most ``batch``.
            before_allocating: called when memory is about to be allocated: frees what idle requests hold.
        """
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, DynamicSlidingWindowLayer):
                continue
            ours = FullLayer(self._allocator(index, rows, cache.layers, before_allocating))
            if layer.is_initialized and layer.keys is not None and layer.keys.numel():
                ours.take(layer.keys, layer.values)
            cache.layers[index] = ours

    def begin(self, device: torch.device) -> None:
        """What comes on the current stream comes after the last request's work."""
        if self._done is not None:
            torch.cuda.current_stream(device).wait_event(self._done)

    def end(self, device: torch.device) -> None:
        """The request's work is on the current stream."""
        if device.type == "cuda":
            self._done = torch.cuda.current_stream(device).record_event()

    def close(self) -> None:
        """Wait for the last request's work: then the memory can be freed, whichever stream used it."""
        if self._done is not None:
            self._done.synchronize()

    def owns(self, cache: Any) -> bool:
        """Whether all of ``cache`` lies in this memory still."""
        for pair, layer in zip(self.full, cache.layers, strict=True):
            if isinstance(layer, FullLayer):
                if pair is None or not layer.in_memory() or layer.memory[0].data_ptr() != pair[0].data_ptr():  # type: ignore[index]
                    return False
            elif not isinstance(layer, DynamicSlidingWindowLayer):
                return False
        return True

    def _allocator(self, index: int, rows: int, layers: list[Any], before_allocating: Any) -> Any:
        def allocate(keys: torch.Tensor, values: torch.Tensor) -> Pair:
            pair = self.full[index]
            if pair is None or not _alike(pair, keys, values):
                self.full[index] = pair = None
                missing = sum(1 for number, layer in enumerate(layers) if self.full[number] is None and _is_full(layer))
                before_allocating(self, keys, values, missing)
                pair = self.full[index] = self.make(keys, values, self.capacity)
            return pair[0][:rows], pair[1][:rows]

        return allocate

    def make(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> Pair:
        """Memory [batch, H, length, D] for both, of their heads, sizes and dtypes. Zeros: what no token wrote is read
        under a mask, and there NaN would not stay hidden."""
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside it later
            return (
                keys.new_zeros(self.batch, keys.shape[1], length, keys.shape[3]),
                values.new_zeros(self.batch, values.shape[1], length, values.shape[3]),
            )


class Slots:
    """The slots of one model; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Slot] = []
        self._lent: weakref.WeakKeyDictionary[Any, tuple[Slot, Any]] = weakref.WeakKeyDictionary()

    def lease(self, cache: Any, rows: int, batch: int, length: int, reserve: int = 0) -> Slot:
        """A slot that nobody else uses, and whose memory ``cache`` lies in from now on.

        Args:
            cache: a ``DynamicCache``, empty or not.
            rows: batch size. batch: the same, padded. length: positions at the request's end.
            reserve: bytes that the prefill needs beside the cache.
        """
        capacity = -(-length // _ROUND) * _ROUND
        with self._lock:
            lent = self._lent[cache][0] if cache in self._lent else None
            if lent is not None and lent.capacity >= length and lent.batch == batch and lent.owns(cache):
                return lent
            # A step reads masked memory too: one of many times the length would be slow.
            fitting = [s for s in self._idle if s.batch == batch and length <= s.capacity <= max(2 * capacity, 1024)]
            slot = min(fitting, key=lambda s: s.capacity, default=None)
            if slot is not None:
                self._idle.remove(slot)
            else:
                for short in [s for s in self._idle if s.batch == batch and s.capacity <= capacity]:
                    self._idle.remove(short)
                    short.close()
                slot = Slot(batch, capacity, len(cache.layers))
        slot.adopt(cache, rows, functools.partial(self._make_room, reserve))
        return slot

    def give_back(self, slot: Slot) -> None:
        """The request is over and nobody holds its cache."""
        with self._lock:
            self._idle = [*self._idle, slot][-_KEPT:]

    def lend(self, slot: Slot, cache: Any) -> None:
        """The request is over and the user holds its cache: the slot comes back when that object dies."""
        before = self._lent.get(cache)
        if before is None or before[0] is not slot:
            self._lent[cache] = slot, weakref.finalize(cache, _come_back, weakref.ref(self), slot)
        if before is not None and before[0] is not slot:
            before[1]()  # the cache has moved: its old place is free

    def drop(self) -> None:
        """Forget all idle slots, their memory and their graphs."""
        with self._lock:
            for slot in self._idle:
                slot.close()
            self._idle.clear()

    def _make_room(self, reserve: int, slot: Slot, keys: torch.Tensor, values: torch.Tensor, layers: int) -> None:
        """Free idle slots if ``layers`` layers like this one need that; refuse the request if it is not enough."""
        needed = layers * slot.batch * slot.capacity * _bytes_per_position(keys, values)
        free = free_bytes(keys.device)
        if free is None or needed + reserve <= free:
            return
        self.drop()
        free = max(0, (free_bytes(keys.device) or 0) - reserve)
        if needed > free:
            longest = slot.capacity * free // needed
            raise MemoryBudgetError(
                f"The key/value cache of {slot.batch} x {slot.capacity} tokens needs {format_bytes(needed)} on "
                f"{keys.device}, {format_bytes(free)} are free beside {format_bytes(reserve)} for the prompt: the "
                f"longest that fits is {longest} tokens, prompt and answer together. Ask for fewer tokens "
                "(max_new_tokens), or pass fewer prompts at once."
            )


def padded_batch(rows: int) -> int:
    """Rows that a step is made for: 1, 2, 4, 8, then multiples of 8."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8


def _come_back(slots: weakref.ref[Slots], slot: Slot) -> None:
    owner = slots()
    if owner is not None:
        owner.give_back(slot)


def _is_full(layer: Any) -> bool:
    return isinstance(layer, DynamicLayer) and not isinstance(layer, DynamicSlidingWindowLayer)


def _alike(pair: Pair, keys: torch.Tensor, values: torch.Tensor) -> bool:
    return all(
        (have.dtype, have.device, have.shape[1], have.shape[3]) == (new.dtype, new.device, new.shape[1], new.shape[3])
        for have, new in zip(pair, (keys, values), strict=True)
    )


def _bytes_per_position(keys: torch.Tensor, values: torch.Tensor) -> int:
    """Of one row in one layer."""
    return sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in (keys, values))
