"""Key/value caches in memory set aside once: one layer class for prefill and eager steps, two for a captured step.

A request's cache is transformers' own ``DynamicCache``; its full-attention layers are replaced by :class:`FullLayer`,
which writes behind what is there instead of copying everything at each token. A captured step sees the same memory
through a :class:`StepCache`, whose layers write at a position held on the device. Sliding layers keep a ring of one
window there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

Pair = tuple[torch.Tensor, torch.Tensor]


class FullLayer(DynamicLayer):
    """transformers' growing layer, in memory of a known size; beyond that size it grows as its base class does.

    Args:
        allocate: called once with the first keys and values [B, H, T, D]; gives the memory of both,
            [B, H, capacity, D].
    """

    keys: Any
    values: Any

    def __init__(self, allocate: Callable[[torch.Tensor, torch.Tensor], Pair]) -> None:
        super().__init__()
        self._allocate: Callable[[torch.Tensor, torch.Tensor], Pair] | None = allocate
        self.memory: Pair | None = None
        self._shown: Any = None  # what `keys` is while the content lies in the memory

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Append keys and values [B, H, T, D]; returns all of them, [B, H, length, D], as views of the memory."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._allocate is not None:
            self.memory, self._allocate = self._allocate(key_states, value_states), None
            self._shown = self.keys
        batch, _, tokens, _ = key_states.shape
        start = self.get_seq_length()
        recorded = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if recorded or not self._has_room(start + tokens, batch):
            self.memory = None  # what is there was copied elsewhere, there is no more room, or autograd needs the past
            grown: Pair = super().update(key_states, value_states)
            return grown
        assert self.memory is not None
        keys, values = self.memory
        keys.narrow(2, start, tokens).copy_(key_states)
        values.narrow(2, start, tokens).copy_(value_states)
        self.show(start + tokens)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        in_place = self.in_memory()
        super().crop(tokens_to_remove)
        if in_place:
            self.show(self.get_seq_length())

    def show(self, length: int) -> None:
        """Make the first ``length`` positions of the memory the layer's content."""
        assert self.memory is not None
        keys, values = self.memory
        self.keys = self._shown = keys.narrow(2, 0, length)
        self.values = values.narrow(2, 0, length)

    def take(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Start from existing keys and values [B, H, T, D], copied."""
        self.update(keys, values)

    def in_memory(self) -> bool:
        """Whether the layer's content still lies in its memory."""
        return self.memory is not None and self.keys is self._shown

    def _has_room(self, end: int, batch: int) -> bool:
        if self.memory is None or self.keys is not self._shown:
            return False
        keys = self.memory[0]
        return end <= keys.shape[2] and batch == keys.shape[0]


class StepLayer(CacheLayerMixin):
    """One layer of a captured step: writes one token at ``position % length``, shows all of the memory.

    Args:
        keys, values: memory [B, H, length, D]; for a sliding layer a ring of one window.
        position: int64 [1] on the device: where the token stands in the sequence.
        slot: int64 [1]: where it is written; the same tensor as ``position`` except in a ring.
    """

    is_compileable = True
    keys: Any
    values: Any

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor, slot: torch.Tensor, is_sliding: bool
    ) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.position, self.slot, self.is_sliding = position, slot, is_sliding
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the memory is there."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Write keys and values [B, H, 1, D]; returns the whole memory."""
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset of the first one)."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        """Tokens before this one, as a tensor on the device (what transformers' static layers give, too)."""
        return self.position[0]

    def get_max_length(self) -> int:
        """Positions that the memory has."""
        return int(self.keys.shape[2])


class StepCache(Cache):
    """The cache that a captured step is given: one :class:`StepLayer` for each layer."""

    layers: list[Any]

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)


def unsupported(cache: Any) -> str | None:
    """Why ``cache`` cannot be served, or None: only layers of full and sliding-window attention can."""
    from transformers import DynamicCache

    if type(cache) is not DynamicCache:
        return f"the cache is a {type(cache).__name__}" if cache is not None else "no cache is used"
    if cache.offloading:
        return "the cache is offloaded"
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, FullLayer, DynamicSlidingWindowLayer):
            return f"the cache has layers of type {type(layer).__name__}"
        if getattr(layer, "record_past", False):
            return "the cache records what leaves its window"
    return None if cache.layers else "the configuration does not say which layers the cache has"


def fill_ring(ring: Pair, layer: Any) -> None:
    """Put the tokens that a sliding layer holds where a ring has them: position ``p`` at ``p % length``."""
    if not layer.is_initialized or layer.keys.numel() == 0:
        return
    size, held, end = ring[0].shape[2], layer.keys.shape[2], layer.cumulative_length
    slots = torch.arange(end - held, end, device=layer.keys.device) % size
    for target, source in zip(ring, (layer.keys, layer.values), strict=True):
        target[: source.shape[0]].index_copy_(2, slots, source)


def read_ring(ring: Pair, layer: Any, length: int, batch: int) -> None:
    """The other way round: give a sliding layer the last ``window - 1`` tokens of a sequence of ``length``."""
    size = ring[0].shape[2]
    held = min(length, layer.sliding_window - 1)
    slots = torch.arange(length - held, length, device=ring[0].device) % size
    layer.keys, layer.values = (tensor[:batch].index_select(2, slots) for tensor in ring)
    layer.cumulative_length = length
