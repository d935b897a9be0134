"""The configuration of few_rows_single.cu: 4-bit products of one row of x."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar


@dataclass(frozen=True)
class Single:
    """Configuration of few_rows_single.cu: a piece has 16 / sections rows of W, as a tile, and 256 * sections columns.

    warps: at most; of these a multiple of the pieces of a row is taken (`whole`). slots: of a warp's ring. blocks:
    as Direct's. early, nested, share: as Narrow's; price too, where all warps are taken. It serves quantised scales
    whose codes are whole words (2).
    """

    warps: int
    slots: int
    sections: int
    blocks: int = 1
    early: int = 1
    price: float = 1.0
    nested: float = 1.0
    share: tuple[int, int] = (0, 1 << 62)

    source: ClassVar[str] = "few_rows_single.cu"
    rows: ClassVar[int] = 1
    packs: ClassVar[int] = 2
    cluster: ClassVar[int] = 1
    depth: ClassVar[int] = 0

    @property
    def tile(self) -> int:
        return 16 // self.sections

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def shorter(self) -> Single:
        raise AssertionError("a ring of this depth is not shortened")

    def piece(self, fmt: str) -> int:
        return 256 * self.sections

    def _pieces(self, k: int) -> int:
        return (k + 256 * self.sections - 1) // (256 * self.sections)

    def most(self, nested: int) -> int:
        """Warps that have registers enough: with quantised scales and two sections, more than 16 have not."""
        return min(self.warps, 16 // self.blocks) if nested and self.sections == 2 else self.warps

    def whole(self, nested: int, k: int) -> Single:
        """With warps that each have the same columns of all rows; where a row has too many pieces, as it is."""
        pieces, most = self._pieces(k), self.most(nested)
        if not 0 < pieces <= most:
            return self
        warps = most // pieces * pieces
        return replace(self, warps=warps, price=self.price * most / warps)

    def serves(self, nested: int, n: int, k: int, clusters: int) -> bool:
        """Whether its warps do have the same columns and registers, and the sums room in the table."""
        rows, pieces = (n + clusters - 1) // clusters, self._pieces(k)
        sums = (rows + self.tile - 1) // self.tile * self.tile * pieces
        return nested != 1 and self.warps == self.most(nested) and self.warps % pieces == 0 and sums * 4 <= 1 << 15

    def shared(self, fmt: str, nested: int, n: int, k: int, clusters: int, half: bool) -> int:
        """Bytes of shared memory: the table, the values of quantised scales, and the rings."""
        return (1 << 16) + 1024 * (nested > 0) + self.warps * self.slots * (2048 + 256)

    def constants(self, half: bool) -> dict[str, int]:
        names = {"WARPS": self.warps, "DEPTH": self.slots, "SECT": self.sections, "BLOCKS": self.blocks}
        return {**names, "CL": 1, "TABLE_SHIFT": 8, "EARLY": self.early}
