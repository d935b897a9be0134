"""How the step's products are laid out on an SM and over clusters."""

from __future__ import annotations

import pytest

from onegpu.kernels import decode_step_layouts as layouts
from onegpu.kernels.decode_step_layouts import Shape

SIZES = [896, 2048, 4096, 4544, 4864, 8192, 11008, 14336, 28672]


@pytest.mark.parametrize("form", layouts.FORMATS)
@pytest.mark.parametrize("columns", SIZES[:-1])
def test_one_row_takes_the_layout_of_its_format(form: str, columns: int) -> None:
    found = layouts.shape(form, 1, columns, True)
    assert found is not None
    best = layouts.OWN.get(form, layouts.LAYOUTS[form])
    assert found._replace(slots=0) == best._replace(slots=0)
    assert found.slots >= (2 if found.own else 3)
    assert found.shared(form, 1, columns, True) <= layouts.WHOLE


@pytest.mark.parametrize("form", layouts.FORMATS)
@pytest.mark.parametrize("rows", range(2, 17))
def test_more_rows_have_a_layout_too(form: str, rows: int) -> None:
    for columns in SIZES:
        found = layouts.shape(form, rows, columns, True)
        assert found is not None, columns
        assert found.serves(form, rows, columns, True)
        assert found.cluster <= (1 if columns <= 4864 and rows <= 8 else 8)
        assert found.group(rows) * 16 * rows <= found.warps * 32  # a thread finishes one sum


def test_a_cluster_grows_until_the_ring_hides_the_time_that_x_takes() -> None:
    for columns, cluster in ((4096, 2), (11008, 4)):
        found = layouts.shape("16bit", 16, columns, False)
        assert found is not None
        assert found.cluster == cluster
        assert found.ring("16bit") >= layouts.FULL
    assert layouts.shape("16bit", 16, 65536, False) is None


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
