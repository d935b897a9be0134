"""The kernel for one to eight rows of x and 4-bit weights: what it serves, its products and its machine code."""

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
COLUMNS = (896, 3072, 4096, 4544, 4864, 5120, 11008, 14336, 18176)


def whole(config: Held, nested: int, n: int, k: int) -> Held:
    return config.whole(nested, n, k, few_rows.resident_clusters(132, config.cluster))


@pytest.mark.parametrize(
    ("config", "k", "warps", "served"),
    [
        (Held(2, 18), 4096, 16, True),
        (Held(2, 18), 18176, 18, True),
        (Held(2, 18), 18496, 18, False),
        (Held(4, 18), 4544, 18, True),
        (Held(4, 16, cluster=2), 11008, 11, True),
        (Held(8, 16), 11008, 16, False),  # 43 pieces
        (Held(8, 22, cluster=2), 11008, 22, True),
        (Held(8, 16, cluster=4), 14336, 14, True),
        (Held(8, 16), 64, 16, True),
    ],
)
def test_a_warp_has_the_same_columns_of_all_rows(config: Held, k: int, warps: int, served: bool) -> None:
    found = whole(config, 0, 4096, k)
    assert found.warps == warps and found.serves(0, 4096, k, 132 // config.cluster) is served


@pytest.mark.parametrize(
    ("config", "nested", "n", "served"),
    [
        (Held(8, 16), 0, 132 * 64, True),  # as many sums as the table has room for
        (Held(8, 16), 0, 132 * 64 + 1, False),
        (Held(8, 16, over=True), 0, 22016, True),
        (Held(8, 16, over=True), 0, 32000, False),  # no shared memory for them
        (Held(4, 8, blocks=2), 2, 4096, True),
        (Held(4, 10, blocks=2), 1, 4096, False),  # not as many warps as share the pieces evenly
        (Held(4, 18), 2, 9 * 512, False),  # would spill
    ],
)
def test_what_it_does_not_serve(config: Held, nested: int, n: int, served: bool) -> None:
    found = few_rows.fits(config, "4bit", nested, config.rows, n, 4096, False, 132, 227 * 1024)
    assert (found is not None) is served


def test_sums_for_which_the_table_has_no_room_go_elsewhere() -> None:
    assert [whole(Held(8, 16), 0, n, 4096).over for n in (132 * 64, 132 * 64 + 1)] == [False, True]


def test_too_few_warps_and_columns_that_are_padding_cost() -> None:
    even, few, padded = (whole(Held(4, 16), 0, 4096, k).price for k in (4096, 4608, 4544))
    assert even == 1.0 and few == pytest.approx(11 / 9) and padded > few


# configuration, quant_type, nested, block size, M, N, K, dtype
CASES = [
    (Held(2, 4), "nf4", False, 64, 1, 71, 704, torch.bfloat16),  # a section ends within a piece
    (Held(2, 4, early=0, slots=3), "nf4", True, 64, 2, 75, 1280, torch.bfloat16),
    (Held(2, 3), "fp4", True, 64, 1, 50, 2304, torch.float16),
    (Held(2, 3), "nf4", True, 64, 1, 50, 2112, torch.bfloat16),  # codes that are not whole words from here
    (Held(2, 2, cluster=2), "nf4", True, 128, 2, 71, 3776, torch.float16),
    (Held(2, 3), "fp4", False, 4096, 1, 50, 2112, torch.float16),
    (Held(4, 4), "fp4", False, 128, 4, 70, 704, torch.float16),
    (Held(4, 4, cluster=2), "nf4", False, 64, 3, 71, 1664, torch.bfloat16),
    (Held(4, 3, cluster=4), "nf4", True, 64, 4, 75, 5888, torch.float16),
    (Held(4, 4), "nf4", True, 4096, 3, 71, 704, torch.bfloat16),
    (Held(8, 6), "nf4", False, 64, 8, 71, 704, torch.bfloat16),
    (Held(8, 6), "fp4", True, 64, 5, 71, 1472, torch.bfloat16),
    (Held(8, 4, cluster=2), "fp4", True, 64, 7, 139, 1792, torch.bfloat16),
    (Held(8, 8, over=True, cluster=2), "nf4", False, 4096, 8, 300, 3840, torch.bfloat16),
]


@emulated.needs_gxx
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_products_on_the_cpu(case: tuple) -> None:
    """Rows of x that differ by orders of magnitude have scales of their own."""
    config, quant_type, nested, blocksize, m, n, k, dtype = case
    packed = four_bit(n, k, "cpu", quant_type, nested, blocksize)
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
    """With the warps that each size of the benchmarks gives it, and sums in both places where they are many."""
    for n, nested in ((4096, 0), (22016, 0), (4096, 2 if k % 256 == 0 else 1)):
        for m in (2, 4, 8):
            config = few_rows.choose("4bit", nested, m, n, k, False, 132, 227 * 1024, 9)[0]
            if not isinstance(config, Held):
                continue
            code = few_rows.kernel(config, "4bit", True, False, nested, False).compile("sm_90a").code
            assert machine_code.stack_bytes(code) == 0, (config, nested)
            assert machine_code.copies_with_a_uniform_base(code) == 0, (config, nested)
            assert machine_code.reads_before_the_wait(code) == 0, (config, nested)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "fp4", "nested", "nested 128"])
@pytest.mark.parametrize(
    "n_k",
    [(17001, 4096), (4099, 4096), (1003, 11008), (300, 4544), (515, 14336), (75, 18176), (30, 28672), (22016, 1024),
     (129, 64)],
)  # fmt: skip
def test_one_to_eight_rows_on_a_gpu(n_k: tuple[int, int], kind: str) -> None:
    """Plain scales also where they are not at a multiple of 16 bytes."""
    n, k = n_k
    blocksize = 128 if kind.endswith("128") and k % 128 == 0 else 64
    packed = four_bit(n, k, "cuda", "fp4" if kind == "fp4" else "nf4", kind.startswith("nested"), blocksize)
    w, bias = packed.dequantize(torch.float32), activations((n,), torch.bfloat16, "cuda", seed=5)
    shifted = packed._replace(absmax=torch.cat([packed.absmax[:1], packed.absmax])[1:])
    for dtype in (torch.bfloat16, torch.float16):
        for m in (1, 2, 3, 4, 5, 8):
            x = activations((m, k), dtype, "cuda")
            y = linear_4bit(x, packed, bias.to(dtype))
            compare(y, x, w, bias.to(dtype), f"M {m}")
            assert torch.equal(y, linear_4bit(x, packed, bias.to(dtype)))
            if dtype == torch.bfloat16:
                compare(linear_4bit(x * 1e5, packed, bias), x * 1e5, w, bias, "activations of 1e5")
        compare(linear_4bit(x, shifted, bias.to(dtype)), x, w, bias.to(dtype), "scales elsewhere")
