from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from onegpu.errors import ArgumentError, MemoryBudgetError
from onegpu.placement.fit import check_fits, format_bytes, free_bytes, refuse_move


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (600e6, "600.0 MB"), (2.615e9, "2.62 GB")]
)
def test_format_bytes(count: float, text: str):
    assert format_bytes(count) == text


def test_check_fits():
    check_fits(1, torch.device("cpu"), "A model", "Nothing to do.")
    with pytest.raises(MemoryBudgetError, match=r"A model needs .* on cpu, .* are free: .* are missing\. Take less\."):
        check_fits(1 << 60, torch.device("cpu"), "A model", "Take less.")


def test_nobody_knows_the_memory_of_meta():
    assert free_bytes(torch.device("meta")) is None
    assert (free_bytes(torch.device("cpu")) or 0) > 0


def test_refuse_move():
    spread = SimpleNamespace(hf_device_map={"a": 0, "b": 1})
    with pytest.raises(ArgumentError, match=r"device=cuda .*device_map='cuda'"):
        refuse_move(spread, "cuda")
    refuse_move(spread, None)
    refuse_move(SimpleNamespace(hf_device_map={"": 0}), "cuda")
    refuse_move(SimpleNamespace(), "cuda")
