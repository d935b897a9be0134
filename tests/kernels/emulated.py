"""Runs the text of a few-row kernel on the CPU: compiled by g++ behind emulator.h, which makes threads fibers."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from onegpu.kernels import few_rows
from onegpu.kernels.few_rows_stream import Stream
from onegpu.kernels.few_rows_table import Config
from onegpu.kernels.launch import source_text

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")
_CALL = """
extern "C" void emulate(int grid, long shared, const u8* w, const u16* x, u16* y, const u16* bias, const void* absmax,
                        const float* nested, const float* map, const float* offset, int m, int n, int k, int shift,
                        int nested_shift, int box) {
  run_grid(grid, THREADS, CL, shared,
           [=] { few_rows(w, x, y, bias, absmax, nested, map, offset, m, n, k, shift, nested_shift X_MAP); });
}
"""


@functools.cache
def _library(source: str, constants: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    text = "".join(f"#define {name} {value}\n" for name, value in constants)
    text += (Path(__file__).parent / "emulator.h").read_text()
    text += "".join(map(source_text, ("few_rows_common.cu", "few_rows_parts.cu", source)))
    folder = Path(tempfile.mkdtemp())
    w_map = "XMap{(const u16*)w, box, n, FMT == 1 ? k : k / 2, BOX}"
    x_map = f", XMap{{x, ROWS, m, k}}, {w_map}, box" if source == Stream.source else ""
    (folder / "kernel.cpp").write_text(text + _CALL.replace(" X_MAP", x_map))
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-o", "kernel.so", "kernel.cpp"]
    subprocess.run(command, check=True, cwd=folder)
    library = ctypes.CDLL(str(folder / "kernel.so"))
    shutil.rmtree(folder)
    return library


def product(
    config: Config,
    fmt: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    n: int,
    bias: torch.Tensor,
    scales: torch.Tensor | None,
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    blocksize: int = 64,
    quant_type: str = "nf4",
    clusters: int = 2,
    out: torch.Tensor | None = None,
    more: dict[str, int] | None = None,
) -> torch.Tensor:
    """As `few_rows.launch`, with the configuration given, on `clusters` clusters. more: macros besides; out: for y."""
    (m, k), half = x.shape, blocksize == 32
    quantised = 0 if nested is None else 2 if blocksize == 64 and k % 256 == 0 else 1
    kernel = few_rows.kernel(config, fmt, x.dtype == torch.bfloat16, quant_type == "fp4", quantised, half)
    found = few_rows.fits(config, fmt, quantised, m, n, k, half, clusters * config.cluster, 227 * 1024)
    assert found is not None, "this configuration does not fit"
    library = _library(config.source, tuple({**kernel._constants, **(more or {})}.items()))
    y = torch.full((m, n), float("nan"), dtype=x.dtype) if out is None else out
    absmax, table, offset = nested or (None, None, None)
    tensors = (weight, x, y, bias, scales, absmax, table, offset)
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    shift = (blocksize // (32 if half else 64)).bit_length() - 1
    _, box, _ = few_rows.boxes_of(config, fmt, n, found[0]) or (0, 0, 0)
    library.emulate(found[0] * config.cluster, ctypes.c_long(found[1]), *pointers, m, n, k, shift, 8, box)
    return y
