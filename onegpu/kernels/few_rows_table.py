"""Configurations of the few-row kernels: what each needs, and which of them a sweep on an H100 found fastest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from onegpu.kernels.few_rows_held import Held
from onegpu.kernels.few_rows_stream import Stream

# Weights of a block: where they are few, what a kernel takes to start, or a cluster to meet, counts most.
FEW, MANY, ANY = (0, 1 << 18), ((1 << 18) + 1, 1 << 62), (0, 1 << 62)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def resident_clusters(multiprocessors: int, cluster: int) -> int:
    """How many clusters of blocks that have a multiprocessor each run at once.

    Clusters of four do not fill a GPU, whose multiprocessors come in groups: an H100 held 30 of 33.
    """
    usable = multiprocessors if cluster <= 2 else multiprocessors - multiprocessors // 11
    return max(1, usable // cluster)


@dataclass(frozen=True)
class Narrow:
    """Configuration of few_rows_narrow.cu.

    rows: of x that fit. width: bytes of a row of W in a piece. slots: of a warp's ring. tiles: of 16 rows between two
    meetings of the warps. cluster: blocks that share the columns. table_shift: 7 makes the look-up table of 4-bit
    products half as large and its look-ups a little slower. early: pieces of each warp that are sent for
    into L2 before the kernel in front has ended (0: this one starts when that has ended; compute capability 9.0).
    price: time of a row of a tile (filled or not), over that of the others with as many rows. nested: that of
    quantised scales, over that of plain ones. share: weights of a block, padding included,
    between which it is taken.
    """

    rows: int
    warps: int
    slots: int
    width: int
    tiles: int
    cluster: int = 1
    table_shift: int = 8
    early: int = 0
    price: float = 1.0
    nested: float = 1.0
    share: tuple[int, int] = ANY

    source: ClassVar[str] = "few_rows_narrow.cu"
    packs: ClassVar[int] = 1  # the highest form of quantised scales (`fits`)
    blocks: ClassVar[int] = 1
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

    def shared(self, fmt: str, nested: int, n: int, k: int, clusters: int, half: bool) -> int:
        """Bytes of shared memory; the kernel lays it out in this order."""
        columns, four = self.piece(fmt), fmt == "4bit"
        share = ceil_div(ceil_div(k, columns), self.cluster)
        pitch = ceil_div(share * columns * 2, 128) * 128 + (64 if fmt == "16bit" else 16)
        sums = self.tiles * self.warps * 16 * self.rows * 4
        scales = columns * (1 + (nested > 0))
        slot = 16 * self.width + scales * four
        total = (256 << self.table_shift) + 1024 * (nested > 0) if four else 0
        total += self.rows * pitch + sums + self.warps * self.slots * slot
        if self.cluster > 1:
            total += ceil_div(ceil_div(n, clusters), 16) * 64 * self.rows
        return total

    def constants(self, half: bool) -> dict[str, int]:
        names = {"MP": self.rows, "WARPS": self.warps, "SLOTS": self.slots, "CB": self.width, "TG": self.tiles}
        return {**names, "CL": self.cluster, "TABLE_SHIFT": self.table_shift, "EARLY": self.early}


@dataclass(frozen=True)
class Wide:
    """Configuration of few_rows_wide.cu: a tile is 16 * row_tiles * warps_n rows of W, a stage has `columns` of it.

    eights: rows of x, in eights. warps_n x warps_k warps share the rows and the columns. stages: of the ring.
    wgmma: Hopper only. price, nested, share: as Narrow's.
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
    nested: float = 1.0
    share: tuple[int, int] = ANY

    source: ClassVar[str] = "few_rows_wide.cu"
    packs: ClassVar[int] = 2
    blocks: ClassVar[int] = 1
    early: ClassVar[int] = 0

    @property
    def rows(self) -> int:
        return 8 * self.eights

    @property
    def tile(self) -> int:
        """Rows of W that are multiplied at once."""
        return 16 * self.row_tiles * self.warps_n

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

    def shared(self, fmt: str, nested: int, n: int, k: int, clusters: int, half: bool) -> int:
        tile, four = self.tile, fmt == "4bit"
        scales = 8 if nested == 2 else self.columns // (32 if half else 64) * 4 * (1 + nested)
        gap, unit = (0, 1024) if self.wgmma else (16, 16)
        stage = tile * self.columns // (2 if four else 1) + self.rows * (self.columns * 2 + gap) + tile * scales * four
        total = (256 << self.table_shift) + 1024 * (nested > 0) if four else 0
        if not (self.wgmma and self.warps_k == self.cluster == 1):
            total += ceil_div(self.rows * (tile + 4) * 4, unit) * unit
        return total + self.stages * ceil_div(stage, unit) * unit

    def constants(self, half: bool) -> dict[str, int]:
        names = {"NT": self.eights, "RT": self.row_tiles, "WN": self.warps_n, "WK": self.warps_k, "KC": self.columns}
        return {**names, "STAGES": self.stages, "CL": self.cluster, "TABLE_SHIFT": self.table_shift,
                "HALF_BLOCK": int(half), "WGMMA": int(self.wgmma)}  # fmt: skip


