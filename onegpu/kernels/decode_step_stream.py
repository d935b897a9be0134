"""Products of 9 to 16 rows in a decoding step that few_rows_stream.cu computes: of a 16-bit x, added to the stream.

Its warps wait for what comes, not for one another, and wgmma reads x once for 64 rows of W: an H100 takes 70 to 80 %
of decode_step_product.cu's time (docs/worklog.md). Weights do not change during a step, so they fill the ring early.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from onegpu.kernels import few_rows
from onegpu.kernels.decode_step import Attended, Matrix
from onegpu.kernels.decode_step import Stream as Residual
from onegpu.kernels.decode_step_layouts import ALONE
from onegpu.kernels.few_rows_stream import Stream
from onegpu.kernels.few_rows_table import Config
from onegpu.kernels.launch import CudaKernel

ROWS = (9, 16)
# The first that serves is taken, with as long a ring as fits. Blocks of one tile: a cluster of two shares the columns.
CONFIGURATIONS = (Stream(2, 4, 2, 256, 4, 2), Stream(2, 12, 1, 256, 3, 2))


class Plan(NamedTuple):
    """How a product is launched."""

    kernel: CudaKernel
    config: Config
    clusters: int
    shared: int
    x: torch.Tensor


def plan(x: Residual | Attended | torch.Tensor, matrix: Matrix, sink: str, rows: int) -> Plan | None:
    """The launch of a product, or None where decode_step_product.cu has to serve it."""
    if isinstance(x, Attended):
        if x.values.shape[2] != 1:  # parts to be put together
            return None
        x = x.values.view(rows, -1)
    if not isinstance(x, torch.Tensor) or not x.is_cuda or sink != "add" or not ROWS[0] <= rows <= ROWS[1]:
        return None
    part, fmt = matrix.parts[0], {"nf4": "4bit", "fp4": "4bit"}.get(matrix.format, matrix.format)
    if matrix.transposed or len(matrix.parts) > 1 or fmt == "16bit" or part.scales is None or matrix.columns % 64:
        return None
    if (x.data_ptr() | part.weight.data_ptr()) % 16:
        return None
    nested = 0 if part.nested is None else 2 if matrix.blocksize == 64 and matrix.columns % 256 == 0 else 1
    if nested == 2 and part.scales.data_ptr() % 4:
        nested = 1
    found = _plan(
        fmt, x.dtype == torch.bfloat16, matrix.format == "fp4", nested, rows, matrix.rows, matrix.columns,
        matrix.blocksize, x.get_device(),
    )  # fmt: skip
    return None if found is None else Plan(*found, x)


@lru_cache(maxsize=1024)
def _plan(
    fmt: str, bf16: bool, fp4: bool, nested: int, m: int, n: int, k: int, blocksize: int, device: int
) -> tuple[CudaKernel, Config, int, int] | None:
    properties = torch.cuda.get_device_properties(device)
    if properties.major != 9:
        return None
    limit = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    sms, half = properties.multi_processor_count, blocksize == 32
    for config in CONFIGURATIONS:
        found = few_rows.fitting(config, fmt, nested, m, n, k, half, sms, limit)
        if found is not None:
            fitted, clusters, shared = found
            kernel = few_rows.kernel(fitted, fmt, bf16, fp4, nested, half).variant(None, ADDS=1, STAY=1)
            return kernel, fitted, clusters, max(shared, ALONE)
    return None


def launch(found: Plan, matrix: Matrix, out: torch.Tensor, table: torch.Tensor | None, pdl: bool) -> None:
    """out, float32 ``[rows, N]``, has the product added. table: the values of quantised scales' codes."""
    config, part = found.config, matrix.parts[0]
    fmt, half = "int8" if matrix.format == "int8" else "4bit", matrix.blocksize == 32
    boxes = few_rows.boxes_of(config, fmt, matrix.rows, found.clusters)
    assert boxes is not None
    shift = 0 if fmt == "int8" else (matrix.blocksize // (32 if half else 64)).bit_length() - 1
    address = found.x.data_ptr(), part.weight.data_ptr()
    found.kernel(
        (found.clusters * config.cluster,), config.threads, found.shared, part.weight, found.x, out, part.bias,
        part.scales, part.nested, table, part.offset, len(out), matrix.rows, matrix.columns, shift, 8,
        *few_rows.maps(fmt, *address, len(out), matrix.rows, matrix.columns, boxes), pdl=pdl,
        cluster=(config.cluster, 1, 1),
    )  # fmt: skip
