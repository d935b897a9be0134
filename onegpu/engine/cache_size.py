"""Bytes that a key/value cache holds."""

from __future__ import annotations

from typing import Any


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors in a transformers cache, as allocated (a static cache counts its whole buffers).

    Args:
        cache: a `Cache`, an `EncoderDecoderCache`, or None for a model that keeps none.
    """
    import torch

    if cache is None:
        return 0
    if hasattr(cache, "self_attention_cache"):
        return cache_bytes(cache.self_attention_cache) + cache_bytes(cache.cross_attention_cache)
    seen: dict[int, int] = {}
    for layer in getattr(cache, "layers", ()):
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes() if value.numel() else 0
    return sum(seen.values())
