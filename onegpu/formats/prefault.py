"""Mapping a checkpoint's pages ahead of the loader.

safetensors maps files into memory, and the thread that copies a tensor to the GPU stops at every page that it touches
for the first time. A helper thread asks the kernel to fill the page tables ahead of it (``MADV_POPULATE_READ``, Linux
5.14; see madvise(2)). That is advice: where the kernel does not know it, nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

_MADV_POPULATE_READ = 22
_STEP = 64 << 20


class Prefault:
    """A context in which the files given to :meth:`start` are mapped ahead, as soon as somebody maps them."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.populated = 0  # bytes, for tests

    def start(self, files: Iterable[str | Path], room: int | None = None) -> None:
        """Begin to watch for mappings of ``files``, if half of ``room`` bytes of memory (None: no limit) holds them.

        Of files larger than memory, pages filled ahead would be dropped again before the loader comes to them.
        """
        if not sys.platform.startswith("linux") or self._thread is not None:
            return
        paths = {str(Path(file).resolve()) for file in files}
        if room is not None and sum(Path(path).stat().st_size for path in paths) > room // 2:
            return
        self._thread = threading.Thread(target=self._run, args=(paths,), name="onegpu-prefault", daemon=True)
        self._thread.start()

    def _run(self, paths: set[str]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        done: set[int] = set()
        while not self._stop.wait(0.002 if len(done) < len(paths) else 0.1):
            for start, end in _mappings(paths):
                if start in done:
                    continue
                done.add(start)
                for address in range(start, end, _STEP):
                    # Unmapped in the meantime: an error code, not a fault. Unknown to the kernel: the same, at once.
                    size = min(_STEP, end - address)
                    if self._stop.is_set() or libc.madvise(address, size, _MADV_POPULATE_READ):
                        break
                    self.populated += size

    def __enter__(self) -> Prefault:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


def _mappings(paths: set[str]) -> list[tuple[int, int]]:
    """Address ranges at which this process has any of ``paths`` mapped."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in paths:
            start, end = fields[0].split("-")
            found.append((int(start, 16), int(end, 16)))
    return sorted(found)
