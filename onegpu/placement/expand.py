"""Expanded copies of 4-bit weights on a CPU.

Decoding 4-bit codes takes a CPU several times as long as multiplying by the result. Where memory is plentiful the
layers may keep what they decoded: at most a quarter of the free memory, counted by footprints and ``memory_table``.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from onegpu.nn import Linear4bit
from onegpu.placement.fit import format_bytes, free_bytes

logger = logging.getLogger("onegpu")

SHARE_OF_FREE_MEMORY = 0.25


def allow_expansion(model: Any, free: int | None = None) -> int:
    """Let the 4-bit layers of ``model`` that are on the CPU keep expanded copies, if all of them fit.

    Args:
        model: any module.
        free: bytes of free memory; measured if None.

    Returns:
        The bytes the copies will take once every layer ran, 0 if they are not allowed.
    """
    layers = [m for m in model.modules() if isinstance(m, Linear4bit) and m.weight.device.type == "cpu"]
    dtype = getattr(model, "dtype", torch.float32)
    needed = sum(m.in_features * m.out_features for m in layers) * dtype.itemsize
    free = free_bytes(torch.device("cpu")) if free is None else free
    allowed = free is not None and needed <= SHARE_OF_FREE_MEMORY * free
    for layer in layers:
        layer.expand_on_cpu = allowed
    if not layers or not allowed:
        return 0
    logger.info("4-bit layers on the CPU keep expanded copies: up to %s of memory", format_bytes(needed))
    return needed
