"""The configuration of few_rows_stream.cu: products of 9 to 64 rows on Hopper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

_GAPS = 32768  # bytes that a look-up table leaves free, 128 of every 256: for scales, and in the last of them
_BARRIERS = 128


def most_rows(n: int, clusters: int) -> int:
    """Of the cluster with the most, as the kernels that stream x share out rows of W."""
    four = 4 if n >= 4 * clusters else 1
    fours = -(-n // four)
    return -(-fours // clusters) * four


@dataclass(frozen=True)
class Stream:
    """Configuration of few_rows_stream.cu (Hopper): a tile is 16 * warps_n rows of W, a stage has `columns` of it.

    eights: rows of x, in eights (1, 2, 4, 8). warps_n x warps_k warps share the rows and the columns; one more brings
    x and W. stages: of the ring. held: rows of W that a stage has room for, where those of a tile are more; 0: all.
    early: as Narrow's, in stages. blocks: as Direct's. price, nested, share: as Narrow's.
    """

    eights: int
    warps_n: int
    warps_k: int
    columns: int
    stages: int
    cluster: int = 1
    held: int = 0
    early: int = 2
    blocks: int = 1
    price: float = 1.0
    nested: float = 1.0
    share: tuple[int, int] = (0, 1 << 62)

    source: ClassVar[str] = "few_rows_stream.cu"
    wgmma: ClassVar[bool] = True
    packs: ClassVar[int] = 2

    @property
    def rows(self) -> int:
        return 8 * self.eights

    @property
    def tile(self) -> int:
        """Rows of W that are multiplied at once."""
        return self.held or 16 * self.warps_n

    @property
    def threads(self) -> int:
        return 32 * self.warps_n * self.warps_k + 32

    @property
    def depth(self) -> int:
        """Of the ring."""
        return self.stages

    def shorter(self) -> Stream:
        """With a ring shorter by one."""
        return replace(self, stages=self.stages - 1)

    def piece(self, fmt: str) -> int:
        return self.columns

    def serves(self, fmt: str, nested: int, n: int, clusters: int, half: bool) -> bool:
        """One tile where sums meet, with room in the ring; scales and barriers where the look-up table leaves some."""
        scales = 8 if nested == 2 else self.columns // (32 if half else 64) * 4 * (1 + nested)  # of a row in a stage
        if fmt == "4bit" and (self.stages > 7 or self.stages * self.tile * scales > _GAPS - _BARRIERS):
            return False
        sums = (self.warps_k * (self.tile + 4) + (self.cluster > 1) * self.tile) * self.rows * 4
        whole = self.cluster * self.warps_k == 1 or most_rows(n, clusters) <= self.tile
        return whole and sums <= self._ring(fmt)

    def shared(self, fmt: str, nested: int, n: int, k: int, clusters: int, half: bool) -> int:
        return self._ring(fmt) + (2 * _GAPS + 1024 * (nested > 0) if fmt == "4bit" else 16 * self.stages + 8)

    def _ring(self, fmt: str) -> int:
        """Bytes of x and W in all stages."""
        stage = self.tile * self.columns // (2 if fmt == "4bit" else 1) + self.rows * self.columns * 2
        return self.stages * -(-stage // 1024) * 1024

    def box(self, n: int, clusters: int) -> int:
        """Rows of W in a bulk copy: those of a cluster in tiles of one size, in eights."""
        most = most_rows(n, clusters)
        each = -(-most // -(-most // self.tile))
        return -(-each // 8) * 8

    def constants(self, half: bool) -> dict[str, int]:
        names = {"NT": self.eights, "WN": self.warps_n, "WK": self.warps_k, "KC": self.columns, "STAGES": self.stages}
        return {**names, "CL": self.cluster, "TABLE_SHIFT": 8, "HALF_BLOCK": int(half), "WGMMA": 1,
                "HELD": self.held, "EARLY": self.early, "BLOCKS": self.blocks}  # fmt: skip
