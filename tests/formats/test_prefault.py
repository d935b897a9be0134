"""Pages of mapped files are filled ahead; nothing happens where there are none."""

from __future__ import annotations

import mmap
import sys
import threading
import time
from pathlib import Path

import pytest

from onegpu.formats.prefault import Prefault

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise's populate is Linux's")


def _resident(path: Path) -> int:
    """kB of ``path`` that this process has in its page tables."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def test_a_file_mapped_later_is_populated(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(4 << 20))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert _resident(path.resolve()) < 4096, "mapped pages are there although nobody asked"
    with Prefault() as prefault:
        prefault.start([path])
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
            for _ in range(500):
                if prefault.populated == 4 << 20:
                    break
                time.sleep(0.01)
            resident = _resident(path.resolve())
    if not prefault.populated:
        pytest.skip("this kernel does not know MADV_POPULATE_READ")
    assert prefault.populated == 4 << 20
    assert resident == 4096


def test_the_thread_ends_with_the_context(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"x")
    with Prefault() as prefault:
        prefault.start([path])
        assert any(thread.name == "onegpu-prefault" for thread in threading.enumerate())
    assert not any(thread.name == "onegpu-prefault" for thread in threading.enumerate())


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    for path in (ours, other):
        path.write_bytes(bytes(1 << 20))
    with Prefault() as prefault, other.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        prefault.start([ours])
        time.sleep(0.1)
    assert prefault.populated == 0


def test_files_that_memory_does_not_hold_twice_are_left_to_the_loader(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 20))
    with Prefault() as prefault:
        prefault.start([path], room=(2 << 20) - 2)
        assert not any(thread.name == "onegpu-prefault" for thread in threading.enumerate())
        prefault.start([path], room=2 << 20)
        assert any(thread.name == "onegpu-prefault" for thread in threading.enumerate())
