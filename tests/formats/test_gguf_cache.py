from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import time
from pathlib import Path

import pytest

from onegpu.formats import gguf_cache as cache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return cache.cache_root(tmp_path / "cache")


def settled(path: Path, text: str) -> Path:
    """A file old enough for its time of change to be trusted."""
    path.write_text(text)
    old = time.time() - 60
    os.utime(path, (old, old))
    return path


def fill(build: Path, text: str = "{}") -> None:
    (build / "config.json").write_text(text)
    cache.seal(build, source="here", dtype="float32", transformers="5")


def test_the_default_place_follows_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    root = cache.cache_root()
    assert root == tmp_path / "assets" / "onegpu" / "gguf"
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


def test_the_key_changes_with_content_format_dtype_and_transformers_minor() -> None:
    key = cache.entry_key("a" * 64, "float32", "5.23.1")
    assert key == cache.entry_key("a" * 64, "float32", "5.23.0")
    others = [("b" * 64, "float32", "5.23.0"), ("a" * 64, "float16", "5.23.0"), ("a" * 64, "float32", "5.17.0")]
    assert len({key, *(cache.entry_key(*other) for other in others)}) == 4


def test_a_digest_is_remembered_until_the_file_changes(root: Path, tmp_path: Path) -> None:
    file = settled(tmp_path / "file", "abc")
    assert cache.known_digest(file, root) is None
    digest = cache.file_digest(file, root)
    assert digest == hashlib.sha256(b"abc").hexdigest() == cache.known_digest(file, root)
    settled(file, "abcd")
    assert cache.known_digest(file, root) is None


def test_a_file_written_just_now_is_not_remembered(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("abc")  # and could be written again within the clock's tick, with the same size
    cache.file_digest(file, root)
    assert cache.known_digest(file, root) is None


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"x": ', "\x00\xff"])
def test_a_damaged_index_is_made_again(root: Path, tmp_path: Path, text: str) -> None:
    (root / "stat.json").write_bytes(text.encode("latin-1"))
    file = settled(tmp_path / "file", "abc")
    assert cache.known_digest(file, root) is None
    assert cache.file_digest(file, root) == cache.known_digest(file, root)


def test_an_entry_appears_whole_or_not_at_all(root: Path) -> None:
    with cache.building(root, "key") as build:
        assert build is not None and stat.S_IMODE(build.stat().st_mode) == 0o700
        fill(build)
        assert not (root / "key").exists() and cache.list_cache(root) == []
    assert cache.is_complete(root / "key")
    with cache.building(root, "key") as build:
        assert build is None  # nothing to do any more


def test_two_builders_do_the_work_once(root: Path) -> None:
    builds, started = [], threading.Event()

    def work() -> None:
        with cache.building(root, "key") as build:
            started.set()
            if build is not None:
                builds.append(build)
                time.sleep(0.2)
                fill(build)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and cache.is_complete(root / "key")


def test_a_manifest_of_another_format_is_not_trusted(root: Path) -> None:
    with cache.building(root, "key") as build:
        assert build is not None
        fill(build)
    manifest = root / "key" / cache.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    assert not cache.is_complete(root / "key")


def test_clearing_leaves_a_build_in_progress_alone(root: Path) -> None:
    with cache.building(root, "busy") as build:
        assert build is not None
        stop = threading.Thread(target=cache.clear_cache, args=(root,))  # another thread: the lock is not ours there
        stop.start()
        stop.join()
        assert build.is_dir()
        fill(build)
    assert [entry.key for entry in cache.list_cache(root)] == ["busy"]
    assert [entry.key for entry in cache.clear_cache(root)] == ["busy"]
    assert cache.list_cache(root) == []
