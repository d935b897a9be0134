"""Kernels compiled before they are needed: in threads, beside whatever the program does meanwhile.

Inside `collecting`, ops run as ever, but a kernel that would have to be compiled first is noted and not launched; what
it would have written is not there, so this is for runs whose results nobody reads. `start` compiles what was noted.
A launch that comes before its kernel is ready waits for it, and compiles nothing twice.

Threads, because compilers work outside of Python's lock in good part: NVRTC and ptxas wholly, Triton but for its front
end. Compiling touches no device, so a CUDA graph may be captured meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

# Hands a compilation to the threads; None: it is done, or under way.
Job = Callable[[ThreadPoolExecutor], "Future[Any] | None"]
_MOST_THREADS = 16


class _Noted(threading.local):
    jobs: list[Job] | None = None
    waited = 0.0


_noted = _Noted()


@contextlib.contextmanager
def collecting() -> Iterator[list[Job]]:
    """Inside, in this thread, no kernel is compiled: the list holds what would be."""
    before, jobs = _noted.jobs, []  # type: ignore[var-annotated]
    _noted.jobs = jobs
    try:
        yield jobs
    finally:
        _noted.jobs = before


def active() -> bool:
    """Whether this thread is inside `collecting`: what an op keeps for its next call must not be kept."""
    return _noted.jobs is not None


def note(job: Job) -> bool:
    """Leaves a compilation to `start`, inside `collecting`; elsewhere False."""
    if _noted.jobs is None:
        return False
    _noted.jobs.append(job)
    return True


def start(jobs: Iterable[Job]) -> list[Future[Any]]:
    """Compiles in threads and returns at once. Whoever launches such a kernel gets the error, if there is one."""
    return [begun for job in jobs if (begun := job(_pool())) is not None]


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Around what this thread does, or waits for, before it can launch a kernel for the first time."""
    began = time.perf_counter()
    try:
        yield
    finally:
        _noted.waited += time.perf_counter() - began


def waited() -> float:
    """Seconds that this thread has spent inside `waiting`."""
    return _noted.waited


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    count = min(_MOST_THREADS, os.cpu_count() or 1)
    pool, go = ThreadPoolExecutor(count, thread_name_prefix="onegpu-compile"), threading.Event()
    for _ in range(count):  # all threads now: to start one takes two turns of Python's lock, which compilers want later
        pool.submit(go.wait)
    go.set()
    return pool
