"""The configurations of the few-row kernels: each product finds one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from onegpu.kernels import few_rows
from onegpu.kernels.few_rows_held import Held
from onegpu.kernels.few_rows_stream import Stream
from onegpu.kernels.few_rows_table import ANY, CONFIGURATIONS, Direct, Narrow, Resident

H100, OTHERS = 227 * 1024, 99 * 1024  # bytes of shared memory that a block may have
SIZES = [
    (12288, 4096),
    (4096, 4096),
    (22016, 4096),
    (4096, 11008),
    (896, 896),
    (4864, 896),
    (4544, 4544),
]


@pytest.mark.parametrize("fmt", few_rows.FORMATS)
@pytest.mark.parametrize("n_k", SIZES)
def test_every_product_finds_a_configuration(fmt: str, n_k: tuple[int, int]) -> None:
    n, k = n_k
    for m in range(1, few_rows.MAX_ROWS[fmt] + 1):
        for half in (False, True)[: 1 + (fmt == "4bit")]:
            found = few_rows.choose(fmt, True, m, n, k, half, 132, H100, 9)
            assert found is not None, f"{m} rows find none on an H100"
            assert found[0].rows < 2 * max(m, 4) or half, f"{m} rows would be padded to {found[0].rows}"
        small = m <= 64 or fmt == "int8"  # past that 4-bit weights are dequantised
        assert fmt == "16bit" or not small or few_rows.choose(fmt, False, m, n, k, False, 84, OTHERS, 8), f"{m} rows"


def test_wide_tiles_are_filled() -> None:
    """12288 rows on 132 multiprocessors are 187 for a cluster of two: a tile of 192; 4096 are 63: a tile of 64."""
    for n, tile in ((12288, 192), (4096, 64)):
        config, clusters, _ = few_rows.choose("4bit", False, 32, n, 4096, False, 132, H100, 9)
        assert (config.tile, config.cluster, clusters) == (tile, 2, 66)


# What the sweeps found fastest, and what the older rules took instead.
@pytest.mark.parametrize(
    ("fmt", "nested", "m", "n", "k", "wins"),
    [
        ("16bit", 0, 1, 12288, 4096, Direct(1, 16, 4, 2, 12, early=2)),
        ("16bit", 0, 4, 4096, 11008, Direct(4, 16, 4, 2, 4, early=2)),
        ("int8", 0, 1, 22016, 4096, Narrow(2, 16, 2, 128, 8, early=2)),
        ("int8", 0, 8, 4096, 4096, Direct(8, 16, 2, 3, 2, early=2)),
        ("int8", 0, 8, 4096, 11008, Narrow(8, 16, 3, 128, 4, cluster=2, early=4)),
        ("int8", 0, 16, 9728, 896, Stream(2, 12, 1, 256, 3, 2)),
        ("int8", 0, 16, 4096, 4096, Stream(2, 4, 2, 256, 4, 2, blocks=2)),
        ("int8", 0, 16, 4096, 11008, Stream(2, 4, 2, 256, 8, 2)),
        ("int8", 0, 64, 4096, 4096, Stream(8, 4, 2, 256, 4, 2)),
        ("int8", 0, 64, 4096, 11008, Stream(8, 4, 2, 256, 4, 2)),
        ("int8", 0, 64, 9728, 896, Stream(8, 12, 1, 128, 4, 2, held=152)),
        ("int8", 0, 64, 22016, 4096, Stream(8, 12, 1, 256, 3, held=168)),
        ("int8", 0, 64, 28672, 4096, Stream(8, 16, 1, 256, 2)),
        ("int8", 0, 64, 6144, 4096, Stream(8, 8, 1, 256, 3, 2)),
        ("int8", 0, 24, 12288, 4096, Stream(4, 12, 1, 256, 3, 2)),
        ("int8", 0, 24, 4096, 4096, Stream(4, 4, 2, 256, 4, 2)),
        ("int8", 0, 64, 12288, 4096, Stream(8, 12, 1, 128, 4, 2)),
        ("4bit", 0, 1, 4096, 4096, Held(2, 8, blocks=2)),
        ("4bit", 1, 1, 4672, 4544, Held(2, 10, blocks=2)),
        ("4bit", 0, 2, 12288, 4096, Held(2, 16)),
        ("4bit", 2, 1, 22016, 4096, Held(2, 16)),
        ("4bit", 2, 2, 4096, 11008, Held(2, 11)),
        ("4bit", 0, 1, 4544, 18176, Held(2, 18)),
        ("4bit", 0, 1, 8192, 28672, Held(2, 14, cluster=2)),
        ("4bit", 0, 4, 4096, 4096, Held(4, 8, cluster=2, blocks=2, early=2)),
        ("4bit", 0, 3, 12288, 4096, Held(4, 8, cluster=2, blocks=2, early=2)),
        ("4bit", 0, 4, 22016, 4096, Held(4, 16, late=1)),
        ("4bit", 0, 4, 4096, 11008, Held(4, 11, cluster=2, early=2)),
        ("4bit", 0, 4, 9728, 896, Held(4, 10, blocks=2, early=2)),
        ("4bit", 0, 4, 896, 4864, Held(4, 10, blocks=2, early=2)),
        ("4bit", 2, 4, 896, 4864, Held(4, 15, cluster=2, early=2)),  # ten warps of two blocks spill
        ("4bit", 1, 4, 4672, 4544, Held(4, 9, blocks=2, early=2)),
        ("4bit", 0, 4, 57344, 8192, Held(4, 16, late=1, over=True)),
        ("4bit", 0, 4, 5120, 5120, Held(4, 10, blocks=2, early=2)),
        ("4bit", 0, 8, 896, 4864, Held(8, 10, cluster=2, blocks=2)),
        ("4bit", 0, 8, 4096, 4096, Held(8, 8, cluster=2, blocks=2)),
        ("4bit", 0, 8, 12288, 4096, Held(8, 16, late=1, over=True)),
        ("4bit", 2, 5, 22016, 4096, Held(8, 16, late=1, over=True)),
        ("4bit", 0, 8, 4096, 11008, Held(8, 11, cluster=4, early=2, over=True)),
        ("4bit", 0, 8, 4096, 14336, Held(8, 14, cluster=4, early=2, over=True)),
        ("4bit", 0, 8, 57344, 8192, Resident(1, 3, 1, 128, 2, cluster=2, early=4)),
        ("4bit", 0, 16, 9728, 896, Stream(2, 12, 1, 256, 3, 2)),
        ("4bit", 0, 16, 4544, 18176, Resident(2, 3, 1, 128, 2, cluster=8, early=4)),
        ("4bit", 0, 16, 896, 4864, Resident(2, 1, 4, 64, 2, cluster=8, early=4)),
        ("4bit", 0, 16, 4096, 4096, Stream(2, 4, 2, 256, 3, 2, blocks=2)),
        ("4bit", 0, 16, 4544, 4544, Resident(2, 3, 1, 64, 3, cluster=4, early=4)),
        ("4bit", 0, 16, 22016, 4096, Resident(2, 3, 1, 128, 3, cluster=2, early=2)),
        ("4bit", 2, 16, 22016, 4096, Resident(2, 3, 1, 128, 3, cluster=2, early=2)),
        ("4bit", 0, 64, 4096, 11008, Stream(8, 4, 2, 256, 4, 2)),
        ("4bit", 2, 64, 4096, 11008, Stream(8, 4, 2, 256, 4, 2)),
        ("4bit", 0, 64, 4096, 4096, Stream(8, 4, 2, 256, 4, 2)),
        ("4bit", 0, 64, 12288, 4096, Stream(8, 12, 1, 256, 2, 2)),
        ("4bit", 0, 64, 9728, 896, Stream(8, 12, 1, 256, 3, 2, held=152)),
        ("4bit", 1, 64, 9728, 896, Stream(8, 12, 1, 256, 3, 2, held=152)),
        ("4bit", 0, 64, 28672, 4096, Stream(8, 16, 1, 256, 2)),
        ("4bit", 0, 64, 6144, 4096, Stream(8, 8, 1, 256, 3, 2)),
        ("4bit", 0, 24, 4096, 11008, Stream(4, 4, 2, 256, 4, 2)),
        ("4bit", 0, 16, 12288, 4096, Stream(2, 12, 1, 256, 3, 2)),
        ("4bit", 0, 16, 4096, 11008, Stream(2, 4, 2, 256, 7, 2)),
        ("4bit", 2, 16, 4096, 11008, Stream(2, 4, 2, 256, 3, 2, blocks=2)),
        ("4bit", 0, 16, 28672, 4096, Resident(2, 3, 1, 128, 3, cluster=2, early=2)),
        ("int8", 0, 16, 28672, 4096, Stream(2, 16, 1, 256, 3)),
        ("4bit", 0, 16, 6144, 4096, Stream(2, 12, 1, 256, 3, 2)),
        ("int8", 0, 16, 4544, 4544, Stream(2, 12, 1, 256, 3, 2)),
        ("4bit", 0, 24, 896, 4864, Stream(4, 4, 2, 128, 6, 8)),
        ("int8", 0, 16, 896, 4864, Stream(2, 4, 2, 128, 6, 8)),
        ("4bit", 0, 16, 18176, 4544, Resident(2, 3, 1, 128, 3, cluster=2, early=2)),
        ("int8", 0, 16, 22016, 4096, Stream(2, 12, 1, 256, 3)),
        ("int8", 0, 16, 12288, 4096, Stream(2, 12, 1, 256, 3, 2)),
        ("4bit", 0, 24, 22016, 4096, Stream(4, 12, 1, 256, 3)),
        ("4bit", 0, 64, 22016, 4096, Stream(8, 12, 1, 256, 3, held=168)),
        ("4bit", 0, 64, 18176, 4544, Stream(8, 12, 1, 256, 3, held=168)),
        ("4bit", 0, 64, 4672, 4544, Stream(8, 12, 1, 256, 3, 4, held=160)),
        ("int8", 0, 64, 896, 4864, Stream(8, 4, 2, 128, 6, 8)),
    ],
)
def test_the_winners_of_the_sweep_are_taken(
    fmt: str, nested: int, m: int, n: int, k: int, wins: few_rows.Config
) -> None:
    config, _, _ = few_rows.choose(fmt, nested, m, n, k, False, 132, H100, 9)
    assert replace(config, price=1.0, nested=1.0, share=ANY) == wins


def test_more_scales_take_a_stage_less_where_memory_is_short() -> None:
    for nested, half, stages in ((0, False, 3), (1, True, 2)):
        assert few_rows.choose("4bit", nested, 16, 12288, 4096, half, 132, H100, 9)[0].stages == stages


def entry(config: few_rows.Config) -> few_rows.Config:
    """Without what depends on the product."""
    if isinstance(config, Stream):
        return replace(config, stages=9)
    return replace(config, warps=0, price=0, over=False) if isinstance(config, Held) else config


def test_every_configuration_serves_some_product_on_a_hopper_or_another_gpu() -> None:
    """For rows of its class: what no size and no GPU takes has no place in the table."""
    taken = set()
    sizes = [
        (n, k)
        for n in (64, 896, 2560, 4096, 4544, 6144, 9728, 12288, 18176, 22016, 28672)
        for k in (896, 4096, 4544, 11008, 18176, 32768)
    ]
    for fmt, maximum in few_rows.MAX_ROWS.items():
        for m in (m for m in (1, 2, 4, 8, 16, 32, 64, 128) if m <= maximum):
            for n, k in sizes:
                for sms, limit, major in (
                    (132, H100, 9),
                    (108, 163 * 1024, 8),
                    (84, OTHERS, 8),
                    (170, OTHERS, 12),
                    (148, H100, 10),
                ):
                    for nested, half in ((0, False), (0, True), (1, False), (2, False))[: 1 + 3 * (fmt == "4bit")]:
                        found = few_rows.choose(fmt, nested, m, n, k, half, sms, limit, major)
                        if found:
                            taken.add((fmt, entry(found[0])))
    missing = [(fmt, c) for fmt, able in CONFIGURATIONS.items() for c in able if (fmt, entry(c)) not in taken]
    assert not missing, missing


@pytest.mark.parametrize(("major", "early"), [(9, True), (8, False)])
def test_kernels_start_early_from_hopper_on(monkeypatch: pytest.MonkeyPatch, major: int, early: bool) -> None:
    properties = SimpleNamespace(
        major=major, multi_processor_count=132, shared_memory_per_block_optin=H100, shared_memory_per_block=H100
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    plan = few_rows.plan.__wrapped__("int8", 1, 4096, 4096, True, False, False, False, 0)
    assert plan is not None and plan.early == early
