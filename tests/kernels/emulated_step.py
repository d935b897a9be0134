"""The step's kernels on the CPU: what `CudaKernel` is on a GPU, behind emulator_step.h."""

from __future__ import annotations

import atexit
import ctypes
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from onegpu.kernels import decode_step, decode_step_cuda

SMS = 3
_TYPES = {"i": ctypes.c_int, "q": ctypes.c_longlong, "f": ctypes.c_float}


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the ops of decode_step.py run their kernels, on CPU tensors, on a GPU of three multiprocessors."""
    if shutil.which("g++") is None:
        pytest.skip("the emulator is compiled with g++")
    monkeypatch.setattr(decode_step, "_on_gpu", lambda _: True)
    monkeypatch.setattr(decode_step_cuda, "_kernel", Emulated)
    monkeypatch.setattr(decode_step_cuda, "multiprocessors", lambda _: SMS)


class Emulated:
    """A kernel by its kind, as decode_step_cuda.py launches it."""

    def __init__(self, kind: str, constants: tuple[tuple[str, int], ...] = ()) -> None:
        self.kind, self.constants = kind, constants

    def variant(self, name: None, **constants: int) -> Emulated:
        return Emulated(self.kind, tuple(constants.items()))

    def __call__(
        self, grid: tuple[int], block: int, shared: int, *args: Any, pdl: bool, cluster: tuple[int, ...] = (1,)
    ) -> None:
        assert all(arg is None or arg.is_contiguous() for arg in args if not isinstance(arg, int | float))
        name, letters = decode_step_cuda._KERNELS[self.kind]
        run(
            decode_step_cuda.source(self.kind),
            name,
            letters,
            self.constants,
            (grid[0], block, cluster[0], shared),
            args,
        )


def run(
    source: str,
    name: str,
    letters: str,
    constants: tuple[tuple[str, int], ...],
    launch: tuple[int, ...],
    args: tuple[Any, ...],
) -> None:
    """launch: blocks, threads of one, blocks of a cluster, bytes of shared memory."""
    values: list[Any] = []
    for letter, arg in zip(letters, args, strict=True):
        if letter == "P":
            values.append(ctypes.c_void_p(None if arg is None else arg.data_ptr()))
        else:
            values.append(_TYPES[letter](arg))
    _library(source, name, constants).emulate(*launch[:3], ctypes.c_long(launch[3]), *values)


_COMPILE = ("g++", "-std=c++20", "-O1", "-w", "-fPIC")


@cache
def _header() -> Path:
    """The emulator, compiled once for all kernels."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = folder / "emulator.h"
    made.write_text(f'#include "{Path(__file__).parent}/emulator_step.h"\n')
    subprocess.run([*_COMPILE, "-x", "c++-header", "-o", f"{made}.gch", made], check=True)
    return made


@cache
def _library(text: str, name: str, constants: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp())
    found = re.search(rf"\n{name}\(([^)]*)\)", text)
    assert found is not None
    names = ", ".join(re.findall(r"(\w+)(?:,|$)", found[1]))
    head = "".join(f"#define {key} {value}\n" for key, value in constants)
    whole = f'#include "{_header()}"\n{head}' + text
    whole += f'extern "C" void emulate(int grid, int block, int cluster, long shared, {found[1]}) '
    whole += f"{{ run_grid(grid, block, cluster, shared, [=] {{ {name}({names}); }}); }}"
    (folder / "kernel.cpp").write_text(whole)
    subprocess.run([*_COMPILE, "-shared", "-o", folder / "kernel.so", folder / "kernel.cpp"], check=True)
    library = ctypes.CDLL(f"{folder}/kernel.so")
    shutil.rmtree(folder)
    return library


def on(device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors of a test go whose device is "emulated" or a real one."""
    if device == "emulated":
        emulate(monkeypatch)
        return "cpu"
    return device


DEVICES = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
__all__ = ["DEVICES", "emulate", "on", "torch"]
