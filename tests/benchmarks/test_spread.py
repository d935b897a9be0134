"""Medians and ratios of repeated measurements."""

from __future__ import annotations

import pytest

from benchmarks.spread import paired_ratio, spread


def test_spread():
    assert spread([3.0, 1.0, 2.00004]) == {"median": 2.0, "low": 1.0, "high": 3.0, "n": 3}
    with pytest.raises(ValueError, match="values is empty"):
        spread([])


def test_ratios_are_taken_pair_by_pair():
    assert paired_ratio([1.0, 10.0, 3.0], [2.0, 20.0, 3.0])["median"] == 0.5
    with pytest.raises(ValueError):
        paired_ratio([1.0], [1.0, 2.0])
