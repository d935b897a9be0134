from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accelerate.utils import convert_file_size_to_int

from onegpu.errors import ArgumentError
from onegpu.placement.budget import Budgets, device_key, less_reserve, parse_bytes, read_budgets

GB = 10**9
FREE: dict[int | str, int | None] = {0: 16 * GB, 1: 24 * GB, "cpu": 100 * GB}

SPELLINGS: list[Any] = [
    f"{number}{unit}"
    for number in ("0", "1", "600", "1.5", "0.25", "2e3")
    for unit in ("KB", "MB", "GB", "KiB", "MiB", "GiB", "kb", "mb", "gb", "Kb", "Mb", "Gb", "gib", "GIB", "kB", "mIb")
]


@pytest.mark.parametrize("text", [*SPELLINGS, "1 GB", " 1GB", 0, 1, 10**12])
def test_sizes_mean_what_they_mean_to_transformers(text: Any):
    try:
        expected = convert_file_size_to_int(text)
    except ValueError:  # their parser takes no spaces in front of binary units and the like
        pytest.skip("no spelling of theirs")
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(("value", "expected"), [("2TB", 2 * 10**12), ("1TiB", 2**40), (1e9, GB), ("1GB ", GB)])
def test_sizes_beyond(value: Any, expected: int):
    assert parse_bytes(value) == expected


BAD = ["", "GB", "1", "100B", "1G", "1.2.3GB", "one GB", "-1GB", "1GBs", "1e400GB", "1,5GB", "1__GB"]


@pytest.mark.parametrize("value", [*BAD, -1, True, None, math.inf, math.nan, [1], torch.device("cpu")])
def test_bad_sizes_name_argument_value_and_fix(value: Any):
    with pytest.raises(ArgumentError) as raised:
        read_budgets({0: value}, FREE)
    message = str(raised.value)
    assert message.startswith("max_memory[0]=")
    assert "is not a size" in message
    assert "'600MB'" in message


@pytest.mark.parametrize(
    ("given", "gpus", "cpu"),
    [
        ({0: "6GB"}, {0: 6 * GB}, 90 * GB),
        ({1: "1GB", 0: "600MB"}, {0: 600 * 10**6, 1: GB}, 90 * GB),
        ({"cpu": "30GB"}, {}, 30 * GB),
        ({0: "6GB", "cpu": 0}, {0: 6 * GB}, 0),
        ({"cuda:1": "6GB", "cpu": 10}, {1: 6 * GB}, 10),
        ({torch.device("cuda", 0): 7, torch.device("cpu"): 5}, {0: 7}, 5),
        ({"0": "6GB"}, {0: 6 * GB}, 90 * GB),
        ({0: "80GB", "cpu": "200GB"}, {0: 16 * GB}, 100 * GB),
        ({}, {}, 90 * GB),
    ],
)
def test_budgets_that_are_given(given: Any, gpus: dict[int, int], cpu: int):
    budgets = read_budgets(given, FREE)
    assert budgets == Budgets(gpus, cpu, True)
    assert list(budgets.gpus) == sorted(budgets.gpus)


def test_without_max_memory_a_reserve_is_left():
    budgets = read_budgets(None, FREE)
    assert budgets.gpus == {0: 16 * GB - 16 * GB // 10, 1: 24 * GB - 24 * GB // 10}
    assert budgets.cpu == 90 * GB
    assert not budgets.given


def test_unknown_cpu_memory_is_no_limit():
    assert read_budgets(None, {"cpu": None}).cpu is None
    assert read_budgets({"cpu": "1GB"}, {"cpu": None}).cpu == GB


@pytest.mark.parametrize("free", [0, 1000, 100 * 2**20, 300 * 2**20, GB, 140 * GB])
def test_reserve(free: int):
    left = less_reserve(free)
    assert 0 <= left <= 0.9 * free
    assert left >= 0.5 * free - 1


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("6GB", "is not a mapping"),
        (6, "is not a mapping"),
        ([6], "is not a mapping"),
        ({2: "6GB"}, "names a GPU that does not exist"),
        ({-1: "6GB"}, "names a GPU that does not exist"),
        ({"cuda:7": "6GB"}, "names a GPU that does not exist"),
        ({"gpu": "6GB"}, "is not a device"),
        ({"mps": "6GB"}, "is not a device"),
        ({True: "6GB"}, "is not a device"),
        ({None: "6GB"}, "is not a device"),
        ({0: "1GB", "cuda:0": "2GB"}, "twice"),
        ({0: "1GB", "disk": "100GB"}, "the disk"),
    ],
)
def test_bad_mappings(given: Any, why: str):
    with pytest.raises(ArgumentError, match="max_memory=") as raised:
        read_budgets(given, FREE)
    assert why in str(raised.value)


def test_a_machine_without_gpu_has_no_gpu_0():
    with pytest.raises(ArgumentError, match=r"max_memory=0 needs a GPU"):
        read_budgets({0: "6GB"}, {"cpu": GB})
    assert read_budgets(None, {"cpu": GB}).gpus == {}


@pytest.mark.parametrize(
    ("key", "expected"), [(1, 1), ("1", 1), ("cuda:1", 1), ("cuda", 0), ("cpu", "cpu"), ("disk", "disk")]
)
def test_device_keys(key: Any, expected: int | str):
    assert device_key(key, "device_map", 2) == expected


def test_device_keys_blame_the_argument():
    with pytest.raises(ArgumentError, match="device_map='cuda:x' is not a device"):
        device_key("cuda:x", "device_map", 2)
