"""How the step's products are laid out on an SM and over clusters."""

from __future__ import annotations

import pytest

from onegpu.kernels import decode_step_layouts as layouts
from onegpu.kernels.decode_step_layouts import Bulk, Shape, Single

SIZES = [896, 2048, 4096, 4544, 4864, 8192, 11008, 14336, 28672]


@pytest.mark.parametrize("form", layouts.FORMATS)
@pytest.mark.parametrize("columns", SIZES[:-1])
def test_one_row_takes_the_layout_of_its_format(form: str, columns: int) -> None:
    found = layouts.shape(form, 1, columns, True, 4096)
    assert found is not None
    best = layouts.LAYOUTS[4]["nf4" if form == "fp4" else form][0]
    assert found._replace(slots=0) == best._replace(slots=0)
    assert found.slots >= (2 if found.own else 3)
    assert found.shared(form, 1, columns, True) <= layouts.WHOLE


@pytest.mark.parametrize("form", layouts.FORMATS)
@pytest.mark.parametrize("rows", range(1, 17))
def test_any_number_of_rows_has_a_layout(form: str, rows: int) -> None:
    for columns in SIZES:
        for outputs in (1024, 28672):
            found = layouts.shape(form, rows, columns, True, outputs)
            assert found is not None, columns
            assert found.serves(form, rows, columns, True)
            assert found.own or found.fetchers <= found.slots
            assert found.cluster == 1 or columns > 1024
            assert found.group(rows) * 16 * rows <= found.warps * 32  # a thread finishes one sum


# Of Llama-2-7B: format, rows, outputs, columns -> what measured best.
MEASURED = [
    ("16bit", 1, 12288, 4096, Shape(16, 2048, 6, fetchers=2)),
    ("16bit", 1, 4096, 11008, Shape(16, 2048, 5, fetchers=2)),
    ("16bit", 8, 22016, 4096, Shape(16, 2048, 5, cluster=2, fetchers=4)),
    ("16bit", 8, 4096, 11008, Shape(8, 1024, 8, cluster=4, fetchers=4)),
    ("16bit", 16, 22016, 4096, Shape(16, 2048, 4, cluster=4, fetchers=4)),
    ("16bit", 16, 4096, 11008, Shape(8, 1408, 4, cluster=4, fetchers=4)),
    ("int8", 8, 4096, 4096, Shape(16, 128, 3, own=True, cluster=2)),
    ("int8", 8, 12288, 4096, Shape(16, 1024, 8, cluster=2, fetchers=4)),
    ("int8", 8, 4096, 11008, Shape(16, 1024, 6, cluster=2, fetchers=4)),
    ("int8", 16, 4096, 4096, Shape(16, 128, 2, own=True, cluster=2)),
    ("int8", 16, 12288, 4096, Shape(16, 1024, 6, cluster=2, fetchers=4)),
    ("int8", 16, 4096, 11008, Shape(8, 1408, 4, cluster=4, fetchers=4)),
    ("nf4", 8, 4096, 4096, Shape(16, 128, 2, 8, own=True, cluster=2)),
    ("nf4", 8, 12288, 4096, Shape(8, 1024, 7, cluster=2, fetchers=4)),
    ("nf4", 8, 4096, 11008, Shape(8, 1024, 4, cluster=2, fetchers=4)),
    ("fp4", 16, 4096, 4096, Shape(16, 1024, 4, cluster=2, fetchers=4)),
    ("nf4", 16, 4096, 11008, Shape(11, 128, 2, own=True, cluster=4)),
]


@pytest.mark.parametrize(("form", "rows", "outputs", "columns", "best"), MEASURED)
def test_what_measured_best_is_taken(form: str, rows: int, outputs: int, columns: int, best: Shape) -> None:
    assert layouts.shape(form, rows, columns, False, outputs) == best


@pytest.mark.parametrize("form", layouts.FORMATS)
def test_a_cluster_grows_until_the_ring_hides_the_time_that_x_takes(form: str) -> None:
    found = layouts.shape(form, 16, 28672, False, 8192)
    assert found is not None
    assert found.cluster == 8
    assert found.ring(form) >= layouts.FULL
    assert layouts.shape(form, 16, 65536, False, 8192) is None


