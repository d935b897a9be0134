"""How the products of decode_step_product.cu are laid out on an SM and over a cluster of blocks."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

from onegpu.kernels.few_rows_table import resident_clusters

FORMATS = {"16bit": 0, "int8": 1, "nf4": 2, "fp4": 2}
WHOLE = 232448 - 1024  # bytes of shared memory of a block on Hopper, less what the kernels' static arrays take
ALONE = 116736  # of an SM's 228 KiB, less 1 KiB a block: no second block fits beside one that has this
BOXES = 4  # of decode_step_product.cu
_SHIFT = 8  # of decode_step_held.cu: size of its table


def _bits(form: str) -> int:
    return 16 >> FORMATS[form]  # of a weight


class Shape(NamedTuple):
    """How a product is laid out.

    warps: of a block that multiply. fetchers: of those that fetch, unless each does for itself (own); at most as many
    as slots. width: bytes of a row of W in a piece, at most 512 if own. slots: pieces in the ring, or in a warp's own.
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


class Held(NamedTuple):
    """How decode_step_held.cu lays out a product of one to eight rows with a 4-bit matrix.

    rows: of x that fit: 2, 4 or 8. A piece is 2 * rows rows of 2048 / rows columns. warps: of a block, a multiple of
    the pieces of a row in it. slots: in a warp's ring. cluster: blocks that share the columns.
    """

    rows: int
    warps: int
    slots: int = 2
    cluster: int = 1

    @property
    def columns(self) -> int:
        """Of a piece."""
        return 2048 // self.rows

    def share(self, columns: int) -> int:
        """Columns of each block of the cluster but the last, which has what is left."""
        unit = self.columns * self.cluster
        return columns if self.cluster == 1 else -(-columns // unit) * self.columns

    def _tiles(self, outputs: int, multiprocessors: int) -> int:
        """Of a block, at most."""
        return -(-(outputs // (2 * self.rows)) // (blocks(multiprocessors, self.cluster) // self.cluster))

    def over(self, columns: int, outputs: int, multiprocessors: int) -> int:
        """Sums that the table has no room for."""
        pieces = -(-self.share(columns) // self.columns)
        return max(0, self._tiles(outputs, multiprocessors) * pieces * 2 * self.rows**2 - 8192)

    def constants(self, columns: int, outputs: int, multiprocessors: int) -> dict[str, int]:
        """Macros of the kernel."""
        over, sections = self.over(columns, outputs, multiprocessors), 8 // self.rows
        names = {"WARPS": self.warps, "DEPTH": self.slots, "SECT": sections, "CB": 128 * sections, "OVER": over}
        return {**names, "TABLE_SHIFT": _SHIFT, "CL": self.cluster, "SHARE": self.share(columns)}

    def shared(self, rows: int, columns: int, outputs: int, multiprocessors: int, direct: bool) -> int:
        """Bytes of shared memory: table, x and later sums, shares of the norm, rings, the cluster's sums.

        rows: of x; outputs: rows of the whole matrix; direct: x goes straight to registers.
        """
        pitch = -(-self.share(columns) * 2 // 128) * 128 + 16
        room = max(0 if direct else rows * pitch, 4 * self.over(columns, outputs, multiprocessors))
        values = (5 * rows + 1) * self.warps + 5 * rows * self.cluster * (self.cluster > 1) + rows
        x = -(-(-(-room // 16) * 16 + (values + 3) // 4 * 16 + 32) // 128) * 128
        sent = 4 * (self._tiles(outputs, multiprocessors) * 2 * self.rows + 2 * self.cluster) * self.rows
        return (256 << _SHIFT) + x + self.warps * self.slots * 2304 + sent * (self.cluster > 1)

    def serves(self, rows: int, columns: int, parts: tuple[int, ...], multiprocessors: int, direct: bool) -> bool:
        """Whether warps share the columns evenly, the parts' rows are whole tiles, and it fits."""
        share = self.share(columns)
        even = columns % 64 == 0 and rows <= self.rows and self.warps % -(-share // self.columns) == 0
        whole = all(part % (2 * self.rows) == 0 for part in parts) and (self.cluster - 1) * share < columns
        return even and whole and self.shared(rows, columns, sum(parts), multiprocessors, direct) <= WHOLE


class Bulk(NamedTuple):
    """How decode_step_bulk.cu lays out the product of one row with an int8 matrix.

    A piece is 2 * pairs rows of W of 8 * section columns. warps: of a block, a multiple of the pieces of a row. slots:
    in a warp's ring. section: 128 or 256 columns.
    """

    warps: int
    slots: int
    section: int = 128
    pairs: int = 1

    @property
    def constants(self) -> dict[str, int]:
        """Macros of the kernel."""
        names = {"WARPS": self.warps, "DEPTH": self.slots, "SECT": 8, "COLS": self.section, "RP": self.pairs}
        return {**names, "CB": 8 * self.section, "HALF": 1}

    def pieces(self, columns: int) -> int:
        """Of a row."""
        return -(-columns // (8 * self.section))

    def taken(self, columns: int, outputs: int, multiprocessors: int) -> int:
        """Pieces that a warp takes, at most."""
        tiles = -(-outputs // (multiprocessors * 2 * self.pairs))
        return -(-tiles * self.pieces(columns) // self.warps)

    def shared(self, columns: int, outputs: int, multiprocessors: int, direct: bool) -> int:
        """Bytes of shared memory, as the kernel divides it: x, shares of the norm, barriers, rings, sums.

        outputs: rows of all of W. direct: x is not normed, nor in parts.
        """
        x = (0 if direct else -(-columns * 2 // 128) * 128 + 16) + 4 * (6 * self.warps + 1)
        head = -(-(x + 15 + 8 * self.warps * self.slots) // 128) * 128
        rows = -(-outputs // multiprocessors) + 2 * self.pairs + 1
        return head + self.warps * self.slots * 16 * self.pairs * self.section + 4 * rows * self.pieces(columns)


# Up to how many rows -> format -> layouts: the first that fits is taken. They measured best for Llama-2-7B's products
# on an H100 (docs/worklog.md). Fewer slots will do, down to one a fetching warp.
LAYOUTS: dict[int, dict[str, tuple[Shape, ...]]] = {
    4: {"16bit": (Shape(16, 2048, 6, fetchers=2),),
        "int8": (Shape(16, 128, 3, own=True), Shape(16, 128, 2, own=True), Shape(16, 2048, 6, 7, 4)),
        "nf4": (Shape(16, 128, 2, 8, own=True), Shape(16, 128, 2, own=True), Shape(16, 1024, 7, fetchers=4))},
    8: {"16bit": (Shape(16, 2048, 5, cluster=2, fetchers=4), Shape(8, 1024, 8, cluster=4, fetchers=4)),
        "int8": (Shape(16, 1024, 8, cluster=2, fetchers=4),),
        "nf4": (Shape(8, 1024, 7, cluster=2, fetchers=4),)},
    16: {"16bit": (Shape(16, 2048, 4, cluster=4, fetchers=4), Shape(8, 1408, 4, cluster=4, fetchers=4),
                   Shape(8, 1024, 6, cluster=4, fetchers=4)),
         "int8": (Shape(16, 1024, 6, cluster=2, fetchers=4), Shape(8, 1408, 4, cluster=4, fetchers=4),
                  Shape(8, 1024, 6, cluster=4, fetchers=4)),
         "nf4": (Shape(16, 1024, 4, cluster=2, fetchers=4), Shape(8, 1024, 5, cluster=2, fetchers=4),
                 Shape(12, 128, 2, own=True, cluster=4), Shape(8, 1024, 4, cluster=4, fetchers=4),
                 Shape(8, 512, 8, cluster=4, fetchers=4))},
}  # fmt: skip
# What comes before them for a matrix of at most SMALL bytes, whose blocks have too few tiles to stream.
SMALL_LAYOUTS = {8: {"int8": Shape(16, 128, 3, own=True, cluster=2), "nf4": Shape(16, 128, 2, 8, own=True, cluster=2)},
                 16: {"int8": Shape(16, 128, 2, own=True, cluster=2)}}  # fmt: skip
SMALL = 20 * 2**20
CLUSTERS = (1, 2, 4, 8)
FULL = 48 * 1024  # bytes of a ring that hide the time until x is there; for less of many rows the cluster grows
_FEWEST = 3  # slots


@lru_cache(maxsize=1024)
def shape(form: str, rows: int, columns: int, nested: bool, outputs: int) -> Shape | None:
    """The layout for a product with a matrix ``[outputs, columns]``; None if x does not fit into shared memory."""
    most, kind = next(most for most in LAYOUTS if rows <= most), "nf4" if form == "fp4" else form
    layouts, small = LAYOUTS[most][kind], SMALL_LAYOUTS.get(most, {}).get(kind)
    if small is not None and outputs * columns * _bits(form) // 8 <= SMALL and small == _narrowed(small, form, columns):
        layouts = (small, *layouts)
    for layout in layouts:
        narrowed = _narrowed(layout, form, columns)
        if narrowed is not None and (found := _with_slots(narrowed, form, rows, columns, nested)) is not None:
            return found
    best: Shape | None = None
    for cluster, width in itertools.product(CLUSTERS, (layouts[-1].width, layouts[-1].width // 2)):
        tried = layouts[-1]._replace(cluster=cluster, width=width)
        other = _with_slots(tried, form, rows, columns, nested, _FEWEST)
        if other is not None and (best is None or other.ring(form) > best.ring(form)):
            best = other
        if best is not None and best.ring(form) >= FULL:
            break
    return best


def _narrowed(layout: Shape, form: str, columns: int) -> Shape | None:
    """With fewer blocks in a cluster where each would have at most half a piece of a row. In a cluster, where a sum is
    of one tile, with as many warps as share its own pieces evenly; None if those are few, or most would have none."""
    piece = layout.width * 8 // _bits(form)
    while layout.cluster > 1 and 2 * layout.share(form, columns) <= piece:
        layout = layout._replace(cluster=layout.cluster // 2)
    if not layout.own or layout.cluster == 1:
        return layout
    pieces = -(-layout.share(form, columns) // piece)
    warps = layout.warps // pieces * pieces
    return layout._replace(warps=warps) if 2 * pieces >= layout.warps and 4 * warps >= 3 * layout.warps else None


def _with_slots(
    layout: Shape, form: str, rows: int, columns: int, nested: bool, fewest: int | None = None
) -> Shape | None:
    """With as many slots as fit, up to its own; None if there is no room for one a fetching warp, or the fewest."""
    fewest = fewest or (layout.slots if layout.own else max(_FEWEST, layout.fetchers))
    tried = (
        layout._replace(slots=slots, fetchers=min(slots, layout.fetchers))
        for slots in range(layout.slots, fewest - 1, -1)
    )
    return next((one for one in tried if one.serves(form, rows, columns, nested)), None)


@lru_cache(maxsize=1024)
def held(rows: int, columns: int, parts: tuple[int, ...], multiprocessors: int, direct: bool) -> Held | None:
    """The layout for up to eight rows and a 4-bit matrix whose parts have so many rows; None: LAYOUTS has it.

    As many of 16 warps as share a row's pieces evenly. On an H100 (docs/worklog.md) half as many blocks in a cluster as
    rows fit were best, and two for two rows of a small matrix; three slots but for a small matrix.
    """
    most = next((most for most in (2, 4, 8) if rows <= most), None)
    if most is None:
        return None
    small = sum(parts) * columns // 2 <= SMALL
    first, slots = max(most // 2, min(2, rows)) if small else most // 2, 2 if small else 3
    for cluster in sorted(CLUSTERS, key=lambda cluster: (cluster < first, abs(cluster - first))):
        warps = 16 // (pieces := -(-columns * most // (2048 * cluster))) * pieces
        for ring in range(slots, 1, -1):
            tried = Held(most, warps, ring, cluster)
            if warps and tried.serves(rows, columns, parts, multiprocessors, direct):
                return tried
    return None


@lru_cache(maxsize=1024)
def bulk(columns: int, outputs: int, multiprocessors: int, direct: bool) -> Bulk | None:
    """The layout for one row and an int8 matrix: as many of 16 warps as share a row's pieces evenly, and rings of half
    of what a warp takes, if they fit: more of it would stand before the loads of x. Where each warp has a piece of
    every row, pieces of four rows. Arguments as of `Bulk.shared`. None where LAYOUTS has it."""
    for section, pairs in ((128, 2), (128, 1), (256, 1)):
        pieces = Bulk(0, 0, section).pieces(columns)
        one = Bulk(16 // pieces * pieces, 0, section, pairs)
        if columns % 64 or not one.warps or (pairs == 2 and one.warps > pieces):
            continue
        most = max(2, -(-one.taken(columns, outputs, multiprocessors) // 2))
        tried = (one._replace(slots=slots) for slots in range(most, 1, -1))
        fitting = (new for new in tried if new.shared(columns, outputs, multiprocessors, direct) <= WHOLE)
        if (found := next(fitting, None)) is not None:
            return found
    return None


def blocks(multiprocessors: int, cluster: int) -> int:
    """Of a grid that fills the GPU, in clusters."""
    return resident_clusters(multiprocessors, cluster) * cluster
