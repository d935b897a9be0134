"""Where converted GGUF files are kept: one private folder for each content, complete or not there.

    <root>/<sha256 of the file, 32 digits>-v1-t5.23-float32/    a model folder, and onegpu.json that lists its files
    <root>/stat.json                                            size, mtime and inode of files whose hash is known
    <root>/.locks/, <root>/.build-*                             one builder for each key; what it has not finished

A folder is built beside its place and renamed into it, so nobody sees half of one; one whose files do not match its
list (a full disk, a copied cache) is built again. The key holds the format and the minor version of transformers,
because both decide what the conversion writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "onegpu.json"
_STAT_INDEX = "stat.json"
_BUILD = ".build-"
_SETTLED_S = 2.0  # a file younger than this could change again without its mtime moving


@dataclass(frozen=True)
class CacheEntry:
    """One converted file. `complete` is False for a folder that will be built again when it is next needed."""

    key: str
    path: Path
    source: str
    bytes: int
    created: str
    dtype: str
    transformers: str
    complete: bool


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the conversions, made private (0700) if it is new.

    The default lies in the place that huggingface_hub sets aside for other libraries, so a user who moved that cache to
    a large disk (`HF_HOME`) has moved this one too.
    """
    if cache_dir is None:
        from huggingface_hub import constants

        root = Path(constants.HF_ASSETS_CACHE) / "onegpu" / "gguf"
    else:
        root = Path(cache_dir)
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
    return root


def entry_key(digest: str, dtype: str, transformers_version: str) -> str:
    """Name of the folder for a file's sha256 (hex), the dtype written and the transformers that converts."""
    minor = ".".join(transformers_version.split(".")[:2])
    return f"{digest[:32]}-v{FORMAT}-t{minor}-{dtype}"


def known_digest(file: Path, root: Path) -> str | None:
    """The file's sha256 if it was hashed before and has not changed since by size, time and inode."""
    record = _read_json(root / _STAT_INDEX).get(str(file.resolve()))
    if isinstance(record, dict) and record.get("stat") == _stat(file):
        digest = record.get("sha256")
        return digest if isinstance(digest, str) else None
    return None


def file_digest(file: Path, root: Path) -> str:
    """The file's sha256 (hex), remembered in the index so that the next call need not read it."""
    digest, before = hashlib.sha256(), _stat(file)
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    settled = time.time() - file.stat().st_mtime > _SETTLED_S
    if settled and before == _stat(file):
        index = _read_json(root / _STAT_INDEX)
        index[str(file.resolve())] = {"stat": before, "sha256": digest.hexdigest()}
        # Two writers may race and one record be lost; the file is then hashed once more.
        _write_json(root / _STAT_INDEX, index)
    return digest.hexdigest()


def is_complete(entry: Path) -> bool:
    """Whether every file that the entry's manifest lists is there with its size."""
    manifest = _read_json(entry / MANIFEST)
    files = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(files, dict) or "config.json" not in files:
        return False
    return all((entry / name).is_file() and (entry / name).stat().st_size == size for name, size in files.items())


@contextlib.contextmanager
def building(root: Path, key: str) -> Iterator[Path | None]:
    """Builds an entry: yields an empty folder to fill, or None if another process has finished the entry meanwhile.

    When the block ends without an error (and `seal` was called) the folder takes its place; otherwise it is removed.
    A process that is killed leaves a `.build-` folder; whoever next holds the lock of that key removes it.
    """
    entry = root / key
    with _lock(root, key):
        for leftover in root.glob(f"{_BUILD}{key}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if is_complete(entry):
            yield None
            return
        build = Path(tempfile.mkdtemp(prefix=f"{_BUILD}{key}-", dir=root))  # mkdtemp makes it 0700
        try:
            yield build
            _discard(entry, root)
            os.replace(build, entry)
        finally:
            shutil.rmtree(build, ignore_errors=True)


def seal(build: Path, **facts: Any) -> None:
    """Writes the manifest of a filled folder: what it was made from, and every file with its size."""
    files = {str(path.relative_to(build)): path.stat().st_size for path in sorted(build.rglob("*")) if path.is_file()}
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    _write_json(build / MANIFEST, {"format": FORMAT, "created": created, **facts, "files": files})


def list_cache(cache_dir: str | os.PathLike[str] | None = None) -> list[CacheEntry]:
    """The conversions kept in `cache_dir` (default: the user's cache), oldest first; broken ones are marked."""
    entries = []
    for path in cache_root(cache_dir).iterdir():
        if not path.is_dir() or path.name.startswith("."):
            continue
        manifest = _read_json(path / MANIFEST)
        entries.append(
            CacheEntry(
                key=path.name,
                path=path,
                source=str(manifest.get("source", "?")),
                bytes=_folder_bytes(path),
                created=str(manifest.get("created", "?")),
                dtype=str(manifest.get("dtype", "?")),
                transformers=str(manifest.get("transformers", "?")),
                complete=is_complete(path),
            )
        )
    return sorted(entries, key=lambda entry: (entry.created, entry.key))


def clear_cache(cache_dir: str | os.PathLike[str] | None = None, *, key: str | None = None) -> list[CacheEntry]:
    """Removes one conversion (`key`) or all of them, with what killed processes left; returns what was removed.

    A model already loaded keeps working: its file stays on disk until it is closed. A build in progress is left alone.
    """
    root = cache_root(cache_dir)
    removed = [entry for entry in list_cache(cache_dir) if key is None or entry.key == key]
    for entry in removed:
        with _lock(root, entry.key):
            _discard(entry.path, root)
    for leftover in root.glob(f"{_BUILD}*"):
        owner = leftover.name.removeprefix(_BUILD).rpartition("-")[0]
        with contextlib.suppress(TimeoutError), _lock(root, owner, wait=False):
            shutil.rmtree(leftover, ignore_errors=True)
    if key is None:
        (root / _STAT_INDEX).unlink(missing_ok=True)
    return removed


def _lock(root: Path, key: str, wait: bool = True) -> contextlib.AbstractContextManager[Any]:
    import filelock  # huggingface_hub and torch both depend on it

    locks = root / ".locks"
    locks.mkdir(mode=0o700, exist_ok=True)
    return filelock.FileLock(str(locks / f"{key}.lock"), timeout=-1 if wait else 0)


def _discard(entry: Path, root: Path) -> None:
    """Removes an entry so that nobody can find it half-removed."""
    if not entry.exists():
        return
    away = Path(tempfile.mkdtemp(prefix=f"{_BUILD}{entry.name}-", dir=root))
    os.replace(entry, away / "entry")
    shutil.rmtree(away, ignore_errors=True)


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _stat(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of ours; {} if the file is missing, cut short or something else: it is then remade."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes by rename, so that a reader sees the old text or the new one."""
    handle, name = tempfile.mkstemp(prefix=".json-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=1)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
