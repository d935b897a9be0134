"""Launches the few-row products of few_rows_*.cu: ``y[M, N] = x[M, K] @ W[N, K].T + bias``.

W is read once, as it is stored (4-bit, int8 or 16-bit), so the bound is its bytes. `direct`, `narrow` and `resident`
hold x in shared memory and serve up to 8, 8 and 16 rows, `held` in registers and up to 8 of 4 bits; `stream` (Hopper)
and `wide` stream it and serve up to 64 and 128. All want whole groups of columns and 16-byte alignment: where a product
has them not, `supports` says so, and the op takes its portable kernel or the dequantised product.
"""

from __future__ import annotations

from functools import lru_cache, partial
from importlib.util import find_spec
from typing import NamedTuple

import torch

from onegpu.kernels import ahead
from onegpu.kernels.few_rows_held import Held
from onegpu.kernels.few_rows_stream import Stream
from onegpu.kernels.few_rows_table import CONFIGURATIONS, Config, Wide, ceil_div, resident_clusters
from onegpu.kernels.guard import architecture
from onegpu.kernels.launch import CudaKernel, source_text
from onegpu.kernels.tensor_map import byte_map, words_map

FORMATS = {"16bit": 0, "int8": 1, "4bit": 2}
MAX_ROWS = {"16bit": 8, "int8": 128, "4bit": 128}
PORTABLE_ROWS = 16  # of linear_few_rows_triton.py, which serves what these kernels do not
_COLUMNS = {"16bit": 8, "int8": 16, "4bit": 64}  # K must be a multiple: 16 bytes of a row, or a block of scales


_STATIC = 1024  # shared memory that the kernels declare themselves, and what the driver keeps, at most


class Plan(NamedTuple):
    """One launch: the kernel, its grid, threads, shared memory and cluster."""

    kernel: CudaKernel
    grid: tuple[int]
    threads: int
    shared: int
    cluster: tuple[int, int, int]
    early: bool
    boxes: tuple[int, int, int] | None  # of bulk copies: rows of x; rows of W and bytes of each


