"""Where the time goes, thread by thread: a thread that looks at every other thread's Python stack a few hundred times a
second. cProfile sees one thread; transformers loads a checkpoint with several.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

IDLE = frozenset({"sampler", "host-memory"})  # threads of the benchmarks' own
_HERE = str(Path(__file__).parent)


class StackSampler:
    """Samples all threads but its own while used as a context manager.

    Attributes:
        samples: number of looks. self_time, total_time: looks at which a function was running, or was on a stack.
    """

    def __init__(self, interval_s: float = 0.004) -> None:
        self.interval_s = interval_s
        self.samples = 0
        self.seconds = 0.0
        self.self_time: Counter[str] = Counter()
        self.total_time: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> StackSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        start = time.perf_counter()
        names: dict[int | None, str] = {}
        while not self._stop.wait(self.interval_s):
            names.update({thread.ident: thread.name for thread in threading.enumerate()})
            self.samples += 1
            for ident, frame in sys._current_frames().items():
                if names.get(ident) in IDLE:
                    continue
                kind = "main" if names.get(ident) == "MainThread" else "worker"
                self.self_time[f"{kind}: {_where(frame)}:{frame.f_lineno}"] += 1
                seen = set()
                walk: FrameType | None = frame
                while walk is not None and not walk.f_code.co_filename.startswith(_HERE):
                    seen.add(f"{kind}: {_where(walk)}")
                    walk = walk.f_back
                self.total_time.update(seen)
        self.seconds = time.perf_counter() - start

    def report(self, rows: int = 20) -> str:
        """Two tables in seconds of wall clock: by the line that ran, and by the functions that it ran under.

        Several workers at once can take more seconds than have passed. A worker that waits for work is counted too.
        """
        scale = self.seconds / max(1, self.samples)
        parts = [f"{self.seconds:.2f} s, {self.samples} samples"]
        for title, counter in (("seconds at a line", self.self_time), ("seconds under a function", self.total_time)):
            lines = [f"{count * scale:8.2f}  {name}" for name, count in counter.most_common(rows)]
            parts.append("\n".join([title, *lines]))
        return "\n\n".join(parts)


def _where(frame: FrameType) -> str:
    """``package/file.py function``: the last two parts of the path, which name no folder of the machine."""
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])} {frame.f_code.co_name}"
