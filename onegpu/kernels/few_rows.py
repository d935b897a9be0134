"""Launches the few-row products of few_rows_narrow.cu and few_rows_wide.cu: ``y[M, N] = x[M, K] @ W[N, K].T + bias``.

W is read once, as it is stored (4-bit, int8 or 16-bit), so the bound is its bytes. `narrow` holds x in shared memory
and serves up to 16 rows, `wide` streams it and serves up to 128. Both want whole groups of columns and 16-byte
alignment: where a product has them not, `supports` says so, and the op takes its portable kernel or the dequantised
product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import ClassVar, NamedTuple

import torch

from onegpu.kernels.guard import aligned
from onegpu.kernels.launch import CudaKernel, source_text, tensor_map

FORMATS = {"16bit": 0, "int8": 1, "4bit": 2}
MAX_ROWS = {"16bit": 8, "int8": 128, "4bit": 128}
PORTABLE_ROWS = 16  # of linear_few_rows_triton.py, which serves what these kernels do not
_COLUMNS = {"16bit": 8, "int8": 16, "4bit": 64}  # K must be a multiple: 16 bytes of a row, or a block of scales


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Narrow:
    """Configuration of few_rows_narrow.cu.

    rows: of x that fit. width: bytes of a row of W in a piece. slots: of a warp's ring. tiles: of 16 rows between two
    meetings of the warps. cluster: blocks that share the columns. table_shift: 7 makes the look-up table of 4-bit
    products half as large and its look-ups a little slower. prefetch: bytes around a copy that L2 reads along (0, 256).
    early: pieces of each warp that are sent for into L2 before the kernel in front has ended (0: this one
    starts when that has ended; compute capability 9.0). price: time of a row of a tile (filled or not), over that of
    the others with as many rows.
    """

    rows: int
    warps: int
    slots: int
    width: int
    tiles: int
    cluster: int = 1
    table_shift: int = 8
    prefetch: int = 0
    early: int = 0
    price: float = 1.0

    source: ClassVar[str] = "few_rows_narrow.cu"
    tile: ClassVar[int] = 16
    depth: ClassVar[int] = 0

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def shorter(self) -> Narrow:
        raise AssertionError("a ring of this depth is not shortened")

    def piece(self, fmt: str) -> int:
        """Columns of a piece, the unit that the blocks of a cluster share out."""
        return self.width // 2 if fmt == "16bit" else self.width if fmt == "int8" else 2 * self.width

    def shared(self, fmt: str, nested: bool, n: int, k: int, clusters: int, half: bool) -> int:
        """Bytes of shared memory; the kernel lays it out in this order."""
        columns, four = self.piece(fmt), fmt == "4bit"
        share = _ceil(_ceil(k, columns), self.cluster)
        pitch = _ceil(share * columns * 2, 128) * 128 + (64 if fmt == "16bit" else 16)
        sums = self.tiles * self.warps * 16 * self.rows * 4
        slot = 16 * self.width + (columns * (1 + nested) if four else 0)
        total = (256 << self.table_shift) + 1024 * nested if four else 0
        total += self.rows * pitch + (0 if four and self.table_shift == 8 else sums) + self.warps * self.slots * slot
        if self.cluster > 1:
            total += _ceil(_ceil(n, clusters), 16) * 64 * self.rows
        return total

    def constants(self, half: bool) -> dict[str, int]:
        names = {"MP": self.rows, "WARPS": self.warps, "SLOTS": self.slots, "CB": self.width, "TG": self.tiles}
        return {**names, "CL": self.cluster, "TABLE_SHIFT": self.table_shift, "L2B": self.prefetch, "EARLY": self.early}


@dataclass(frozen=True)
class Wide:
    """Configuration of few_rows_wide.cu: a tile is 16 * row_tiles * warps_n rows of W, a stage has `columns` of it.

    eights: rows of x, in eights. warps_n x warps_k warps share the rows and the columns. stages: of the ring.
    wgmma: Hopper only. bulk: its engine for bulk copies brings x. early: as Narrow's, in stages. price: as Narrow's.
    """

    eights: int
    row_tiles: int
    warps_n: int
    warps_k: int
    columns: int
    stages: int
    cluster: int = 1
    table_shift: int = 8
    wgmma: bool = False
    price: float = 1.0
    bulk: bool = False
    early: int = 0

    source: ClassVar[str] = "few_rows_wide.cu"

    @property
    def rows(self) -> int:
        return 8 * self.eights

    @property
    def threads(self) -> int:
        return 32 * self.warps_n * self.warps_k

    @property
    def depth(self) -> int:
        """Of the ring."""
        return self.stages

    def shorter(self) -> Wide:
        """With a ring shorter by one."""
        return replace(self, stages=self.stages - 1)

    def piece(self, fmt: str) -> int:
        return self.columns

    def shared(self, fmt: str, nested: bool, n: int, k: int, clusters: int, half: bool) -> int:
        tile, four = self.tile, fmt == "4bit"
        scales = tile * self.columns // (32 if half else 64) * 4 * (1 + nested) if four else 0
        gap, unit = (0, 1024) if self.wgmma else (16, 16)
        stage = tile * self.columns // (2 if four else 1) + self.rows * (self.columns * 2 + gap) + scales
        total = (256 << self.table_shift) + 1024 * nested if four else 0
        if not (self.wgmma and self.warps_k == self.cluster == 1):
            total += _ceil(self.rows * (tile + 4) * 4, unit) * unit
        return total + self.stages * _ceil(stage, unit) * unit + 8 * self.stages * self.bulk

    @property
    def tile(self) -> int:
        """Rows of W that are multiplied at once."""
        return 16 * self.row_tiles * self.warps_n

    def constants(self, half: bool) -> dict[str, int]:
        names = {"NT": self.eights, "RT": self.row_tiles, "WN": self.warps_n, "WK": self.warps_k, "KC": self.columns}
        return {**names, "STAGES": self.stages, "CL": self.cluster, "TABLE_SHIFT": self.table_shift,
                "HALF_BLOCK": int(half), "WGMMA": int(self.wgmma), "XT": int(self.bulk),
                "EARLY": self.early}  # fmt: skip


@dataclass(frozen=True)
class Resident:
    """Configuration of few_rows_resident.cu (Hopper): as Wide with wgmma, but x stays in shared memory.

    eights: rows of x, in eights (1, 2, 4, 8). warps_n x warps_k groups of four warps share the rows and the columns.
    width, slots, early, price: as Narrow's.
    """

    eights: int
    warps_n: int
    warps_k: int
    width: int
    slots: int
    cluster: int = 1
    table_shift: int = 8
    early: int = 0
    price: float = 1.0

    source: ClassVar[str] = "few_rows_resident.cu"
    wgmma: ClassVar[bool] = True

    @property
    def rows(self) -> int:
        return 8 * self.eights

    @property
    def tile(self) -> int:
        """Rows of W between two meetings of the blocks of a cluster."""
        return 64 * self.warps_n

    @property
    def threads(self) -> int:
        return 128 * self.warps_n * self.warps_k

    @property
    def depth(self) -> int:
        """Of the ring."""
        return self.slots

    def shorter(self) -> Resident:
        """With a ring shorter by one."""
        return replace(self, slots=self.slots - 1)

    def piece(self, fmt: str) -> int:
        return self.width if fmt == "int8" else 2 * self.width

    def shared(self, fmt: str, nested: bool, n: int, k: int, clusters: int, half: bool) -> int:
        columns, four, warps = self.piece(fmt), fmt == "4bit", self.threads // 32
        total = (256 << self.table_shift if four else 0) + 256 + 1024 * nested
        total += _ceil(_ceil(k, columns), self.cluster) * columns * 2 * self.rows
        sums, meets = self.rows * (self.tile + 4), self.warps_k * self.cluster > 1
        if meets and not (four and self.table_shift == 8 and sums <= 8192):
            total += _ceil(sums, 32) * 128
        return total + warps * self.slots * (16 * self.width + (columns * (1 + nested) if four else 0))

    def constants(self, half: bool) -> dict[str, int]:
        names = {"NT": self.eights, "WN": self.warps_n, "WK": self.warps_k, "CB": self.width, "SLOTS": self.slots}
        return {**names, "CL": self.cluster, "TABLE_SHIFT": self.table_shift, "WGMMA": 1, "EARLY": self.early}


Config = Narrow | Wide | Resident

# By format. Of those that fit and have the fewest rows the cheapest is taken, by price times rows of W with padding.
# What a sweep on an H100 found fastest (docs/worklog.md); those of price 9 are for GPUs before it.
_CONFIGURATIONS: dict[str, tuple[Config, ...]] = {
    "16bit": (
        Narrow(1, 16, 3, 128, 12, prefetch=256), Narrow(2, 16, 2, 128, 8), Narrow(4, 16, 2, 128, 4),
        Narrow(4, 16, 2, 64, 2), Narrow(8, 16, 3, 128, 2), Narrow(8, 16, 3, 128, 2, cluster=2, price=1.2),
        Narrow(8, 16, 2, 64, 1, cluster=4, price=1.2),
        Narrow(1, 8, 2, 64, 4), Narrow(2, 8, 2, 64, 2), Narrow(4, 8, 2, 64, 1), Narrow(8, 8, 2, 64, 1),
    ),
    "int8": (
        Narrow(1, 16, 2, 128, 12), Narrow(2, 16, 2, 128, 8), Narrow(4, 16, 2, 128, 4), Narrow(4, 16, 2, 64, 2),
        Narrow(8, 16, 2, 128, 2), Narrow(8, 16, 3, 128, 2, cluster=2, price=1.2), Narrow(16, 16, 3, 64, 1),
        Narrow(1, 8, 2, 64, 4),
        Wide(1, 1, 12, 1, 128, 6, cluster=2, wgmma=True, price=1.44), Wide(1, 1, 12, 1, 128, 6, wgmma=True, price=1.17),
        Wide(1, 1, 4, 2, 128, 5, cluster=2, price=2.47), Wide(1, 1, 4, 2, 128, 3, price=9),
        Wide(2, 1, 16, 1, 128, 5, cluster=2, wgmma=True, price=1.16), Wide(2, 1, 12, 1, 128, 6, wgmma=True, price=1.25),
        Wide(2, 1, 4, 2, 128, 5, cluster=2, price=2.93), Wide(2, 1, 4, 2, 128, 3, price=9),
        Wide(4, 1, 12, 1, 128, 6, cluster=2, wgmma=True, price=1.42), Wide(4, 1, 12, 1, 128, 6, wgmma=True, price=1.17),
        Wide(4, 1, 4, 2, 128, 5, cluster=2, price=2.61), Wide(4, 1, 4, 2, 128, 3, price=9),
        Wide(8, 1, 12, 1, 128, 4, cluster=2, wgmma=True, price=1.41), Wide(8, 1, 12, 1, 128, 5, wgmma=True, price=1.17),
        Wide(8, 1, 12, 1, 128, 4, cluster=4, wgmma=True, price=1.77), Wide(8, 1, 4, 1, 64, 3, price=9),
        Wide(16, 1, 12, 1, 128, 2, cluster=2, wgmma=True, price=1.47),
        Wide(16, 1, 12, 1, 128, 4, wgmma=True, price=1.25),
        Wide(16, 1, 12, 1, 128, 2, cluster=4, wgmma=True, price=1.85), Wide(16, 1, 4, 1, 64, 2, price=9),
    ),
    "4bit": (
        Narrow(1, 16, 2, 128, 12), Narrow(2, 16, 2, 128, 8), Narrow(4, 16, 2, 128, 6), Narrow(4, 16, 3, 64, 6),
        Narrow(8, 16, 2, 128, 4), Narrow(8, 16, 3, 64, 4, cluster=2, price=1.2), Narrow(1, 8, 2, 64, 4, table_shift=7),
        Wide(1, 1, 12, 1, 256, 4, cluster=2, wgmma=True, price=1.18), Wide(1, 1, 12, 1, 256, 5, wgmma=True),
        Wide(1, 2, 2, 4, 256, 3, cluster=2, price=2.07), Wide(1, 1, 4, 2, 128, 3, table_shift=7, price=9),
        Wide(2, 1, 12, 1, 256, 4, cluster=2, wgmma=True, price=1.37), Wide(2, 1, 12, 1, 256, 4, wgmma=True, price=1.14),
        Wide(2, 1, 4, 4, 256, 6, cluster=2, wgmma=True, price=2.24), Wide(2, 1, 4, 2, 128, 3, table_shift=7, price=9),
        Wide(4, 1, 12, 1, 256, 3, cluster=2, wgmma=True, price=1.2), Wide(4, 1, 12, 1, 256, 3, wgmma=True),
        Wide(4, 1, 4, 4, 256, 6, cluster=2, wgmma=True, price=2.41), Wide(4, 1, 4, 2, 128, 2, table_shift=7, price=9),
        Wide(8, 1, 12, 1, 128, 3, cluster=2, wgmma=True, price=1.45), Wide(8, 1, 12, 1, 256, 2, wgmma=True),
        Wide(8, 1, 4, 4, 256, 3, cluster=2, wgmma=True, price=2.41), Wide(8, 1, 2, 2, 128, 2, table_shift=7, price=9),
        Wide(16, 1, 12, 1, 128, 2, cluster=2, table_shift=7, wgmma=True, price=1.47),
        Wide(16, 1, 12, 1, 256, 2, table_shift=7, wgmma=True),
        Wide(16, 1, 4, 4, 256, 2, cluster=2, table_shift=7, wgmma=True, price=2.57),
    ),
}  # fmt: skip
_STATIC = 1024  # shared memory that the kernels declare themselves, and what the driver keeps, at most


class Plan(NamedTuple):
    """One launch: the kernel, its grid, threads, shared memory and cluster."""

    kernel: CudaKernel
    grid: tuple[int]
    threads: int
    shared: int
    cluster: tuple[int, int, int]
    early: bool
    box: int  # rows of x in a bulk copy, or 0


def fits(
    config: Config, fmt: str, nested: bool, m: int, n: int, k: int, half: bool, sms: int, limit: int
) -> tuple[int, int] | None:
    """(clusters, bytes of shared memory) of a launch with this configuration, or None where it cannot serve.

    half: scales for 32 columns. sms, limit: multiprocessors, and bytes of shared memory that a block may have.
    """
    if m > config.rows or (half and not isinstance(config, Wide)):
        return None
    pieces = _ceil(k, config.piece(fmt))
    if (config.cluster - 1) * _ceil(pieces, config.cluster) >= pieces:
        return None  # a block would have no columns
    # Clusters of four do not fill a GPU, whose multiprocessors come in groups: an H100 held 30 of 33.
    usable = sms if config.cluster <= 2 else sms - sms // 11
    clusters = min(usable // config.cluster, n)
    shared = config.shared(fmt, nested, n, k, clusters, half)
    return (clusters, shared) if shared + _STATIC <= limit else None


def choose(
    fmt: str, nested: bool, m: int, n: int, k: int, half: bool, sms: int, limit: int, major: int
) -> tuple[Config, int, int] | None:
    """The configuration for a product, with its clusters and its bytes of shared memory; arguments as those of `fits`.

    major: compute capability. None where no configuration serves it.
    """
    best: tuple[Config, int, int] | None = None
    least = (MAX_ROWS[fmt] + 1, 0.0)
    for config in _CONFIGURATIONS[fmt]:
        if (config.cluster > 1 and major < 9) or (getattr(config, "wgmma", False) and major != 9):
            continue
        found = fits(config, fmt, nested, m, n, k, half, sms, limit)
        while found is None and config.depth > 2:  # more scales than usual, less memory
            config = config.shorter()
            found = fits(config, fmt, nested, m, n, k, half, sms, limit)
        if found is None:
            continue
        cost = config.price * _ceil(_ceil(n, found[0]), config.tile) * config.tile / config.cluster
        if (config.rows, cost) < least:
            best, least = (config, *found), (config.rows, cost)
    return best


@lru_cache(maxsize=4096)
def plan(fmt: str, m: int, n: int, k: int, bf16: bool, fp4: bool, nested: bool, half: bool, device: int) -> Plan | None:
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
    early = getattr(config, "early", 0) > 0
    return Plan(made, (clusters * config.cluster,), config.threads, shared, (config.cluster, 1, 1), early,
                config.rows * getattr(config, "bulk", False))  # fmt: skip


@lru_cache(maxsize=4)
def _kernel(source: str, bulk: bool) -> CudaKernel:
    text = source_text("few_rows_common.cu") + source_text(source)
    return CudaKernel("few_rows", text, "few_rows", "PPPPPPPPiiiii" + "T" * bulk)


def kernel(config: Config, fmt: str, bf16: bool, fp4: bool, nested: bool, half: bool) -> CudaKernel:
    """The kernel of a configuration, not yet compiled."""
    constants = {"FMT": FORMATS[fmt], "BF16": int(bf16), "FP4": int(fp4), "NESTED": int(nested)}
    return _kernel(config.source, getattr(config, "bulk", False)).variant(None, **constants, **config.constants(half))


def supports(fmt: str, x: torch.Tensor, weight: torch.Tensor, k: int, blocksize: int = 64) -> bool:
    """Whether the kernels can multiply these: 16-bit x ``[M, K]`` of 1 to MAX_ROWS rows, all aligned."""
    return (
        0 < x.shape[0] <= MAX_ROWS[fmt]
        and x.dtype != torch.float32
        and k > 0
        and k % _COLUMNS[fmt] == 0
        and blocksize >= 32
        and find_spec("cuda") is not None
        and aligned(x, weight)
    )


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
    found = plan(fmt, m, n, k, x.dtype == torch.bfloat16, quant_type == "fp4", nested is not None, half, device)
    if found is None:
        return None
    y = x.new_empty((m, n))
    absmax, table, offset = nested or (None, None, None)
    shift = 0 if fmt != "4bit" else (blocksize // (32 if half else 64)).bit_length() - 1
    found.kernel(
        found.grid, found.threads, found.shared, weight, x, y, bias, scales, absmax, table, offset, m, n, k, shift,
        nested_blocksize.bit_length() - 1, *([tensor_map(x, (found.box, 64), 128)] if found.box else ()),
        pdl=found.early, cluster=found.cluster,
    )  # fmt: skip
    return y