def test_own_pieces_go_around_as_many_warps_as_share_them_evenly() -> None:
    found = {columns: layouts.shape("nf4", 16, columns, False, 4096) for columns in (8192, 10240, 11008, 13824)}
    assert {columns: (one.own, one.warps) for columns, one in found.items() if one is not None} == {
        8192: (False, 8), 10240: (True, 10), 11008: (True, 11), 13824: (False, 8),
    }  # fmt: skip


@pytest.mark.parametrize("form", layouts.FORMATS)
@pytest.mark.parametrize("cluster", layouts.CLUSTERS)
def test_the_blocks_of_a_cluster_share_all_columns(form: str, cluster: int) -> None:
    made = Shape(16, 1024, 3, cluster=cluster)
    for columns in SIZES:
        share = made.share(form, columns)
        assert share * cluster >= columns
        assert cluster == 1 or share % (256 if layouts.FORMATS[form] == 2 else 64) == 0
    assert not Shape(16, 1024, 3, cluster=8).serves("nf4", 16, 1792, False)  # the last would have none
    assert Shape(16, 1024, 3, cluster=8).serves("nf4", 16, 2048, False)


def test_grids_leave_out_what_clusters_do_not_fill() -> None:
    assert [layouts.blocks(132, cluster) for cluster in layouts.CLUSTERS] == [132, 132, 120, 120]
    assert [layouts.blocks(3, cluster) for cluster in layouts.CLUSTERS] == [3, 2, 4, 8]


def test_one_row_of_four_bits_goes_to_warps_that_share_its_pieces_evenly() -> None:
    wide, down = layouts.single(4096, (11008, 11008), 132), layouts.single(11008, (4096, 8192), 132)
    assert wide is not None
    assert down is not None
    assert wide == layouts.single(4096, (4096,), 132) == Single(16)
    assert down == Single(11)
    for columns, pieces in ((2048, 2), (3584, 4), (5120, 5), (8192, 8), (10240, 10), (14336, 14), (16384, 16)):
        found = layouts.single(columns, (4096, 1024), 132)
        assert found is not None, columns
        assert found.warps % pieces == 0
        assert 9 <= found.warps <= 16
        assert found.shared(columns, 5120, 132) <= layouts.WHOLE


def test_what_does_not_share_evenly_has_no_layout_of_its_own() -> None:
    assert layouts.single(4544, (4096,), 132) is None  # scales of 256 columns
    assert layouts.single(18944, (18944,), 132) is None  # 19 pieces, 16 warps
    assert layouts.single(4096, (4096, 1026), 132) is None  # whole tiles of a matrix
    assert not Single(16, 6).serves(4096, (4096,), 132)  # shared memory


# Columns and rows of W, whether x is read as it is -> what measured best (Llama-2-7B's), and what others get.
BULK = [
    (4096, 12288, False, Bulk(16, 6)),
    (4096, 4096, False, Bulk(16, 2)),
    (4096, 22016, False, Bulk(16, 6)),
    (11008, 4096, True, Bulk(11, 4, pairs=2)),
    (16384, 4096, True, Bulk(16, 3, pairs=2)),
    (28672, 8192, True, Bulk(14, 3, 256)),
    (896, 9728, False, Bulk(16, 2)),
]


@pytest.mark.parametrize(("columns", "outputs", "direct", "best"), BULK)
def test_one_row_of_int8_goes_to_warps_that_share_its_pieces_evenly(
    columns: int, outputs: int, direct: bool, best: Bulk
) -> None:
    assert layouts.bulk(columns, outputs, 132, direct) == best
    assert best.warps % best.pieces(columns) == 0
    assert best.shared(columns, outputs, 132, direct) <= layouts.WHOLE


def test_one_row_of_int8_that_no_warps_share_evenly() -> None:
    assert layouts.bulk(4112, 4096, 132, True) is None  # whole chunks of 64 columns
    assert layouts.bulk(40960, 4096, 132, True) is None  # 20 pieces, 16 warps
