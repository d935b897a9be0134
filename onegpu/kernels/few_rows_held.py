"""The configuration of few_rows_held.cu: 4-bit products of one to eight rows of x."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

_BUSY = 11  # warps of a multiprocessor whose copies keep memory busy


@dataclass(frozen=True)
class Held:
    """Configuration of few_rows_held.cu: a piece has 2 * rows rows of W, as a tile, and 2048 / rows columns.

    rows: of x that fit: 2, 4 or 8. warps: at most; of these a multiple of the pieces of a row is taken, and `over` set
    where the table has not room for all sums (`whole`). cluster: blocks that share the columns. blocks: as Direct's.
    early, price, nested, share: as Narrow's. late: pieces that a warp has left when the next kernel may start. slots:
    of a warp's ring.
    """

    rows: int
    warps: int
    cluster: int = 1
    blocks: int = 1
    early: int = 1
    late: int = 2
    price: float = 1.0
    nested: float = 1.0
    share: tuple[int, int] = (0, 1 << 62)
    slots: int = 2
    over: bool = False

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

    def most(self, nested: int) -> int:
        """Warps that have registers enough: four rows with words of codes take the most."""
        return min(self.warps, 16 // self.blocks) if nested == 2 and self.rows == 4 else self.warps

    def whole(self, nested: int, n: int, k: int, clusters: int) -> Held:
        """With warps that each have the same columns of all rows; where a row has too many pieces, as it is.

        The price grows with columns that are padding, and where warps are too few to keep memory busy.
        """
        pieces, most = self._pieces(k), self.most(nested)
        if not 0 < pieces <= most:
            return self
        warps, padded = most // pieces * pieces, pieces * self.cluster * 2048 // self.rows
        price = self.price * padded / k * max(1.0, _BUSY / (warps * self.blocks))
        return replace(self, warps=warps, price=price, over=self._over(n, k, clusters) > 0)

    def _rows(self, n: int, clusters: int) -> int:
        return (n + clusters - 1) // clusters

    def _over(self, n: int, k: int, clusters: int) -> int:
        """Sums for which the table has no room."""
        tiles = (self._rows(n, clusters) + self.tile - 1) // self.tile
        return max(0, tiles * self._pieces(k) * self.tile * self.rows - 8192)

    def serves(self, nested: int, n: int, k: int, clusters: int) -> bool:
        """Whether its warps do have the same columns and registers, and the sums room."""
        whole = self.warps <= self.most(nested) and self.warps % self._pieces(k) == 0
        return whole and (self.over or not self._over(n, k, clusters))

    def shared(self, fmt: str, nested: int, n: int, k: int, clusters: int, half: bool) -> int:
        """Bytes of shared memory: the table, values of quantised scales, rings, sums of the cluster, and others."""
        unit = self.cluster * (2 if self.rows == 2 else 1)  # rows of W are finished by fours of sums
        own = (self._rows(n, clusters) + unit - 1) // unit * unit
        sums = self._over(n, k, clusters) + (self.cluster > 1) * (own * self.rows + 4)
        return (1 << 16) + 1024 * (nested > 0) + self.warps * self.slots * (2048 + 256) + 4 * sums

    def constants(self, half: bool) -> dict[str, int]:
        names = {"MP": self.rows, "WARPS": self.warps, "DEPTH": self.slots, "BLOCKS": self.blocks, "CL": self.cluster}
        return {**names, "OVER": int(self.over), "LATE": self.late, "TABLE_SHIFT": 8, "EARLY": self.early}
