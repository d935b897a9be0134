"""Compiled kernels on disk, those of NVRTC and those of Triton, in one private folder.

Machine code from there is run on the GPU without another look, so the folder belongs to the user alone (0700), an entry
carries its own checksum, and one that does not match is compiled again. Nothing is ever removed from it: an entry of
another compiler, driver or source is not found again, and the whole folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_MAGIC = b"onegpu cubin 1\n"


def cached(
    key: tuple[object, ...], make: Callable[[], tuple[str, bytes]], folder: Path | None = None
) -> tuple[str, bytes]:  # fmt: skip
    """A line of text and the machine code that it tells of.

    Args:
        key: all that decides them, of parts whose `repr` is the same in every process.
        make: compiles, where there is no sound entry. What it gives is written down.
        folder: replaces the user's cache.
    """
    place = private_folder(folder or cache_folder())
    if place is None:
        return make()
    path = place / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.cubin"
    found = _read(path)
    if found is None:
        found = make()
        _write(path, *found)
    return found


def cache_folder() -> Path:
    """Of the user: ``~/.cache/onegpu/cubins``."""
    return Path.home() / ".cache" / "onegpu" / "cubins"


def private_folder(folder: Path) -> Path | None:
    """The folder, made if need be, if it is the user's own and nobody else's to write; None where it cannot be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if sys.platform == "win32":
            return folder  # a profile folder is private there
        found = os.stat(folder, follow_symlinks=False)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return None
        if found.st_mode & 0o077:
            os.chmod(folder, 0o700)
    except OSError:
        return None  # no home, a read-only disk: everything works but for the seconds of the next start
    return folder


def _read(path: Path) -> tuple[str, bytes] | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    magic, digest, body = content[: len(_MAGIC)], content[len(_MAGIC) :][:32], content[len(_MAGIC) + 32 :]
    if magic != _MAGIC or hashlib.sha256(body).digest() != digest:
        return None
    line, _, code = body.partition(b"\n")
    return line.decode(), code


def _write(path: Path, line: str, code: bytes) -> None:
    body = line.encode() + b"\n" + code
    with contextlib.suppress(OSError):  # a full disk
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")  # 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(body).digest() + body)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
