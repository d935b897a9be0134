"""Numbers of repeated measurements: the median, and how far the others lie from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def spread(values: Sequence[float]) -> dict[str, Any]:
    """``{"median": …, "low": …, "high": …, "n": …}`` of measurements of one thing, to four digits.

    Raises:
        ValueError: there is none.
    """
    if not values:
        raise ValueError("values is empty: measure at least once")
    rounded = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {**{name: float(f"{value:.4g}") for name, value in rounded.items()}, "n": len(values)}


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """The spread of ours / theirs, pair by pair: measurements taken in turn share what else the machine was doing."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])
