"""CUDA C++ compiled at run time by NVRTC, with a private cache on disk.

NVRTC and the headers come as pip wheels with torch's CUDA builds; cuda-core finds and calls the compiler. No GPU is
needed to compile. A cached cubin is run on the GPU without another look, so the folder belongs to the user alone
(0700), an entry carries its own checksum, and one that does not match is compiled again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from onegpu.errors import KernelError
from onegpu.kernels import driver

_MAGIC = b"onegpu cubin 1\n"


class Cubin(NamedTuple):
    """Machine code for one architecture, and the (mangled) name of the kernel in it."""

    code: bytes
    name: str


def compile_cubin(
    source: str, name: str, arch: str, constants: Mapping[str, object], options: tuple[str, ...] = (), op: str = ""
) -> Cubin:
    """Compile without any cache.

    Args:
        source: CUDA C++ (C++17).
        name: the kernel: a plain name, or a template instantiation such as ``"rows<4, true>"``.
        arch: such as ``"sm_90a"``.
        constants: macros; a bool becomes 0 or 1.
        options: of ``cuda.core.ProgramOptions``, as ``"name=value"``; a name alone is True.
        op: names the op in errors.

    Raises:
        KernelError: with the compiler's log.
    """
    from cuda.core import Program, ProgramOptions

    macros = [(key, str(int(value) if isinstance(value, bool) else value)) for key, value in constants.items()]
    extra: dict[str, object] = {}
    for option in options:
        key, _, value = option.partition("=")
        extra[key] = int(value) if value.isdigit() else value or True
    try:
        # None for "no such option": an empty list is an error there.
        folders = include_paths() or None
        settings = ProgramOptions(std="c++17", arch=arch, define_macro=macros or None, include_path=folders, **extra)
        made = Program(source, "c++", settings).compile("cubin", name_expressions=(name,))
    except Exception as error:
        raise KernelError(f"{op or name}: NVRTC cannot compile {name} for {arch}: {error}") from error
    return Cubin(bytes(made.code), made.symbol_mapping[name].decode())


@lru_cache(maxsize=1)
def include_paths() -> list[str]:
    """Where cuda_fp16.h and its like are: the toolkit's wheel, else the copy that Triton brings."""
    from importlib.util import find_spec

    from cuda.pathfinder import find_nvidia_header_directory

    found = find_nvidia_header_directory("cudart")
    if found and (Path(found) / "cuda_fp16.h").is_file():
        return [found]
    triton = find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        folder = Path(triton.submodule_search_locations[0], "backends", "nvidia", "include")
        if (folder / "cuda_fp16.h").is_file():
            return [str(folder)]
    return []


@lru_cache(maxsize=1)
def compiler_version() -> str:
    """Of NVRTC, such as ``"13.0"``, with cuda-core's own."""
    import cuda.core
    from cuda.bindings import nvrtc

    error, major, minor = nvrtc.nvrtcVersion()
    if int(error) != 0:
        raise KernelError(f"NVRTC does not tell its version ({error})")
    return f"{major}.{minor} {cuda.core.__version__}"


def cached_cubin(
    source: str,
    name: str,
    arch: str,
    constants: Mapping[str, object],
    options: tuple[str, ...] = (),
    op: str = "",
    folder: Path | None = None,
) -> Cubin:
    """As `compile_cubin`, from the cache on disk where it has the entry; `folder` replaces the user's cache."""
    parts = (source, name, arch, sorted(constants.items()), options, compiler_version(), driver.driver_version())
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    place = private_folder(folder or cache_folder())
    if place is not None:
        found = _read(place / f"{key}.cubin")
        if found is not None:
            return found
    made = compile_cubin(source, name, arch, constants, options, op)
    if place is not None:
        _write(place / f"{key}.cubin", made)
    return made


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


def _read(path: Path) -> Cubin | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    magic, digest, body = content[: len(_MAGIC)], content[len(_MAGIC) :][:32], content[len(_MAGIC) + 32 :]
    if magic != _MAGIC or hashlib.sha256(body).digest() != digest:
        return None
    name, _, code = body.partition(b"\n")
    return Cubin(code, name.decode())


def _write(path: Path, cubin: Cubin) -> None:
    body = cubin.name.encode() + b"\n" + cubin.code
    with contextlib.suppress(OSError):  # a full disk
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")  # 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(body).digest() + body)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