def fits(
    config: Config, fmt: str, nested: int, m: int, n: int, k: int, half: bool, sms: int, limit: int
) -> tuple[int, int] | None:
    """(clusters, bytes of shared memory) of a launch with this configuration, or None where it cannot serve.

    nested: 0 plain scales, 1 quantised, 2 so that a piece of a row has its codes in one word. half: scales for 32
    columns. sms, limit: multiprocessors, and bytes of shared memory that a block may have.
    """
    if m > config.rows or (half and not isinstance(config, (Wide, Stream))):
        return None
    pieces = ceil_div(k, config.piece(fmt))
    if (config.cluster - 1) * ceil_div(pieces, config.cluster) >= pieces:
        return None  # a block would have no columns
    clusters = min(resident_clusters(sms, config.cluster), n)
    if isinstance(config, Held) and not config.serves(nested, n, k, clusters):
        return None
    if isinstance(config, Stream) and not config.serves(fmt, nested, n, clusters, half):
        return None
    shared = config.shared(fmt, nested, n, k, clusters, half)
    if config.blocks == 1:
        return (clusters, shared) if shared + _STATIC <= limit else None
    driver = 1024  # bytes of each block
    if shared + driver > (limit + driver) // config.blocks:
        return None
    return clusters, max(shared, (limit + driver) // (config.blocks + 1))  # one more would not be on a free one


def fitting(
    config: Config, fmt: str, nested: int, m: int, n: int, k: int, half: bool, sms: int, limit: int
) -> tuple[Config, int, int] | None:
    """The configuration with as long a ring as has room, its clusters and its bytes; arguments as of `fits`."""
    found = fits(config, fmt, nested, m, n, k, half, sms, limit)
    while found is None and config.depth > 2:  # more scales than usual, less memory
        config = config.shorter()
        found = fits(config, fmt, nested, m, n, k, half, sms, limit)
    return None if found is None else (config, *found)


def choose(
    fmt: str, nested: int, m: int, n: int, k: int, half: bool, sms: int, limit: int, major: int
) -> tuple[Config, int, int] | None:
    """The configuration for a product, with its clusters and its bytes of shared memory; arguments as those of `fits`.

    major: compute capability. None where no configuration serves it.
    """
    best: tuple[Config, int, int] | None = None
    least = (MAX_ROWS[fmt] + 1, 0.0)
    for config in CONFIGURATIONS[fmt]:
        if (config.cluster > 1 and major < 9) or (getattr(config, "wgmma", False) and major != 9):
            continue
        if isinstance(config, Held):
            config = config.whole(nested, n, k, min(resident_clusters(sms, config.cluster), n))
        found = fitting(config, fmt, nested, m, n, k, half, sms, limit)
        if found is None:
            continue
        config, clusters, _ = found
        rows = ceil_div(ceil_div(n, clusters), config.tile) * config.tile
        if not config.share[0] <= rows * k / config.cluster <= config.share[1]:
            continue
        cost = config.price * (config.nested if nested else 1) * rows / config.cluster
        rank = (max(config.rows, 2), cost)  # two rows cost what one does
        if rank < least:
            best, least = found, rank
    return best


@lru_cache(maxsize=4096)
def plan(fmt: str, m: int, n: int, k: int, bf16: bool, fp4: bool, nested: int, half: bool, device: int) -> Plan | None:
    """The launch for a product, or None where no configuration serves it."""
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return None
    limit = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    found = choose(fmt, nested, m, n, k, half, properties.multi_processor_count, limit, properties.major)
    if found is None:
        return None
    config, clusters, shared = found
    made = kernel(config, fmt, bf16, fp4, nested, half)
    early = config.early > 0 and properties.major >= 9  # before that, kernels start one after the other
    boxes = boxes_of(config, fmt, n, clusters)
    return Plan(made, (clusters * config.cluster,), config.threads, shared, (config.cluster, 1, 1), early, boxes)


def boxes_of(config: Config, fmt: str, n: int, clusters: int) -> tuple[int, int, int] | None:
    """What a bulk copy moves: rows of x, of 64 columns each; rows of W, and bytes of each. None: there is none."""
    if not isinstance(config, Stream):
        return None
    return config.rows, config.box(n, clusters), min(config.columns // (1 if fmt == "int8" else 2), 128)


@lru_cache(maxsize=4)
def _kernel(source: str, bulk: bool) -> CudaKernel:
    text = "".join(map(source_text, ("few_rows_common.cu", "few_rows_parts.cu", source)))
    return CudaKernel("few_rows", text, "few_rows", "PPPPPPPPiiiii" + "TTi" * bulk)


def kernel(config: Config, fmt: str, bf16: bool, fp4: bool, nested: int, half: bool) -> CudaKernel:
    """The kernel of a configuration, not yet compiled."""
    constants = {"FMT": FORMATS[fmt], "BF16": int(bf16), "FP4": int(fp4), "NESTED": min(int(nested), config.packs)}
    return _kernel(config.source, isinstance(config, Stream)).variant(None, **constants, **config.constants(half))


@lru_cache(maxsize=4096)
def maps(
    fmt: str, x: int, weight: int, m: int, n: int, k: int, boxes: tuple[int, int, int]
) -> tuple[bytes, bytes, int]:
    """The last arguments of a kernel with bulk copies: where x is, where the bytes of W are, rows of W in a box.

    x, weight: addresses. Depends on them, shape and box alone: what has moved gets descriptors of its own.
    """
    rows, box, width = boxes
    row_bytes = k if fmt == "int8" else k // 2
    return words_map(x, m, k, (rows, 64), 128), byte_map(weight, n, row_bytes, (box, width), width), box


def supports(fmt: str, x: torch.Tensor, weight: torch.Tensor, k: int, blocksize: int = 64) -> bool:
    """Whether the kernels can multiply these: 16-bit x ``[M, K]`` of 1 to MAX_ROWS rows, all aligned.

    Both are contiguous, so that with the first element all rows, of whole 16 bytes, are.
    """
    return (
        0 < x.shape[0] <= MAX_ROWS[fmt]
        and x.dtype != torch.float32
        and k > 0
        and k % _COLUMNS[fmt] == 0
        and blocksize >= 32
        and not (x.data_ptr() | weight.data_ptr()) & 15
        and _compiles()
    )


@lru_cache(maxsize=1)
def _compiles() -> bool:
    return find_spec("cuda") is not None


def _nested(nested: bool, k: int, blocksize: int, nested_blocksize: int) -> int:
    """0 plain scales, 1 quantised, 2 so that a piece of a row has its codes in one word."""
    return 0 if not nested else 2 if blocksize == 64 and k % 256 == 0 and nested_blocksize >= 4 else 1


def jobs(
    fmt: str, rows: int, device: torch.device, dtype: torch.dtype, n: int, k: int, blocksize: int = 64,
    quant_type: str = "nf4", nested: bool = False, bias: bool = False,
) -> list[ahead.Job]:  # fmt: skip
    """What a product of so many rows compiles, found without memory to try it on. Arguments as of the op's warm-up."""
    serves = 0 < rows <= MAX_ROWS[fmt] and k % _COLUMNS[fmt] == 0 and blocksize >= 32 and dtype != torch.float32
    if not serves or not _compiles():
        return []
    index = torch.cuda.current_device() if device.index is None else device.index
    bf16, quantised, half = dtype == torch.bfloat16, _nested(nested, k, blocksize, 256), blocksize == 32
    found = plan(fmt, rows, n, k, bf16, quant_type == "fp4", quantised, half, index)
    return [] if found is None else [partial(found.kernel.compile_ahead, architecture(index))]


def launch(
    fmt: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    n: int,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None = None,
    *,
    blocksize: int = 64,
    quant_type: str = "nf4",
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    nested_blocksize: int = 256,
) -> torch.Tensor | None:
    """One product, or None where no configuration serves it. The caller has asked `supports`.

    Args:
        fmt: "4bit", "int8" or "16bit".
        x: contiguous float16 or bfloat16 ``[M, K]``.
        weight: contiguous; as stored.
        n: rows of W.
        bias: ``[N]`` in the dtype of x, contiguous, or None.
        scales: 4-bit: float32 absmax of each block, or its uint8 codes where `nested` is given; int8: float32 SCB.
        nested: float32 absmax of the codes, their 256 values, and the offset.
    """
    m, k = x.shape
    half, device = blocksize == 32, x.get_device()
    quantised = _nested(nested is not None, k, blocksize, nested_blocksize)
    if quantised == 2 and scales is not None and scales.data_ptr() % 4:
        quantised = 1
    found = plan(fmt, m, n, k, x.dtype == torch.bfloat16, quant_type == "fp4", quantised, half, device)
    if found is None:
        return None
    y = x.new_empty((m, n))
    absmax, table, offset = nested or (None, None, None)
    shift = 0 if fmt != "4bit" else (blocksize // (32 if half else 64)).bit_length() - 1
    bulk = maps(fmt, x.data_ptr(), weight.data_ptr(), m, n, k, found.boxes) if found.boxes else ()
    found.kernel(
        found.grid, found.threads, found.shared, weight, x, y, bias, scales, absmax, table, offset, m, n, k, shift,
        nested_blocksize.bit_length() - 1, *bulk, pdl=found.early, cluster=found.cluster,
    )  # fmt: skip
    return y
