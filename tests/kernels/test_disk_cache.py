"""Compiled kernels on disk, rule (i) of DESIGN.md, "Launching"."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from onegpu.kernels import disk_cache


def test_i_an_entry_is_found_again_and_a_broken_one_is_made_again(tmp_path: Path) -> None:
    folder, made = tmp_path / "cubins", []

    def cached(key: tuple[object, ...] = ("key", 1)) -> tuple[str, bytes]:
        return disk_cache.cached(key, lambda: made.append(key) or ("a line", b"\n\0code\n"), folder)

    first = cached()
    assert first == cached() == ("a line", b"\n\0code\n") and len(made) == 1
    (entry,) = folder.iterdir()
    assert entry.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
    content = entry.read_bytes()
    for broken in (content[:-1], content[:20], b"", content[:-1] + bytes([content[-1] ^ 1]), b"x" + content[1:]):
        entry.write_bytes(broken)
        assert cached() == first and entry.read_bytes() == content
    assert len(made) == 6
    cached(("key", "1"))
    assert len(made) == 7 and len(list(folder.iterdir())) == 2


def test_i_only_a_private_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private_folder = disk_cache.private_folder
    folder = tmp_path / "a" / "b"
    assert private_folder(folder) == folder and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert private_folder(folder) == folder and folder.stat().st_mode & 0o777 == 0o700
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert private_folder(link) is None
    (tmp_path / "file").write_text("")
    assert private_folder(tmp_path / "file" / "x") is None
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert private_folder(folder) is None
    assert disk_cache.cached((), lambda: ("made", b""), folder) == ("made", b"") and not list(folder.iterdir())


def test_i_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert disk_cache.cached((), lambda: ("made", b"code"), tmp_path) == ("made", b"code")
    assert not list(tmp_path.iterdir())


def test_i_two_at_once_write_the_same_entry(tmp_path: Path) -> None:
    both, found = threading.Barrier(2), []

    def make() -> tuple[str, bytes]:
        both.wait(20)  # neither has written when the other looks
        return "line", b"code" * 100_000

    threads = [threading.Thread(target=lambda: found.append(disk_cache.cached((), make, tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [("line", b"code" * 100_000)] * 2 and len(list(tmp_path.iterdir())) == 1
    assert disk_cache.cached((), both.abort, tmp_path) == found[0]  # type: ignore[arg-type]
