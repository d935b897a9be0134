"""How much memory a call takes at its peak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(device: str, call: Callable[[], Any]) -> int:
    """Bytes of tensors that ``call`` holds at its peak beyond what was held before, its result included.

    From what torch asks its allocators for, to the byte: pages that malloc keeps for later are not counted.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak > 0, "the profiler saw no allocation"
    return peak
