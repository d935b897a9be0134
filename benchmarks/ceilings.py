"""What the device reaches today, measured before and after the cases: a copy, a stream that only reads, products."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

_BYTES = 2 << 30  # far beyond any cache


def measure(device: str, repeats: int = 9) -> dict[str, float]:
    """Bytes/s of ``copy`` (read + written) and ``read``, operations/s of ``bf16`` and ``int8`` products of 8192^3.

    Takes about 0.3 s on a GPU. On a CPU only the copy is measured, and small.
    """
    import torch

    if device != "cuda":
        small = torch.zeros(1 << 22, dtype=torch.uint8)
        return {"copy": 2 * small.numel() / _median(small.clone, device, repeats)}
    found = {}
    x = torch.zeros(_BYTES, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    found["copy"] = 2 * _BYTES / _median(partial(y.copy_, x), device, repeats)
    del y
    found["read"] = _BYTES / min(_median(read, device, repeats) for read in _readers(x))
    del x
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    found["bf16"] = 2 * 8192**3 / _median(partial(torch.mm, a, b), device, repeats)
    i, j = (torch.randint(-127, 127, (8192, 8192), device=device, dtype=torch.int8) for _ in range(2))
    found["int8"] = 2 * 8192**3 / _median(partial(torch._int_mm, i, j.t()), device, repeats)
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def _readers(x: Any) -> list[Callable[[], Any]]:
    """Ways to read every byte and write next to nothing; the fastest one is the ceiling."""
    import torch

    from onegpu.kernels.library import has_triton

    words = x.view(torch.int32)
    readers: list[Callable[[], Any]] = [words.amax, x.view(torch.float32).sum]
    if has_triton():
        from benchmarks.ceilings_triton import read

        sums = torch.empty(1 << 20, dtype=torch.int32, device=x.device)
        readers += [partial(read, words, sums, block) for block in (4096, 8192, 16384)]
    return readers


def _median(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Median seconds, after two calls that are not counted."""
    samples = []
    for repeat in range(repeats + 2):
        if device == "cuda":
            import torch

            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            call()
            last.record()
            last.synchronize()
            taken = first.elapsed_time(last) / 1e3
        else:
            start = time.perf_counter()
            call()
            taken = time.perf_counter() - start
        if repeat >= 2:
            samples.append(taken)
    return median(samples)


def roofline(ceilings: dict[str, float], bytes: int, flops: int, ceiling: str, compute: str = "bf16") -> float | None:
    """Least seconds in which the device could do this, by the measured ceilings; None where one was not measured."""
    if ceiling not in ceilings or compute not in ceilings:
        return None
    return max(bytes / ceilings[ceiling], flops / ceilings[compute])
