"""What would fit, for the error that says a model does not."""

from __future__ import annotations

from collections.abc import Sequence

from onegpu.placement.budget import Budgets
from onegpu.placement.pack import Item, pack


def advice(items: Sequence[Item], budgets: Budgets, policy: str, smaller: Sequence[Item] | None = None) -> list[str]:
    """Settings under which a model that does not fit does, the least change first. Each was tried.

    Args:
        items: the model's parts as they are. smaller: as they would be in 4 bits; None if they cannot be smaller.
    """
    fixes = []
    if smaller is not None and not pack(smaller, budgets.gpus, budgets.cpu, policy).missing:
        fixes.append("load_in_4bit=True")
    for sizes, prefix in ((items, ""), *(((smaller, "load_in_4bit=True with "),) if smaller and not fixes else ())):
        lacking = pack(sizes, budgets.gpus, budgets.cpu, policy).missing
        written: dict[int | str, str | int] = {i: spell(size, down=True) for i, size in budgets.gpus.items()}
        enough = {**written, "cpu": spell((budgets.cpu or 0) + lacking)}
        fixes.append(f"{prefix}max_memory={enough}" if budgets.given else f"{prefix}{spell(lacking)} more CPU memory")
        if budgets.gpus:
            index = next(iter(budgets.gpus))
            size = _least_gpu(sizes, budgets, policy, index)
            bigger = {**written, index: spell(size)}
            if budgets.cpu is not None:
                bigger["cpu"] = spell(budgets.cpu, down=True) if budgets.cpu else 0
            fixes.append(f"{prefix}max_memory={bigger}" if budgets.given else f"{prefix}{spell(size)} on GPU {index}")
    return fixes


def _least_gpu(items: Sequence[Item], budgets: Budgets, policy: str, index: int) -> int:
    """The least budget of GPU ``index`` that makes room for everything, to a hundredth."""
    low, high = budgets.gpus[index], max(1, sum(item.bytes for item in items))
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        fits = not pack(items, {**budgets.gpus, index: middle}, budgets.cpu, policy).missing
        low, high = (low, middle) if fits else (middle, high)
    return high


def spell(size: int, down: bool = False) -> str:
    """A size as ``max_memory`` takes it, not less than ``size`` (``down``: not more), in at most three digits."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= scale or unit == "KB":
            step = scale // 100 if size < 10 * scale else scale // 10 if size < 100 * scale else scale
            rounded = size // step * step if down else -(-size // step) * step
            return f"{rounded / scale:g}{unit}"
    raise AssertionError
