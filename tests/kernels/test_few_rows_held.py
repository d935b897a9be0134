"""The kernel for two to eight rows of x and 4-bit weights: what it serves, its products and its machine code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from onegpu.kernels import few_rows
from onegpu.kernels.few_rows_held import Held
from onegpu.kernels.few_rows_table import CONFIGURATIONS
from onegpu.kernels.linear_4bit import linear_4bit
from tests.compare import assert_same_nonfinite
from tests.kernels import emulated, machine_code
from tests.kernels.test_few_rows import compare, four_bit, nested_of
from tests.matrices import activations
from tests.nvrtc_tools import needs_nvrtc

TABLE = [config for config in CONFIGURATIONS["4bit"] if isinstance(config, Held)]
COLUMNS = (896, 3072, 4096, 4544, 4864, 11008, 14336)


@pytest.mark.parametrize(
    ("config", "k", "warps", "served"),
    [
        (Held(2, 16), 4096, 16, True),
        (Held(4, 18), 4544, 18, True),
        (Held(4, 16, cluster=2), 11008, 11, True),
        (Held(8, 16), 11008, 16, False),  # 43 pieces
        (Held(8, 22, cluster=2, over=True), 11008, 22, True),
        (Held(8, 16, cluster=4, over=True), 14336, 14, True),
    ],
)
def test_a_warp_has_the_same_columns_of_all_rows(config: Held, k: int, warps: int, served: bool) -> None:
    whole = config.whole(0, k)
    assert whole.warps == warps and whole.serves(0, 4096, k, 132 // config.cluster) is served


@pytest.mark.parametrize(
    ("config", "nested", "n", "served"),
    [
        (Held(8, 16), 0, 132 * 64, True),  # as many sums as the table has room for
        (Held(8, 16), 0, 132 * 64 + 1, False),
        (Held(8, 16, over=True), 0, 22016, True),
        (Held(8, 16, over=True), 0, 32000, False),  # no shared memory for them
        (Held(4, 8, blocks=2), 1, 4096, False),  # codes of scales by themselves
        (Held(4, 8, blocks=2), 2, 4096, True),
    ],
)
def test_what_it_does_not_serve(config: Held, nested: int, n: int, served: bool) -> None:
    found = few_rows.fits(config, "4bit", nested, config.rows, n, 4096, False, 132, 227 * 1024)
    assert (found is not None) is served


# configuration, quant_type, nested, block size, M, N, K, dtype
CASES = [
    (Held(2, 4), "nf4", False, 64, 2, 71, 704, torch.bfloat16),  # a section ends within a piece
    (Held(2, 4, 3, early=0), "nf4", True, 64, 2, 75, 1280, torch.bfloat16),
    (Held(4, 4), "fp4", False, 128, 4, 70, 704, torch.float16),
    (Held(4, 4, cluster=2), "nf4", False, 64, 3, 71, 1664, torch.bfloat16),
    (Held(4, 3, cluster=4), "nf4", True, 64, 4, 75, 5888, torch.float16),
    (Held(8, 6), "nf4", False, 64, 8, 71, 704, torch.bfloat16),
    (Held(8, 4, cluster=2), "fp4", True, 64, 7, 139, 1792, torch.bfloat16),
    (Held(8, 8, over=True, cluster=2), "nf4", False, 4096, 8, 300, 3840, torch.bfloat16),
]


@emulated.needs_gxx
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_products_on_the_cpu(case: tuple) -> None:
    """Rows of x that differ by orders of magnitude have scales of their own."""
    config, quant_type, nested, blocksize, m, n, k, dtype = case
    packed, config = four_bit(n, k, "cpu", quant_type, nested, blocksize), config.whole(2 * nested, k)
    x, bias = activations((m, k), dtype), activations((n,), dtype, seed=5)
    if dtype == torch.bfloat16:
        x *= torch.tensor([1, 1e-3, 1e5, 1e-6, 1, 7, 1e5, 1][:m])[:, None].to(dtype)
    run = lambda x: emulated.product(  # noqa: E731
        config, "4bit", x, packed.weight, n, bias, packed.absmax, nested_of(packed), blocksize, quant_type
    )
    w, y = packed.dequantize(torch.float32), run(x)
    for row in range(m):
        compare(y[row : row + 1], x[row : row + 1], w, bias, f"row {row}")
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[m - 1, 7] = value
        assert_same_nonfinite(run(bad), F.linear(bad.float(), w, bias.float()), what=str(value))


@needs_nvrtc
@pytest.mark.parametrize("k", COLUMNS)
def test_no_registers_spill_and_nothing_is_read_before_the_wait(k: int) -> None:
    """With the warps that each size of the benchmarks gives it."""
    for nested in (0, 2) if k % 256 == 0 else (0,):
        for config in (config.whole(nested, k) for config in TABLE):
            if few_rows.fits(config, "4bit", nested, config.rows, 4096, k, False, 132, 227 * 1024) is None:
                continue
            code = few_rows.kernel(config, "4bit", True, False, nested, False).compile("sm_90a").code
            assert machine_code.stack_bytes(code) == 0, (config, nested)
            assert machine_code.copies_with_a_uniform_base(code) == 0, (config, nested)
            assert machine_code.reads_before_the_wait(code) == 0, (config, nested)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "fp4", "nested"])
@pytest.mark.parametrize("n_k", [(4099, 4096), (1003, 11008), (300, 4544), (515, 14336), (22016, 1024), (129, 64)])
def test_two_to_eight_rows_on_a_gpu(n_k: tuple[int, int], kind: str) -> None:
    n, k = n_k
    packed = four_bit(n, k, "cuda", "fp4" if kind == "fp4" else "nf4", kind == "nested")
    w, bias = packed.dequantize(torch.float32), activations((n,), torch.bfloat16, "cuda", seed=5)
    for dtype in (torch.bfloat16, torch.float16):
        for m in (2, 3, 4, 5, 8):
            x = activations((m, k), dtype, "cuda")
            y = linear_4bit(x, packed, bias.to(dtype))
            compare(y, x, w, bias.to(dtype))
            assert torch.equal(y, linear_4bit(x, packed, bias.to(dtype)))
            if dtype == torch.bfloat16:
                compare(linear_4bit(x * 1e5, packed, bias), x * 1e5, w, bias, "activations of 1e5")
