from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onegpu.placement.pack import CPU, Item, Packing, pack

POLICIES = ("auto", "balanced", "balanced_low_0", "sequential")
SIZES = st.integers(0, 60)


@st.composite
def models(draw: st.DrawFn) -> list[Item]:
    """Some parts in front, blocks, some parts behind; tables among them."""
    front = [Item(size, work=size * draw(st.integers(0, 1))) for size in draw(st.lists(SIZES, max_size=3))]
    blocks = [Item(size, True, size, bool(n)) for n, size in enumerate(draw(st.lists(SIZES, max_size=12)))]
    behind = [Item(size, work=size, tail=True) for size in draw(st.lists(SIZES, max_size=3))]
    return front + blocks + behind


GPUS = st.lists(st.integers(0, 300), max_size=3).map(lambda sizes: dict(enumerate(sizes)))
CPU_BYTES = st.one_of(st.none(), st.integers(0, 300))


def check(items: list[Item], gpus: dict[int, int], packing: Packing) -> None:
    assert len(packing.where) == len(items)
    used: dict[int, int] = {}
    for item, device in zip(items, packing.where, strict=True):
        assert device == CPU or device in gpus
        used[device] = used.get(device, 0) + item.bytes
    assert {device: size for device, size in used.items() if size} == {d: s for d, s in packing.used.items() if s}
    for index, size in gpus.items():
        held = packing.staging if packing.stage == index else 0
        assert used.get(index, 0) + held <= size
    blocks = [
        (item, device, n) for n, (item, device) in enumerate(zip(items, packing.where, strict=True)) if item.block
    ]
    on_gpus = [device for _, device, _ in blocks if device != CPU]
    assert on_gpus == sorted(on_gpus)
    assert packing.streamed <= {n for _, device, n in blocks if device == CPU}
    assert all(items[n].bytes <= packing.staging for n in packing.streamed)
    if packing.streamed:
        assert packing.stage in gpus


@settings(max_examples=300, deadline=None)
@given(models(), GPUS, CPU_BYTES, st.sampled_from(POLICIES))
def test_every_part_once_within_budgets_in_order(items: list[Item], gpus: dict[int, int], cpu: int | None, policy: str):
    packing = pack(items, gpus, cpu, policy)
    check(items, gpus, packing)
    if cpu is None:
        assert packing.missing == 0
        return
    assert packing.missing == max(0, packing.used.get(CPU, 0) - cpu)
    if packing.missing:
        total = sum(item.bytes for item in items)
        assert packing.missing >= total - sum(gpus.values()) - cpu
        # exactly that many bytes are missing: so many more are enough, and one less is not
        assert not pack(items, gpus, cpu + packing.missing, policy).missing
        assert pack(items, gpus, cpu + packing.missing - 1, policy).missing == 1


@settings(max_examples=150, deadline=None)
@given(models(), GPUS, st.sampled_from(POLICIES))
def test_what_fits_in_order_is_on_gpus(items: list[Item], gpus: dict[int, int], policy: str):
    room = dict(gpus)
    order = list(room)
    for item in items:  # a plan that a person would make: fill the first, then the next
        while order and room[order[0]] < item.bytes:
            order.pop(0)
        if not order:
            return
        room[order[0]] -= item.bytes
    assert pack(items, gpus, 0, policy).missing == 0


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.lists(st.integers(0, 400), min_size=1, max_size=3))
def test_a_larger_model_fills_every_gpu(count: int, size: int, budgets: list[int]):
    items = [Item(size, True, size, n > 0) for n in range(count)]
    gpus = dict(enumerate(budgets))
    packing = pack(items, gpus, None)
    check(items, gpus, packing)
    if packing.used.get(CPU):
        for index, budget in gpus.items():
            assert packing.used.get(index, 0) > budget - 2 * size


def layers(count: int, size: int) -> list[Item]:
    return [Item(size, True, size, n > 0) for n in range(count)]


def test_policies():
    items = layers(10, 10)
    assert set(pack(items, {0: 100, 1: 100}, 0, "auto").where) == {0}
    assert set(pack(items, {0: 90, 1: 100}, 0, "auto").where) == {1}
    assert pack(items, {0: 100, 1: 100}, 0, "sequential").used == {0: 100}
    assert pack(items, {0: 100, 1: 100}, 0, "balanced").used == {0: 50, 1: 50}
    assert pack(items, {0: 60, 1: 80}, 0, "auto").used == {0: 40, 1: 60}
    assert pack(items, {0: 100, 1: 100}, 0, "balanced_low_0").used == {1: 100}
    assert pack(items, {0: 100, 1: 80, 2: 0}, 0, "balanced_low_0").used == {0: 20, 1: 80}
    assert pack(items, {0: 100, 1: 60, 2: 60}, 0, "balanced_low_0").used == {1: 50, 2: 50}


def test_a_tied_table_that_fits_nowhere_goes_to_the_cpu_alone():
    items = [Item(500, work=500, tail=True), *layers(10, 10), Item(1, tail=True)]
    packing = pack(items, {0: 60, 1: 80}, 1000)
    assert packing.where[0] == CPU
    assert packing.used[CPU] == 500
    assert not packing.streamed


def test_an_embedding_costs_nothing_on_the_cpu_and_a_head_does():
    embedding, head = Item(100, work=0), Item(100, work=100, tail=True)
    packing = pack([embedding, *layers(10, 10), head], {0: 210}, 1000)
    assert packing.where[0] == CPU
    assert packing.where[-1] == 0
    assert packing.used == {0: 200, CPU: 100}


def test_blocks_that_wait_leave_room_to_be_copied_to():
    packing = pack(layers(10, 10), {0: 65}, None)
    assert packing.used == {0: 50, CPU: 50}
    assert (packing.stage, packing.staging) == (0, 10)
    assert packing.streamed == {5, 6, 7, 8, 9}


def test_a_block_larger_than_every_gpu_does_not_stop_the_others():
    items = [*layers(2, 10), Item(1000, True, 1000, True), *layers(2, 10)]
    packing = pack(items, {0: 45}, None)
    assert packing.where == [0, 0, CPU, 0, 0]
    assert not packing.streamed


def test_without_gpus():
    packing = pack(layers(3, 10), {}, 30)
    assert packing.where == [CPU] * 3
    assert packing.missing == 0
    assert pack(layers(3, 10), {0: 0}, 29).missing == 1


@pytest.mark.parametrize("gpus", [1, 8])
def test_many_parts_are_no_reason_to_wait(gpus: int):
    items = [*(Item(5, work=5) for _ in range(30)), *layers(200, 10), *(Item(7, work=7, tail=True) for _ in range(30))]
    packing = pack(items, dict.fromkeys(range(gpus), 100), None)
    check(items, dict.fromkeys(range(gpus), 100), packing)
