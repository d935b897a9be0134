"""The kernel for 9 to 64 rows on Hopper: what it serves, run on the CPU, its machine code, and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from onegpu.kernels import few_rows
from onegpu.kernels.few_rows_stream import Stream
from onegpu.kernels.few_rows_table import ANY, CONFIGURATIONS, resident_clusters
from tests.kernels import emulated, machine_code
from tests.kernels.test_few_rows import assert_planned, compare, four_bit, nested_of, random_weights
from tests.matrices import activations
from tests.nvrtc_tools import needs_nvrtc

TABLE = [(fmt, c) for fmt, able in CONFIGURATIONS.items() for c in able if isinstance(c, Stream)]
LIMIT = 227 * 1024


@pytest.mark.parametrize("tile", [64, 80, 192])
def test_boxes_share_out_the_rows_of_any_block(tile: int) -> None:
    """As many bulk copies as tiles bring all rows of the fullest block, and hardly more."""
    config = Stream(8, -(-tile // 64) * 4, 1, 256, 3, held=tile)
    for n in (1, 65, 131, 500, 528, 1003, 4096, 4544, 9728, 28672):
        for clusters in (30, 66, 132):
            four = 4 if n >= 4 * clusters else 1
            fours = -(-n // four)
            begins = [min(fours * c // clusters * four, n) for c in range(clusters + 1)]
            rows = max(end - begin for begin, end in pairwise(begins))
            box = config.box(n, clusters)
            assert box % 8 == 0 and box <= tile and -(-rows // box) == -(-rows // tile)
            assert box * -(-rows // tile) < rows + 4 + 8 * -(-rows // tile), (n, clusters)


@pytest.mark.parametrize(
    ("config", "fmt", "nested", "n", "half", "served"),
    [
        (Stream(8, 12, 1, 256, 3, held=168), "4bit", 0, 28672, False, True),  # two tiles a block
        (Stream(8, 12, 1, 256, 2, 2), "4bit", 0, 28672, False, False),  # sums of one tile meet
        (Stream(2, 4, 2, 256, 4), "int8", 0, 8448, False, True),
        (Stream(2, 4, 2, 256, 4), "int8", 0, 8449, False, False),
        (Stream(2, 4, 2, 256, 8, 2), "int8", 0, 4096, False, True),
        (Stream(2, 4, 2, 256, 8, 2), "4bit", 0, 4096, False, False),  # no room for the barriers
        (Stream(2, 16, 1, 256, 3), "4bit", 1, 4096, False, True),
        (Stream(2, 16, 1, 256, 3), "4bit", 1, 4096, True, False),  # no room for the scales
    ],
)
def test_what_it_serves(config: Stream, fmt: str, nested: int, n: int, half: bool, served: bool) -> None:
    clusters = 132 // config.cluster
    assert config.serves(fmt, nested, n, clusters, half) is served
    assert (few_rows.fits(config, fmt, nested, 9, n, 4096, half, 132, LIMIT) is not None) is served


# (configuration, quant_type, nested, block size, M, N, K, dtype)
FOUR_BIT = [
    (Stream(2, 4, 2, 256, 3, 2, blocks=2), "nf4", True, 64, 13, 100, 1280, torch.bfloat16),
    (Stream(2, 12, 1, 128, 3, 2), "nf4", False, 64, 13, 350, 1280, torch.bfloat16),
    (Stream(2, 4, 1, 256, 7, 2), "nf4", False, 64, 13, 100, 1280, torch.float16),
    (Stream(2, 4, 1, 256, 3), "nf4", False, 64, 13, 150, 768, torch.bfloat16),  # two tiles
    (Stream(8, 8, 1, 128, 3, 2), "nf4", True, 64, 60, 200, 768, torch.float16),
    (Stream(4, 8, 2, 128, 4, held=96), "fp4", True, 64, 29, 180, 704, torch.bfloat16),
    (Stream(1, 4, 1, 256, 2), "nf4", True, 32, 7, 300, 704, torch.float16),
    (Stream(2, 4, 1, 256, 3, held=48), "fp4", False, 128, 13, 210, 704, torch.float16),
    (Stream(2, 4, 2, 256, 2, 4), "nf4", True, 256, 13, 110, 2560, torch.bfloat16),
]


@emulated.needs_gxx
@pytest.mark.parametrize("case", FOUR_BIT, ids=[f"{c[1]}-{i}" for i, c in enumerate(FOUR_BIT)])
def test_4_bits_on_the_cpu(case: tuple) -> None:
    config, quant_type, nested, blocksize, m, n, k, dtype = case
    packed = four_bit(n, k, "cpu", quant_type, nested, blocksize)
    x, bias = activations((m, k), dtype), activations((n,), dtype, seed=5)
    run = lambda x: emulated.product(  # noqa: E731
        config, "4bit", x, packed.weight, n, bias, packed.absmax, nested_of(packed), blocksize, quant_type
    )
    compare(run(x), x, packed.dequantize(torch.float32), bias)
    x[m - 1, 7] = float("nan")
    bad = run(x)
    assert bad[m - 1].isnan().all() and not bad[: m - 1].isnan().any()


@emulated.needs_gxx
@pytest.mark.parametrize(
    "config",
    [
        Stream(2, 4, 2, 256, 3, 2, blocks=2),
        Stream(2, 4, 1, 256, 3),
        Stream(1, 4, 2, 128, 3, 2, held=48),
        Stream(4, 8, 1, 128, 3, held=72),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_on_the_cpu(config: Stream, dtype: torch.dtype) -> None:
    n, k, m = 70, 752, min(config.rows, 9)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    SCB = torch.rand(n, generator=torch.Generator().manual_seed(2)) + 0.1
    x, bias = activations((m, k), dtype), activations((n,), dtype, seed=5)
    compare(emulated.product(config, "int8", x, weight, n, bias, SCB), x, weight.float() * SCB[:, None] / 127, bias)


@needs_nvrtc
@pytest.mark.parametrize("fmt", ["int8", "4bit"])
def test_no_registers_spill_and_nothing_is_read_early(fmt: str) -> None:
    for config in [c for f, c in TABLE if f == fmt]:
        nested = 2 * (fmt == "4bit")  # which needs more registers than plain scales
        found = few_rows.fitting(config, fmt, nested, config.rows, 512, 4096, False, 132, LIMIT)
        assert found is not None
        code = few_rows.kernel(found[0], fmt, True, False, nested, False).compile("sm_90a").code
        assert machine_code.stack_bytes(code) == 0, config
        assert machine_code.copies_with_a_uniform_base(code) == 0, config
        assert machine_code.reads_before_the_wait(code) == 0, config
        assert machine_code.sums_copied_early(code, config.rows // 2) == 0, config


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("fmt", "config"), TABLE, ids=[f"{f}-{'-'.join(map(str, list(vars(c).values())[:9]))}" for f, c in TABLE]
)
def test_every_configuration_on_a_gpu(fmt: str, config: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile of a block, and several where no sums meet; each launch starts before the one in front ends."""
    monkeypatch.setitem(few_rows.CONFIGURATIONS, fmt, (replace(config, share=ANY),))
    few_rows.plan.cache_clear()
    try:
        whole = 9000
        if config.cluster * config.warps_k > 1:
            sms = torch.cuda.get_device_properties("cuda").multi_processor_count
            whole = resident_clusters(sms, config.cluster) * config.tile - 1
        for n in (min(1003, whole - 64), min(9000, whole)):
            for nested in (False, True)[: 1 + (fmt == "4bit")]:
                w, run = random_weights(fmt, n, 4096, nested, 1)
                x = activations((config.rows - 1, 4096), torch.bfloat16, "cuda")
                bias = activations((n,), torch.bfloat16, "cuda", seed=5)
                assert_planned(fmt, x, n, nested)
                y = run(x, bias=bias)
                compare(y, x, w, bias, f"N {n}, nested {nested}")
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    many = [run(x, bias=bias) for _ in range(20)]
                for _ in range(10):
                    graph.replay()
                    assert all(torch.equal(y, other) for other in many)
    finally:
        few_rows.plan.cache_clear()
