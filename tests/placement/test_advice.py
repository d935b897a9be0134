from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onegpu.placement.advice import advice, spell
from onegpu.placement.budget import Budgets, parse_bytes
from onegpu.placement.pack import Item, pack

MB = 10**6


@given(st.integers(0, 10**13))
def test_sizes_are_rounded_to_the_safe_side(size: int):
    assert size <= parse_bytes(spell(size)) <= size * 1.01 + 1000
    assert size * 0.989 - 1000 <= parse_bytes(spell(size, down=True)) <= size


@pytest.mark.parametrize(("size", "text"), [(0, "0KB"), (1, "0.01KB"), (600 * MB, "600MB"), (1_234_567_890, "1.24GB")])
def test_spelling(size: int, text: str):
    assert spell(size) == text


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 50), st.lists(st.integers(0, 400), max_size=2), st.integers(0, 300))
def test_all_advice_works(count: int, size: int, gpus: list[int], cpu: int):
    items = [Item(size * MB, True, size * MB, n > 0) for n in range(count)]
    budgets = Budgets({n: budget * MB for n, budget in enumerate(gpus)}, cpu * MB, True)
    if not pack(items, budgets.gpus, budgets.cpu).missing:
        return
    fixes = advice(items, budgets, "auto")
    assert fixes
    for fix in fixes:
        asked = {key: parse_bytes(value) for key, value in eval(fix.removeprefix("max_memory=")).items()}
        memory = asked.pop("cpu")
        assert not pack(items, asked, memory).missing


def test_4_bits_come_first_where_they_are_enough():
    large, small = ([Item(size * MB, True, size * MB)] * 4 for size in (100, 30))
    budgets = Budgets({0: 200 * MB}, 0, True)
    assert advice(large, budgets, "auto", small)[0] == "load_in_4bit=True"
    budgets = Budgets({0: 100 * MB}, 0, True)
    assert any(fix.startswith("load_in_4bit=True with max_memory=") for fix in advice(large, budgets, "auto", small))


def test_measured_budgets_are_not_told_to_be_set():
    fixes = advice([Item(100 * MB, True)] * 4, Budgets({0: 200 * MB}, 0, False), "auto")
    assert len(fixes) == 2
    assert fixes[0].endswith("more CPU memory") and fixes[1].endswith("on GPU 0")
