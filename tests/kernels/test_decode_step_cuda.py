"""How the step's kernels are laid out on an SM, and that they compile."""

from __future__ import annotations

import pytest
import torch

from onegpu.errors import ArgumentError
from onegpu.kernels import decode_step as ops
from onegpu.kernels import decode_step_cuda as gpu
from tests.decode_structures import matrix
from tests.kernels.emulated_step import emulate
from tests.nvrtc_tools import needs_nvrtc

SIZES = [896, 2048, 4096, 4864, 8192, 11008, 14336]


@pytest.mark.parametrize("form", gpu._FORMATS)
@pytest.mark.parametrize("columns", SIZES)
def test_one_row_leaves_room_for_the_next_kernels_block(form: str, columns: int) -> None:
    found = gpu.shape(form, 1, columns, True)
    assert found is not None
    assert found.shared <= gpu._HALF
    assert found.slots >= 3


def test_rows_that_do_not_fit() -> None:
    assert gpu.shape("16bit", 8, 8192, False) is not None
    assert gpu.shape("16bit", 8, 14336, False) is None
    with pytest.raises(ArgumentError, match=r"rows=8.*shared memory"):
        gpu.product(
            "plain", "add", torch.empty(8, 14336), ops.Matrix("16bit", 14336, matrix_parts()), torch.empty(8, 4)
        )


def matrix_parts() -> tuple[ops.Part, ...]:
    return matrix("16bit", (4,), 64, torch.bfloat16).parts


def test_keys_are_cut_where_there_are_more_multiprocessors_than_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: 132)
    assert [gpu.splits(0, rows, kv) for rows, kv in ((1, 32), (1, 8), (1, 64), (8, 32), (4, 8))] == [4, 8, 2, 1, 4]


@pytest.mark.parametrize("fixed", [(4, 128, 2), (2, 64, 3)])
def test_any_layout_gives_the_product(fixed: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    for form in ("16bit", "nf4"):
        m = matrix(form, (40,), 192, torch.bfloat16)
        with monkeypatch.context() as patched:
            emulate(patched)
            patched.setattr(gpu, "_tiles", lambda rows: 2)
            out = torch.zeros(1, 40)
            gpu.product("plain", "add", x, m, out, fixed=fixed)
        torch.testing.assert_close(out, m.multiply(x.float()), rtol=2e-3, atol=2e-3)


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_the_kernels_compile(arch: str) -> None:
    common = {**gpu._COMMON, "BF16": 1, "SPLITS": 4, "HD": 128}
    for fmt in (0, 1, 2):
        shape = {"M": 1, "K": 4096, "WARPS": 8, "SLOTS": 4, "CB": 64, "TG": 8, "SOURCE": 0, "SINK": 2, "ACT": 0}
        assert gpu._kernel("product").variant(None, **common, **shape, FMT=fmt).compile(arch).code
    heads = {"GQ": 4, "HKV": 8, "ROT": 128, "NORMS": 1, "WARPS": 4, "STAGES": 3, "FMT": 0}
    assert gpu._kernel("attention").variant(None, **common, **heads).compile(arch).code
    assert gpu._kernel("embed").variant(None, **common, FMT=0).compile(arch).code