@dataclass(frozen=True)
class Resident:
    """Configuration of few_rows_resident.cu (Hopper): as Wide with wgmma, but x stays in shared memory.

    eights: rows of x, in eights (1, 2, 4, 8). warps_n x warps_k groups of four warps share the rows and the columns.
    width, slots, early, price, nested, share: as Narrow's.
    """

    eights: int
    warps_n: int
    warps_k: int
    width: int
    slots: int
    cluster: int = 1
    early: int = 0
    price: float = 1.0
    nested: float = 1.0
    share: tuple[int, int] = ANY

    source: ClassVar[str] = "few_rows_resident.cu"
    wgmma: ClassVar[bool] = True
    packs: ClassVar[int] = 2
    blocks: ClassVar[int] = 1

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

    def shared(self, fmt: str, nested: int, n: int, k: int, clusters: int, half: bool) -> int:
        columns, four, warps = self.piece(fmt), fmt == "4bit", self.threads // 32
        total = 65536 * four + 256 + 1024 * (nested > 0)
        total += ceil_div(ceil_div(k, columns), self.cluster) * columns * 2 * self.rows
        sums, meets = self.rows * (self.tile + 4), self.warps_k * self.cluster > 1
        if meets and not (four and sums <= 8192):
            tiles = 2 if self.rows <= 16 and self.cluster >= 4 else 1
            total += ceil_div(sums * tiles, 32) * 128
        scales = 128 if nested == 2 else columns * (1 + nested)
        return total + warps * self.slots * (16 * self.width + scales * four)

    def constants(self, half: bool) -> dict[str, int]:
        names = {"NT": self.eights, "WN": self.warps_n, "WK": self.warps_k, "CB": self.width, "SLOTS": self.slots}
        return {**names, "CL": self.cluster, "TABLE_SHIFT": 8, "WGMMA": 1, "EARLY": self.early}


