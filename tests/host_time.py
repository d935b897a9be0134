"""What a call costs the host, for tests that hold it to a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def least(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each call on a GPU, in turns.

    This thread's time on a core, and the best of many short batches: what a call costs, and not what the machine's
    other work takes from it. A call that became slower is slower in every batch.
    """
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(100):
        for name, call in calls.items():
            call()
            torch.cuda.synchronize()
            start = time.thread_time()
            for _ in range(20):
                call()
            best[name] = min(best[name], (time.thread_time() - start) / 20)
    return best
