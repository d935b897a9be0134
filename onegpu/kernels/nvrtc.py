"""CUDA C++ compiled at run time by NVRTC, and kept on disk (`disk_cache.py`).

NVRTC and the headers come as pip wheels with torch's CUDA builds; cuda-core finds and calls the compiler. No GPU is
needed to compile.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from onegpu.errors import KernelError
from onegpu.kernels import disk_cache, driver


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

    def make() -> tuple[str, bytes]:
        made = compile_cubin(source, name, arch, constants, options, op)
        return made.name, made.code

    found, code = disk_cache.cached(parts, make, folder)
    return Cubin(code, found)