@dataclass(frozen=True)
class Direct:
    """Configuration of few_rows_direct.cu: int8 and 16-bit weights go from memory to the registers, past shared memory.

    rows: of x, up to 8. groups: of 64 bytes of a row of W in a piece. pieces: that a warp has
    sent for or multiplies. tiles, early, price, nested, share: as Narrow's. blocks: that share a multiprocessor, so
    that the next kernel gets ready while this one runs.
    """

    rows: int
    warps: int
    groups: int
    pieces: int
    tiles: int
    blocks: int = 1
    early: int = 0
    price: float = 1.0
    nested: float = 1.0
    share: tuple[int, int] = ANY

    source: ClassVar[str] = "few_rows_direct.cu"
    packs: ClassVar[int] = 2
    tile: ClassVar[int] = 16
    cluster: ClassVar[int] = 1
    depth: ClassVar[int] = 0

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def shorter(self) -> Direct:
        raise AssertionError("there is no ring to shorten")

    def piece(self, fmt: str) -> int:
        return self.groups * (32 if fmt == "16bit" else 64)

    def shared(self, fmt: str, nested: int, n: int, k: int, clusters: int, half: bool) -> int:
        columns = self.piece(fmt)
        pitch = ceil_div(ceil_div(k, columns) * columns * 2, 128) * 128 + (64 if fmt == "16bit" else 16)
        return self.rows * pitch + self.tiles * self.warps * 64 * self.rows

    def constants(self, half: bool) -> dict[str, int]:
        names = {"MP": self.rows, "WARPS": self.warps, "ITERS": self.groups, "DEPTH": self.pieces, "TG": self.tiles}
        return {**names, "BLOCKS": self.blocks, "CL": 1, "TABLE_SHIFT": 8, "EARLY": self.early}


Config = Held | Narrow | Wide | Resident | Direct | Stream


