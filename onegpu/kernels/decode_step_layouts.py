"""How the products of decode_step_product.cu are laid out on an SM and over a cluster of blocks."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

FORMATS = {"16bit": 0, "int8": 1, "nf4": 2, "fp4": 2}
WHOLE = 232448 - 1024  # bytes of shared memory of a block on Hopper, less what the kernels' static arrays take
BOXES = 4  # of decode_step_product.cu


class Shape(NamedTuple):
    """How a product is laid out.

    warps: of a block that multiply. fetchers: of those that fetch, unless each does for itself (own); at most as many as
    slots. width: bytes of a row of W in a piece, at most 512 if own. slots: pieces in the ring, or in a warp's own.
    table_shift: 8 makes the look-up table of 4-bit products twice as large and a look-up one instruction shorter.
    tiles: of 16 rows between two sums over the warps, for one row of x. cluster: blocks that share the columns.
    """

    warps: int
    width: int
    slots: int
    table_shift: int = 7
    tiles: int = 8
    own: bool = False
    cluster: int = 1
    fetchers: int = 1

    @property
    def all_warps(self) -> int:
        """Of a block."""
        return self.warps + self.fetchers * (not self.own)

    def group(self, rows: int) -> int:
        """Tiles between two sums."""
        return max(1, self.tiles // rows)

    def share(self, form: str, columns: int) -> int:
        """Columns of each block of the cluster but the last, which has what is left."""
        unit = 256 if FORMATS[form] == 2 else 64  # scales of 256 columns are 16 bytes, which bulk copies are aligned to
        return columns if self.cluster == 1 else -(-columns // (unit * self.cluster)) * unit

    def ring(self, form: str) -> int:
        """Bytes of all slots."""
        four = FORMATS[form] == 2
        scales = 64 * (self.width // 32 + (1 if self.own else 4))
        slot = 16 * (self.width + 32) + scales if four else 16 * (self.width + 64)
        return (self.warps if self.own else 1) * self.slots * slot

    def shared(self, form: str, rows: int, columns: int, nested: bool) -> int:
        """Bytes of shared memory, as the kernel divides it: table, map, x, sums, shares of the norm, barriers, ring."""
        fmt, many = FORMATS[form], self.cluster > 1
        pitch = -(-self.share(form, columns) * 2 // 128) * 128 + (16 if fmt else 64)
        table = (256 << self.table_shift) + 1024 * nested if fmt == 2 else 0
        sums = (2 * self.warps + BOXES * many) * self.group(rows) * 16 * rows * 4
        values = (5 * rows + 1) * self.all_warps + 5 * rows * self.cluster * many + rows
        shares = (values + 3) // 4 * 16 + 8 * (BOXES + 2) * many
        bars = 0 if self.own else -(-16 * self.slots // 128) * 128
        return table + rows * pitch + sums + shares + bars + self.ring(form)

    def serves(self, form: str, rows: int, columns: int, nested: bool) -> bool:
        """Whether it fits, every block of the cluster has columns, and no warp fetches two turns of the ring ahead."""
        whole = (self.cluster - 1) * self.share(form, columns) < columns and (self.own or self.fetchers <= self.slots)
        return whole and self.shared(form, rows, columns, nested) <= WHOLE


# The layout of each format: what measured best for Llama-2-7B's products on an H100 (docs/worklog.md). Up to OWN_ROWS
# rows OWN comes before LAYOUTS, if it fits; MANY is for more.
LAYOUTS = {"16bit": Shape(16, 2048, 6), "int8": Shape(16, 2048, 6, 7, 4), "nf4": Shape(16, 1024, 7),
           "fp4": Shape(16, 1024, 7)}  # fmt: skip
OWN = {"int8": Shape(16, 128, 3, own=True), "nf4": Shape(16, 128, 2, 8, own=True),
       "fp4": Shape(16, 128, 2, 8, own=True)}  # fmt: skip
MANY = {"16bit": Shape(8, 2048, 6, fetchers=4), "int8": Shape(8, 2048, 6, fetchers=4),
        "nf4": Shape(8, 1024, 7, fetchers=4), "fp4": Shape(8, 1024, 7, fetchers=4)}  # fmt: skip
OWN_ROWS = 4
CLUSTERS = (1, 2, 4, 8)
FULL = 72 * 1024  # bytes of a ring that hide the time until x is there; for less of many rows the cluster grows
_FEWEST = 3  # slots


@lru_cache(maxsize=1024)
def shape(form: str, rows: int, columns: int, nested: bool) -> Shape | None:
    """The layout for a product; None if x does not fit into shared memory."""
    few = rows <= OWN_ROWS
    best: Shape | None = None
    if few and (own := OWN.get(form)) is not None:
        for alone in (own, own._replace(slots=2, table_shift=7)):
            if alone.serves(form, rows, columns, nested):
                return alone
    layout = (LAYOUTS if few else MANY)[form]
    for cluster, width in itertools.product(CLUSTERS, (layout.width, layout.width // 2)):
        tried = (
            layout._replace(cluster=cluster, width=width, slots=slots, fetchers=min(slots, layout.fetchers))
            for slots in range(layout.slots, _FEWEST - 1, -1)
        )
        found = next((one for one in tried if one.serves(form, rows, columns, nested)), None)
        if found is not None and (best is None or found.ring(form) > best.ring(form)):
            best = found
        if best is not None and (few or best.ring(form) >= FULL):
            break
    return best


def blocks(multiprocessors: int, cluster: int) -> int:
    """Of a grid that fills the GPU: its multiprocessors come in groups, into which clusters of four do not all fit."""
    usable = multiprocessors if cluster <= 2 else multiprocessors - multiprocessors // 11  # 30 of 33 on an H100
    return max(1, usable // cluster) * cluster
