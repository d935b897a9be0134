"""Timing of two sides in one process: alternating, from CUDA graphs where that is possible, medians and spread."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.case import Call

ROUNDS = 21  # samples a side
_SAMPLE = 1e-3  # seconds that one sample should take, so that the clock's steps do not matter


def capture(run: Callable[[], Any], warm: int = 2) -> Any:
    """A CUDA graph of ``run``, which is called ``warm`` times before, on the stream that is captured.

    Raises:
        RuntimeError: it waits for the host. torch's allocator is then told that the capture is over: by itself it would
            go on refusing to give memory back.
    """
    import torch

    from onegpu.engine.capture import release_generators

    gc.collect()  # not during the capture
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            run()
        torch.cuda.synchronize()
        pool = torch.cuda.graph_pool_handle()
        graph.capture_begin(pool=pool)
        try:
            run()
        except Exception:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            release_generators([torch.cuda.default_generators[torch.cuda.current_device()]])
            torch.cuda.synchronize()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


class Side:
    """One side's calls, as something to run again and again. `seconds` of a sample are of one call."""

    def __init__(self, calls: Sequence[Call], device: str, capture: bool = True) -> None:
        self.calls, self.device, self.launch = list(calls), device, "eager"
        self._run: Callable[[], Any] = self._all
        self._repeat = 1
        if device == "cuda" and capture:
            self._capture()
        for _ in range(2):
            taken = self._time()
        self._repeat = max(1, min(1000, round(_SAMPLE / max(taken, 1e-7))))

    def _all(self) -> None:
        for call in self.calls:
            call()

    def _capture(self) -> None:
        """A side that waits for the host cannot be captured and is timed from its host loop."""
        try:
            self._run = capture(self._all).replay
            self.launch = "graph"
        except RuntimeError as error:
            self.launch = "eager: cannot be captured"
            print(f"{self.launch} ({str(error).partition(chr(10))[0]})", file=sys.stderr)

    def _time(self) -> float:
        """Seconds of all calls, once."""
        if self.device != "cuda":
            start = time.perf_counter()
            for _ in range(self._repeat):
                self._run()
            return (time.perf_counter() - start) / self._repeat
        import torch

        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(self._repeat):
            self._run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / self._repeat

    def sample(self) -> float:
        """Seconds of one call."""
        return self._time() / len(self.calls)


def alternate(sides: dict[str, Side], rounds: int = ROUNDS, deadline: float | None = None) -> dict[str, list[float]]:
    """Samples of every side, taken in turn, the order reversed every other round.

    Args:
        deadline: of `time.perf_counter`; after three rounds, stop when it has passed.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds):
        names = list(sides) if round_ % 2 == 0 else list(sides)[::-1]
        for name in names:
            taken[name].append(sides[name].sample())
        if deadline is not None and round_ >= 2 and time.perf_counter() > deadline:
            break
    return taken


def host_seconds(call: Call, device: str, calls: int = 50, repeats: int = 5) -> float:
    """Least host time of one call, launch included and the device's work not: the queue never fills."""
    from statistics import median

    def wait() -> None:
        if device == "cuda":
            import torch

            torch.cuda.synchronize()

    samples = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) / calls)
    wait()
    return median(samples)
