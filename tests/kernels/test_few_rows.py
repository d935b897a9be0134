"""The few-row kernels: their text, run on the CPU, and on a GPU, gives the product."""

from __future__ import annotations

import functools
from math import inf

import pytest
import torch
import torch.nn.functional as F

from onegpu import functional
from onegpu.kernels import few_rows
from onegpu.kernels.few_rows_held import Held
from onegpu.kernels.few_rows_stream import Stream
from onegpu.kernels.few_rows_table import CONFIGURATIONS, Config, Direct, Narrow, Resident, Wide
from onegpu.kernels.linear_4bit import Packed4bit, linear_4bit
from onegpu.kernels.linear_16bit import linear_16bit, ours_is_faster
from onegpu.kernels.linear_int8 import linear_int8
from tests.compare import assert_close, assert_same_nonfinite
from tests.kernels import emulated, machine_code
from tests.matrices import activations
from tests.nvrtc_tools import needs_nvrtc

SIZES = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]


def four_bit(
    n: int, k: int, device: str, quant_type: str = "nf4", nested: bool = False, blocksize: int = 64
) -> Packed4bit:
    A = torch.randn(n, k, generator=torch.Generator().manual_seed(3)).mul(0.05).to(device)
    packed, state = functional.quantize_4bit(A, quant_type=quant_type, compress_statistics=nested, blocksize=blocksize)
    return state.packed(packed)


def nested_of(packed: Packed4bit) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    if packed.nested_absmax is None:
        return None
    code = functional.create_dynamic_map() if packed.nested_code is None else packed.nested_code
    return packed.nested_absmax, code, packed.offset


def compare(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, what: str = "") -> None:
    reference = F.linear(x.float(), w, None if bias is None else bias.float())
    reordered = x.flip(-1) @ w.to(x.dtype).flip(-1).t()
    assert_close(y, reference, reordered if bias is None else reordered + bias, what=what)


# (configuration, quant_type, nested, block size, M, N, K, dtype)
FOUR_BIT = [
    (Narrow(4, 4, 2, 64, 2, table_shift=7), "fp4", True, 64, 3, 70, 704, torch.float16),
    (Wide(2, 2, 2, 2, 128, 3), "nf4", True, 128, 13, 150, 704, torch.bfloat16),
    (Wide(1, 1, 2, 2, 128, 3, cluster=2, table_shift=7), "fp4", True, 32, 5, 70, 704, torch.float16),
    (Wide(2, 1, 4, 1, 128, 3, wgmma=True), "nf4", True, 64, 13, 150, 704, torch.bfloat16),
    (Wide(1, 1, 4, 2, 128, 3, cluster=2, wgmma=True), "fp4", True, 32, 5, 70, 704, torch.float16),
    (Resident(2, 1, 2, 128, 3, early=2), "nf4", False, 64, 13, 150, 704, torch.bfloat16),
    (Resident(4, 1, 1, 64, 2, cluster=2), "fp4", True, 128, 29, 70, 704, torch.float16),
    (Resident(1, 2, 1, 128, 2), "nf4", True, 64, 7, 150, 704, torch.bfloat16),
    (Resident(1, 1, 2, 128, 2, cluster=2), "nf4", True, 64, 7, 70, 1280, torch.bfloat16),  # words of codes from here
    (Resident(2, 2, 1, 64, 2), "fp4", True, 64, 9, 75, 768, torch.bfloat16),
    (Wide(1, 1, 4, 2, 256, 2, cluster=2, wgmma=True), "nf4", True, 64, 8, 70, 1280, torch.bfloat16),
    (Wide(1, 1, 2, 2, 128, 2), "nf4", True, 64, 3, 70, 768, torch.bfloat16),
    (Resident(2, 1, 2, 64, 2, cluster=4), "nf4", False, 64, 13, 150, 2048, torch.bfloat16),
    (Narrow(1, 5, 2, 64, 3, table_shift=7), "nf4", True, 64, 1, 150, 1280, torch.bfloat16),
]


