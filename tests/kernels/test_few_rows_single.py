"""The kernel for one row of x and 4-bit weights: what it serves, and its machine code."""

from __future__ import annotations

import pytest
import torch

from onegpu.kernels import few_rows
from onegpu.kernels.few_rows_single import Single
from onegpu.kernels.few_rows_table import CONFIGURATIONS
from onegpu.kernels.linear_4bit import linear_4bit
from tests.kernels import machine_code
from tests.kernels.test_few_rows import compare, four_bit
from tests.matrices import activations
from tests.nvrtc_tools import needs_nvrtc

TABLE = [config for config in CONFIGURATIONS["4bit"] if isinstance(config, Single)]
COLUMNS = (896, 3072, 4096, 4544, 4608, 4864, 11008, 14336, 18176)


@pytest.mark.parametrize(
    ("k", "warps", "served"),
    [(4096, 16, True), (11008, 11, True), (4544, 15, True), (18176, 18, True), (18496, 18, False), (64, 18, True)],
)
def test_a_warp_has_the_same_columns_of_all_rows(k: int, warps: int, served: bool) -> None:
    config = Single(18, 2, 4).whole(0, k)
    assert config.warps == warps and config.serves(0, 4096, k, 132) is served
    assert not served or warps % -(-k // 1024) == 0


@pytest.mark.parametrize(
    ("config", "nested", "n", "served"),
    [
        (Single(8, 2, 2), 0, 132 * 1024, True),  # as many sums as the table has room for
        (Single(8, 2, 2), 0, 132 * 1024 + 1, False),
        (Single(8, 2, 2), 1, 4096, False),  # codes of scales by themselves
        (Single(8, 2, 2, blocks=2), 2, 4096, True),
        (Single(16, 2, 2, blocks=2), 2, 4096, False),  # would spill
        (Single(24, 2, 2), 2, 4096, False),
    ],
)
def test_what_it_does_not_serve(config: Single, nested: int, n: int, served: bool) -> None:
    assert config.serves(nested, n, 4096, 132) is served
    found = few_rows.fits(config, "4bit", nested, 1, n, 4096, False, 132, 227 * 1024)
    assert (found is not None) is served


@needs_nvrtc
@pytest.mark.parametrize("k", COLUMNS)
def test_no_registers_spill_and_nothing_is_read_before_the_wait(k: int) -> None:
    """With the warps that each size of the benchmarks gives it."""
    for nested in (0, 2) if k % 256 == 0 else (0,):
        for config in (config.whole(nested, k) for config in TABLE):
            if not config.serves(nested, 4096, k, 132):
                continue
            code = few_rows.kernel(config, "4bit", True, False, nested, False).compile("sm_90a").code
            assert machine_code.stack_bytes(code) == 0, (config, nested)
            assert machine_code.copies_with_a_uniform_base(code) == 0, (config, nested)
            assert machine_code.reads_before_the_wait(code) == 0, (config, nested)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "fp4", "nested"])
@pytest.mark.parametrize(
    "n_k", [(17001, 4096), (4099, 4096), (1003, 4096), (300, 4544), (515, 18176), (22016, 1024), (129, 64)]
)
def test_one_row_on_a_gpu(n_k: tuple[int, int], kind: str) -> None:
    """Plain scales also where they are not at a multiple of 16 bytes."""
    n, k = n_k
    packed = four_bit(n, k, "cuda", "fp4" if kind == "fp4" else "nf4", kind == "nested")
    w, bias = packed.dequantize(torch.float32), activations((n,), torch.bfloat16, "cuda", seed=5)
    shifted = packed._replace(absmax=torch.cat([packed.absmax[:1], packed.absmax])[1:])
    for dtype in (torch.bfloat16, torch.float16):
        x = activations((1, k), dtype, "cuda")
        y = linear_4bit(x, packed, bias.to(dtype))
        compare(y, x, w, bias.to(dtype))
        assert kind == "nested" or torch.equal(y, linear_4bit(x, shifted, bias.to(dtype)))
        if dtype == torch.bfloat16:
            compare(linear_4bit(x * 1e5, packed, bias), x * 1e5, w, bias, "activations of 1e5")
