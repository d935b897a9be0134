"""The configuration of few_rows_single.cu: 4-bit products of one row of x."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar


@dataclass(frozen=True)
class Single:
    """Configuration of few_rows_single.cu: a piece has 16 / sections rows of W, as a tile, and 256 * sections columns.

    warps: at most; of these a multiple of the pieces of a row is taken (`whole`). slots: of a warp's ring. blocks,
    early, price, nested, share: as Narrow's. Of quantised scales it serves those with a piece's codes in words (2).
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

    def whole(self, k: int) -> Single:
        """With warps that each have the same columns of all rows; where a row has too many pieces, as it is."""
        pieces = self._pieces(k)
        return replace(self, warps=self.warps // pieces * pieces) if 0 < pieces <= self.warps else self

    def serves(self, nested: int, n: int, k: int, clusters: int) -> bool:
        """Whether its warps do have the same columns, quantised scales registers, and the sums room in the table."""
        rows, pieces = (n + clusters - 1) // clusters, self._pieces(k)
        sums = (rows + self.tile - 1) // self.tile * self.tile * pieces
        registers = nested == 0 or (nested == 2 and self.warps <= (18 if self.blocks == 1 else 8))
        return registers and self.warps % pieces == 0 and sums * 4 <= 1 << 15

    def shared(self, fmt: str, nested: int, n: int, k: int, clusters: int, half: bool) -> int:
        """Bytes of shared memory: the table, the values of quantised scales, and the rings."""
        return (1 << 16) + 1024 * (nested > 0) + self.warps * self.slots * (2048 + (128 if nested else 256))

    def constants(self, half: bool) -> dict[str, int]:
        names = {"WARPS": self.warps, "DEPTH": self.slots, "SECT": self.sections, "BLOCKS": self.blocks}
        return {**names, "CL": 1, "TABLE_SHIFT": 8, "EARLY": self.early}