@emulated.needs_gxx
@pytest.mark.parametrize("case", FOUR_BIT, ids=[f"{type(c[0]).__name__}-{c[1]}-{i}" for i, c in enumerate(FOUR_BIT)])
def test_4_bit_kernels_on_the_cpu(case: tuple) -> None:
    config, quant_type, nested, blocksize, m, n, k, dtype = case
    packed = four_bit(n, k, "cpu", quant_type, nested, blocksize)
    x, bias = activations((m, k), dtype), activations((n,), dtype, seed=5)
    run = lambda x: emulated.product(  # noqa: E731
        config, "4bit", x, packed.weight, n, bias, packed.absmax, nested_of(packed), blocksize, quant_type
    )
    w = packed.dequantize(torch.float32)
    compare(run(x), x, w, bias)
    if dtype == torch.bfloat16:
        big = x * 1e5
        compare(run(big), big, w, bias, "activations of 1e5")
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[m - 1, 7] = value
        y, reference = run(bad), F.linear(bad.float(), w, bias.float())
        assert_same_nonfinite(y, reference, what=str(value))


@emulated.needs_gxx
@pytest.mark.parametrize(
    "config",
    [
        Narrow(4, 4, 3, 64, 2),
        Narrow(8, 4, 2, 128, 1, cluster=2),
        Direct(1, 4, 2, 3, 2),
        Direct(2, 4, 4, 2, 1),
        Direct(8, 2, 2, 2, 1),
        Wide(2, 1, 2, 1, 64, 3),
        Wide(2, 1, 4, 1, 128, 2, cluster=2, wgmma=True),
        Resident(2, 1, 2, 128, 2, cluster=2),
        Resident(2, 1, 1, 128, 2, cluster=4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_kernels_on_the_cpu(config: Config, dtype: torch.dtype) -> None:
    n, k = (70, 752) if config.cluster < 4 else (300, 1008)  # three tiles, which meet twice
    m = min(config.rows, 9)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    SCB = torch.rand(n, generator=torch.Generator().manual_seed(2)) + 0.1
    x, bias = activations((m, k), dtype), activations((n,), dtype, seed=5)
    compare(emulated.product(config, "int8", x, weight, n, bias, SCB), x, weight.float() * SCB[:, None] / 127, bias)


@emulated.needs_gxx
@pytest.mark.parametrize("config", [Narrow(1, 4, 3, 64, 2), Narrow(8, 4, 2, 128, 1, cluster=2), Direct(2, 4, 2, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_kernels_on_the_cpu(config: Config, dtype: torch.dtype) -> None:
    n, k, m = 70, 520, config.rows
    w, x, bias = activations((n, k), dtype, seed=4) * 0.05, activations((m, k), dtype), activations((n,), dtype, seed=5)
    compare(emulated.product(config, "16bit", x, w, n, bias, None), x, w.float(), bias)


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a"])
def test_compiles(arch: str) -> None:
    for fmt, configurations in CONFIGURATIONS.items():
        able = [c for c in configurations if arch == "sm_90a" or (c.cluster == 1 and not getattr(c, "wgmma", False))]
        for config in able[:1] + able[-1:]:
            assert few_rows.kernel(config, fmt, True, False, 2 * (fmt == "4bit"), False).compile(arch).code


@needs_nvrtc
@pytest.mark.parametrize("fmt", few_rows.FORMATS)
def test_no_registers_spill_no_copy_is_encoded_wrongly_and_no_sum_is_read_early(fmt: str) -> None:
    for config in CONFIGURATIONS[fmt]:
        if isinstance(config, (Held, Stream)):
            continue  # have tests of their own, with the warps that sizes give them, and stages
        if config.cluster == 1 and isinstance(config, Wide) and not config.wgmma:
            continue  # for GPUs before Hopper
        nested = 2 if fmt == "4bit" and config.nested < inf else 0  # which needs more registers than plain scales
        code = few_rows.kernel(config, fmt, True, False, nested, False).compile("sm_90a").code
        assert machine_code.stack_bytes(code) == 0, config
        assert machine_code.copies_with_a_uniform_base(code) == 0, config
        assert (machine_code.reads_before_the_wait(code) == 0) == (config.early > 0), config
        assert not isinstance(config, Direct) or machine_code.static_shared(code) <= 1024, config
        if not isinstance(config, Narrow):
            assert machine_code.sums_copied_early(code, config.rows // 2) == 0, config


def random_weights(fmt: str, n: int, k: int, nested: bool, seed: int) -> tuple[torch.Tensor, functools.partial]:
    """On the GPU: W as float32, about one in size when multiplied with K columns, and the product with it."""
    on = torch.Generator("cuda").manual_seed(seed)
    if fmt == "int8":
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda", generator=on)
        SCB = (torch.rand(n, device="cuda", generator=on) + 0.5) * 1.5 / k**0.5
        return codes.float() * SCB[:, None] / 127, functools.partial(linear_int8, weight=codes, SCB=SCB, exact=False)
    if fmt == "16bit":
        w = torch.randn(n, k, device="cuda", generator=on).div(k**0.5).bfloat16()
        return w.float(), functools.partial(linear_16bit, weight=w)
    blocks = (torch.rand(n * k // 64, device="cuda", generator=on) + 0.5) * 1.5 / k**0.5
    codes = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, device="cuda", generator=on)
    packed = Packed4bit(codes, blocks, 64, "nf4", (n, k))
    if nested:
        packed = packed._replace(
            absmax=torch.randint(0, 256, (n * k // 64,), dtype=torch.uint8, device="cuda", generator=on),
            nested_absmax=torch.rand(-(-blocks.numel() // 256), device="cuda", generator=on) / k**0.5,
            offset=torch.full((), 1.5 / k**0.5, device="cuda"),
        )
    return packed.dequantize(torch.float32), functools.partial(linear_4bit, packed=packed)


def assert_planned(fmt: str, x: torch.Tensor, n: int, nested: bool) -> None:
    """That a configuration serves this product of `random_weights`: else the op takes another way, untested."""
    quantised = few_rows._nested(nested, x.shape[1], 64, 256)
    assert few_rows.plan(fmt, x.shape[0], n, x.shape[1], True, False, quantised, False, x.get_device()) is not None, n


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize(("fmt", "nested"), [("16bit", False), ("int8", False), ("4bit", False), ("4bit", True)])
def test_products_that_start_early_read_what_the_one_before_wrote(fmt: str, nested: bool, rows: int) -> None:
    """A chain of twelve, each the next one's x, in one graph and one by one: the same bits, many times."""
    if fmt == "16bit" and not ours_is_faster(rows, 4096, 4096):
        pytest.skip("cuBLAS has them")
    layers = [random_weights(fmt, 4096, 4096, nested, seed)[1] for seed in range(12)]
    x = activations((rows, 4096), torch.bfloat16, "cuda")
    expected = x
    for run in layers:
        expected = run(expected)
        torch.cuda.synchronize()
    assert expected.isfinite().all() and expected.abs().max() > 0
    graph, y = torch.cuda.CUDAGraph(), x
    with torch.cuda.graph(graph):
        for run in layers:
            y = run(y)
    for _ in range(50):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [4096, 9000])  # one tile of a block, several
@pytest.mark.parametrize(
    ("fmt", "config"),
    [
        ("4bit", Resident(2, 3, 1, 64, 3, cluster=4, early=4)),
        ("4bit", Resident(2, 3, 1, 128, 3, cluster=2, early=2)),
        ("int8", Resident(1, 3, 1, 128, 4, early=4)),
    ],
)
def test_products_that_overlap_and_sums_that_are_sent_on_a_gpu(
    fmt: str, config: Config, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(few_rows.CONFIGURATIONS, fmt, (config,))
    few_rows.plan.cache_clear()
    try:
        for nested in (False, True)[: 1 + (fmt == "4bit")]:
            w, run = random_weights(fmt, n, 4096, nested, 1)
            x = activations((config.rows - 1, 4096), torch.bfloat16, "cuda")
            bias = activations((n,), torch.bfloat16, "cuda", seed=5)
            assert_planned(fmt, x, n, nested)
            y = run(x, bias=bias)
            compare(y, x, w, bias, f"nested {nested}")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # each starts before the one in front has ended
                many = [run(x, bias=bias) for _ in range(20)]
            for _ in range(20):
                graph.replay()
                assert all(torch.equal(y, other) for other in many)
    finally:
        few_rows.plan.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["int8", "4bit"])
@pytest.mark.parametrize("n_k", [(9728, 896), (896, 4864), (1003, 18176), (12300, 4096), (4544, 18176)])
def test_what_the_table_takes_for_few_and_for_many_columns_on_a_gpu(fmt: str, n_k: tuple[int, int]) -> None:
    n, k = n_k
    for nested in (False, True)[: 1 + (fmt == "4bit")]:
        w, run = random_weights(fmt, n, k, nested, 1)
        bias = activations((n,), torch.bfloat16, "cuda", seed=5)
        for m in (1, 2, 3, 4, 7, 16, 64):
            x = activations((m, k), torch.bfloat16, "cuda")
            y = run(x, bias=bias)
            compare(y, x, w, bias, f"nested {nested} M {m}")
            assert torch.equal(y, run(x, bias=bias)), "differs from run to run"
            x[m - 1, 5] = float("nan")
            bad = run(x, bias=bias)
            assert bad[m - 1].isnan().all() and not bad[: m - 1].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("n_k", [(1003, 4160), (896, 896), (515, 11008)])
def test_4_bit_on_a_gpu(n_k: tuple[int, int], blocksize: int, dtype: torch.dtype) -> None:
    n, k = n_k
    for quant_type, nested in (("nf4", False), ("nf4", True), ("fp4", False)):
        packed = four_bit(n, k, "cuda", quant_type, nested, blocksize)
        w, bias = packed.dequantize(torch.float32), activations((n,), dtype, "cuda", seed=5)
        for m in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 96, 128):
            x = activations((m, k), dtype, "cuda")
            y = linear_4bit(x, packed, bias)
            compare(y, x, w, bias, f"{quant_type} nested {nested} M {m}")
            assert torch.equal(y, linear_4bit(x, packed, bias)), "differs from run to run"
            if m <= few_rows.PORTABLE_ROWS:
                compare(linear_4bit(x, packed, bias, "portable"), x, w, bias, f"portable, {quant_type} M {m}")
            x[m - 1, 5] = float("nan")
            bad = linear_4bit(x, packed, bias)
            assert bad[m - 1].isnan().all() and not bad[: m - 1].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n_k", [(1003, 4160), (896, 896), (515, 11008)])
def test_int8_on_a_gpu(n_k: tuple[int, int], dtype: torch.dtype) -> None:
    n, k = n_k
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
    SCB, bias = torch.rand(n, device="cuda") + 0.1, activations((n,), dtype, "cuda", seed=5)
    for m in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 96, 126, 128):
        x = activations((m, k), dtype, "cuda")
        y = linear_int8(x, weight, SCB, bias, exact=False)
        compare(y, x, weight.float() * SCB[:, None] / 127, bias, f"M {m}")
        assert torch.equal(y, linear_int8(x, weight, SCB, bias, exact=False)), "differs from run to run"


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["4bit", "int8"])
def test_the_products_of_the_table_on_a_gpu(fmt: str) -> None:
    """The sizes and rows that benchmarks/cases/few_rows.py stores, which runs this first: so it has to be quick."""
    for n, k in SIZES:
        bias = activations((n,), torch.bfloat16, "cuda", seed=5)
        for nested in (False, True)[: 1 + (fmt == "4bit")]:
            if fmt == "int8":
                codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
                SCB = torch.rand(n, device="cuda") + 0.1
                w, run = (
                    codes.float() * SCB[:, None] / 127,
                    functools.partial(linear_int8, weight=codes, SCB=SCB, exact=False),
                )
            else:
                blocks = torch.rand(n * k // 64, device="cuda")
                packed = Packed4bit(torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, device="cuda"), blocks,
                                    64, "nf4", (n, k))  # fmt: skip
                if nested:
                    packed = packed._replace(
                        absmax=(blocks * 255).to(torch.uint8), offset=blocks[0].clone(),
                        nested_absmax=torch.rand(-(-blocks.numel() // 256), device="cuda"),
                    )  # fmt: skip
                w, run = packed.dequantize(torch.float32), functools.partial(linear_4bit, packed=packed)
            for m in (1, 4, 8, 16, 64):
                x = activations((m, k), torch.bfloat16, "cuda")
                compare(run(x, bias=bias), x, w, bias, f"{n} x {k}, nested {nested}, M {m}")


@pytest.mark.gpu
def test_weights_that_lie_where_others_were_on_a_gpu() -> None:
    """In place, and at the same address with another shape, as memory that is given back and taken again."""
    memory = torch.empty(1 << 24, dtype=torch.int8, device="cuda")
    for seed, (n, k) in enumerate(((4096, 4096), (4096, 4096), (2048, 8192), (1003, 4096), (4096, 4096))):
        memory.random_(-128, 128, generator=torch.Generator("cuda").manual_seed(seed))
        weight, SCB = memory[: n * k].view(n, k), torch.rand(n, device="cuda") + 0.1
        x = activations((64, k), torch.bfloat16, "cuda")
        y = linear_int8(x, weight, SCB, None, exact=False)
        compare(y, x, weight.float() * SCB[:, None] / 127, None, f"{n} x {k}")


@pytest.mark.gpu
def test_what_the_kernels_cannot_serve_is_still_right_on_a_gpu() -> None:
    """Base pointers off by one element, K of no whole blocks, rows that are views."""
    for n, k in ((113, 203), (65, 96), (64, 256)):
        packed = four_bit(n, k, "cuda")
        w = packed.dequantize(torch.float32)
        whole = activations((6, 2 * k + 1), torch.float16, "cuda")
        for x in (
            whole[:, 1 : k + 1],
            whole[::2, :k],
            whole.view(-1)[1 : k + 1].view(1, k),
            whole[:1, :k].expand(5, k),
        ):
            compare(linear_4bit(x, packed), x, w, None)
    x, packed = activations((4, 0), torch.float16, "cuda")[:0], four_bit(64, 256, "cuda")
    assert linear_4bit(x.new_empty(0, 256), packed).shape == (0, 64)


@pytest.mark.parametrize(
    ("base", "rows", "k", "dtype", "served"),
    [
        (0, 1, 128, torch.float16, True),
        (8, 128, 128, torch.float16, True),
        (1, 1, 128, torch.float16, False),  # off 16 bytes: the portable kernel (DESIGN.md, "Launching", g)
        (0, 0, 128, torch.float16, False),
        (0, 129, 128, torch.float16, False),
        (0, 1, 96, torch.float16, False),
        (0, 1, 128, torch.float32, False),
    ],
)
def test_g_what_the_kernels_take(
    base: int, rows: int, k: int, dtype: torch.dtype, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "_compiles", lambda: True)
    x = torch.zeros(base + rows * k, dtype=dtype)[base:].view(rows, k)
    w = torch.zeros(8 + 64 * k, dtype=torch.uint8)
    assert few_rows.supports("4bit", x, w, k) is served
    assert not few_rows.supports("4bit", x, w[1:], k)
