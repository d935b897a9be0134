"""The configuration of few_rows_held.cu: 4-bit products of two to eight rows of x."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar


@dataclass(frozen=True)
class Held:
    """Configuration of few_rows_held.cu: a piece has 2 * rows rows of W, as a tile, and 2048 / rows columns.

    rows: of x that fit: 2, 4 or 8. warps: at most; of these a multiple of the pieces of a row is taken (`whole`).
    slots: of a warp's ring. cluster: blocks that share the columns. over: sums may take more than the table has room
    for. blocks: as Direct's. early, nested, share: as Narrow's; price too, where all warps are taken. It serves
    quantised scales whose codes are whole words (2).
    """

    rows: int
    warps: int
    slots: int = 2
    cluster: int = 1
    blocks: int = 1
    over: bool = False
    early: int = 1
    price: float = 1.0
    nested: float = 1.0
    share: tuple[int, int] = (0, 1 << 62)

    source: ClassVar[str] = "few_rows_held.cu"
    packs: ClassVar[int] = 2
    depth: ClassVar[int] = 0

    @property
    def tile(self) -> int:
        return 2 * self.rows

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def shorter(self) -> Held:
        raise AssertionError("a ring of this depth is not shortened")

    def piece(self, fmt: str) -> int:
        return 2048 // self.rows

    def _pieces(self, k: int) -> int:
        """Of a row, in a block."""
        of_row = (k + 2048 // self.rows - 1) // (2048 // self.rows)
        return (of_row + self.cluster - 1) // self.cluster

    def whole(self, nested: int, k: int) -> Held:
        """With warps that each have the same columns of all rows; where a row has too many pieces, as it is."""
        pieces = self._pieces(k)
        if not 0 < pieces <= self.warps:
            return self
        warps = self.warps // pieces * pieces
        return replace(self, warps=warps, price=self.price * self.warps / warps)

    def _rows(self, n: int, clusters: int) -> int:
        return (n + clusters - 1) // clusters

    def _over(self, n: int, k: int, clusters: int) -> int:
        """Sums for which the table has no room."""
        tiles = (self._rows(n, clusters) + self.tile - 1) // self.tile
        return max(0, tiles * self._pieces(k) * self.tile * self.rows - 8192)

    def serves(self, nested: int, n: int, k: int, clusters: int) -> bool:
        """Whether its warps do have the same columns, and the sums room."""
        return nested != 1 and self.warps % self._pieces(k) == 0 and (self.over or not self._over(n, k, clusters))

    def shared(self, fmt: str, nested: int, n: int, k: int, clusters: int, half: bool) -> int:
        """Bytes of shared memory: the table, values of quantised scales, rings, sums of the cluster, and others."""
        own = (self._rows(n, clusters) + self.cluster - 1) // self.cluster
        sums = self._over(n, k, clusters) + (self.cluster > 1) * (self.cluster * own * self.rows + 4)
        return (1 << 16) + 1024 * (nested > 0) + self.warps * self.slots * (2048 + 256) + 4 * sums

    def constants(self, half: bool) -> dict[str, int]:
        names = {"MP": self.rows, "WARPS": self.warps, "DEPTH": self.slots, "BLOCKS": self.blocks, "CL": self.cluster}
        return {**names, "OVER": int(self.over), "TABLE_SHIFT": 8, "EARLY": self.early}