# By format. Of those that fit, by memory and by `share`, and have the fewest rows the cheapest is taken: by price (with
# quantised scales times `nested`) times rows of W with padding over the cluster.
# What a sweep on an H100 found fastest (docs/worklog.md); those of price 9 are for GPUs before it.
_STREAM = (
    Stream(2, 12, 1, 256, 3, price=1.04), Stream(2, 12, 1, 256, 3, 2, price=0.95),
    Stream(2, 4, 2, 256, 4, 2, blocks=2, price=1.5, share=FEW), Stream(2, 4, 2, 256, 8, 2, price=1.25, share=MANY),
    Stream(4, 12, 1, 256, 3), Stream(4, 12, 1, 256, 3, 2, price=1.2), Stream(4, 16, 1, 256, 3, price=0.85),
    Stream(4, 4, 2, 256, 4, 2, price=1.5), Stream(4, 4, 2, 128, 6, 8, price=4.2),
    Stream(8, 12, 1, 256, 3, held=168), Stream(8, 16, 1, 256, 2, price=0.85), Stream(8, 8, 1, 256, 3, 2, price=1.15),
    Stream(8, 12, 1, 256, 3, 4, held=160, price=1.74), Stream(8, 4, 2, 256, 4, 2, price=1.4),
    Stream(8, 4, 2, 128, 6, 8, price=4.2),
)  # fmt: skip
CONFIGURATIONS: dict[str, tuple[Config, ...]] = {
    "16bit": (
        Direct(1, 16, 4, 2, 12, early=2), Direct(2, 16, 4, 2, 8, early=2), Direct(4, 16, 4, 2, 4, early=2),
        Narrow(8, 16, 3, 128, 2), Narrow(8, 16, 3, 128, 2, cluster=2, price=1.2),
        Narrow(8, 16, 2, 64, 1, cluster=4, price=1.2), Narrow(8, 8, 2, 64, 1),
    ),
    "int8": (
        Narrow(2, 16, 2, 128, 8, early=2), Narrow(2, 8, 2, 64, 4, price=1.1), Narrow(4, 16, 2, 128, 6, early=2),
        Narrow(4, 16, 3, 64, 6, early=4, price=1.05), Narrow(4, 16, 2, 64, 2, price=1.1),
        Direct(8, 16, 2, 3, 2, early=2, price=1.52, share=FEW),
        Narrow(8, 16, 2, 64, 2, early=4, price=1.96), Narrow(8, 16, 2, 128, 4, early=4, price=1.56),
        Narrow(8, 16, 3, 128, 4, cluster=2, early=4, price=1.93), Resident(1, 3, 1, 128, 4, early=4),
        Resident(1, 4, 1, 128, 3, cluster=4, early=4, price=1.36),
        Wide(1, 1, 4, 2, 128, 5, cluster=2, price=3.06), Wide(1, 1, 4, 2, 128, 3, price=9),
        *_STREAM, Stream(2, 16, 1, 256, 3, price=0.99), Stream(2, 4, 2, 128, 6, 8, price=4.2),
        Stream(8, 12, 1, 128, 4, 2, price=1.085), Stream(8, 12, 1, 128, 4, 2, held=152, share=FEW),
        Wide(2, 1, 4, 2, 128, 3, price=9), Wide(4, 1, 4, 2, 128, 3, price=9), Wide(8, 1, 4, 1, 64, 3, price=9),
        Wide(16, 1, 12, 1, 128, 2, cluster=2, wgmma=True, price=1.47),
        Wide(16, 1, 12, 1, 128, 4, wgmma=True, price=1.25),
        Wide(16, 1, 12, 1, 128, 2, cluster=4, wgmma=True, price=1.85), Wide(16, 1, 4, 1, 64, 2, price=9),
    ),
    "4bit": (
        # Blocks of few weights: two on a multiprocessor, so that the next kernel gets ready. Else one, of more warps.
        Held(2, 10, blocks=2, price=0.3, share=(0, 11 << 14)), Held(2, 18, price=0.32),
        Held(2, 18, cluster=2, price=0.6), Narrow(1, 8, 2, 64, 4, table_shift=7, price=9),
        Held(4, 8, cluster=2, blocks=2, early=2, price=0.3, share=(15 << 13, 1 << 19)),
        Held(4, 10, blocks=2, early=2, price=0.3, share=(0, 1 << 18)),
        Held(4, 16, late=1, price=0.32), Held(4, 16, cluster=2, early=2, price=0.35),
        Held(4, 16, cluster=4, early=2, price=0.39),
        Held(8, 9, cluster=2, blocks=2, price=0.3, share=(0, 3 << 16)),
        Held(8, 10, cluster=2, blocks=2, price=0.3, share=(0, 3 << 16)),
        Held(8, 16, late=1, price=0.32), Held(8, 16, cluster=2, early=2, price=0.35),
        Held(8, 16, cluster=4, early=2, price=0.39), Held(8, 16, cluster=8, early=2, price=0.43),
        Resident(1, 3, 1, 128, 2, cluster=2, early=4, price=1.302),  # more sums than a block has room for
        Wide(1, 1, 12, 1, 256, 5, wgmma=True, price=1.54), Wide(1, 1, 12, 1, 256, 4, cluster=2, wgmma=True, price=1.81),
        Wide(1, 2, 2, 4, 256, 3, cluster=2, price=3.2), Wide(1, 1, 4, 2, 128, 3, table_shift=7, price=9),
        Resident(2, 3, 1, 128, 3, cluster=2, early=2), Resident(2, 3, 1, 64, 3, cluster=4, early=4, price=1.396),
        Resident(2, 3, 1, 128, 2, cluster=8, early=4, price=1.38, share=MANY),
        Resident(2, 1, 4, 64, 2, cluster=8, early=4, price=2.9),
        *_STREAM, Stream(8, 12, 1, 256, 2, 2, price=1.085), Stream(8, 12, 1, 256, 3, 2, held=152, share=FEW),
        Stream(2, 4, 2, 256, 4, 2, blocks=2, price=1.5, nested=0.83, share=MANY),  # quantised scales: not seven stages
        Wide(2, 1, 4, 2, 128, 3, table_shift=7, price=9), Wide(4, 1, 4, 2, 128, 2, table_shift=7, price=9),
        Wide(8, 1, 2, 2, 128, 2, table_shift=7, price=9),
        Wide(16, 1, 12, 1, 128, 2, cluster=2, table_shift=7, wgmma=True, price=1.47),
        Wide(16, 1, 12, 1, 256, 2, table_shift=7, wgmma=True),
        Wide(16, 1, 4, 4, 256, 2, cluster=2, table_shift=7, wgmma=True, price=2.57),
    ),
}  # fmt: skip
