"""Which part of a model goes to which device: arithmetic on sizes, without a model.

The parts are the repeated blocks, in their order, and the few others around them (embeddings, head, norms). Blocks fill
the GPUs in order; what does not fit stays in CPU memory, the last blocks first, and is copied to a GPU for each call
("streamed"). The others are tried on every device: a table of a third of the model may be better off in CPU memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

CPU = -1
_TRIES = 2000  # placements of the others that are compared
_SLOW = 4  # a block computed on the CPU, against one copied to a GPU


@dataclass(frozen=True)
class Item:
    """A part that is not divided.

    bytes: as stored. block: one of the repeated blocks. work: bytes that a call reads of it (an embedding table: none
    worth counting), which is what it costs in CPU memory. tail: it stands behind the first block.
    """

    bytes: int
    block: bool = False
    work: int = 0
    tail: bool = False


@dataclass
class Packing:
    """where: a GPU or ``CPU`` for each item. streamed: items in CPU memory that the GPU ``stage`` computes.

    staging: bytes kept free on ``stage`` for one of them. used: bytes of items by device. missing: bytes by which CPU
    memory is too small; the packing is then the one that lacks least.
    """

    where: list[int]
    streamed: set[int] = field(default_factory=set)
    stage: int | None = None
    staging: int = 0
    used: dict[int, int] = field(default_factory=dict)
    missing: int = 0


def pack(items: Sequence[Item], gpus: dict[int, int], cpu: int | None, policy: str = "auto") -> Packing:
    """Place ``items`` (in the order of the model) on GPUs with these budgets and in ``cpu`` bytes of CPU memory.

    Args:
        policy: what to do with room to spare. "sequential": the first GPUs are filled. "balanced": every GPU gets the
            same share of its budget. "balanced_low_0": GPU 0 gets as little as possible. "auto": one GPU if it holds
            everything, else balanced.

    Returns:
        The packing that reads the fewest bytes from CPU memory in a call; ``missing`` > 0 if there is none.
    """
    gpus = {index: size for index, size in gpus.items() if size > 0}
    if policy == "auto":
        total = sum(item.bytes for item in items)
        for index, size in gpus.items():
            if total <= size:
                return Packing([index] * len(items), used={index: total})
    found: list[tuple[tuple[float, int], Packing]] = []
    lacking: Packing | None = None
    for fixed in _placements(items, gpus):
        packing = _fill(items, gpus, fixed)
        packing.missing = max(0, packing.used.get(CPU, 0) - cpu) if cpu is not None else 0
        if not packing.missing:
            found.append((_cost(items, packing), packing))
        elif lacking is None or packing.missing < lacking.missing:
            lacking = packing
    if not found:
        assert lacking is not None  # everything on the CPU is always among the placements
        return lacking
    least = min(cost for cost, _ in found)
    packings = [_spread(items, gpus, packing, policy) for cost, packing in found if cost == least]
    return min(packings, key=lambda packing: _preference(items, gpus, packing, policy))


def _cost(items: Sequence[Item], packing: Packing) -> tuple[float, int]:
    """Bytes that a call reads from CPU memory, weighted; then bytes there."""
    work = 0
    for number, item in enumerate(items):
        if packing.where[number] == CPU:
            slow = item.block and number not in packing.streamed
            work += item.work * (_SLOW if slow else 1)
    return work, packing.used.get(CPU, 0)


def _placements(items: Sequence[Item], gpus: dict[int, int]) -> Iterator[dict[int, int]]:
    """Devices for the items that are no blocks: every combination for the largest, the nearest with room for others."""
    others = sorted((n for n, item in enumerate(items) if not item.block), key=lambda n: -items[n].bytes)
    devices = [*gpus, CPU]
    tried = 0
    while tried < len(others) and len(devices) ** (tried + 1) <= _TRIES:
        tried += 1
    for choice in product(devices, repeat=tried):
        room = dict(gpus)
        fixed = dict(zip(others, choice, strict=False))
        for number, device in fixed.items():
            if device != CPU:
                room[device] -= items[number].bytes
        if any(size < 0 for size in room.values()):
            continue
        for number in others[tried:]:
            item = items[number]
            order = reversed(room) if item.tail else iter(room)
            fixed[number] = next((device for device in order if room[device] >= item.bytes), CPU)
            if fixed[number] != CPU:
                room[fixed[number]] -= item.bytes
        yield fixed


def _room(items: Sequence[Item], gpus: dict[int, int], fixed: dict[int, int]) -> dict[int, int]:
    return {
        index: size - sum(items[n].bytes for n, device in fixed.items() if device == index)
        for index, size in gpus.items()
    }


def _fill(items: Sequence[Item], gpus: dict[int, int], fixed: dict[int, int]) -> Packing:
    """Blocks to GPUs in order, the first that fits; all of them, or else with room kept to stream the rest through."""
    blocks = [number for number, item in enumerate(items) if item.block]
    room = _room(items, gpus, fixed)
    placed = _next_fit(items, blocks, room)
    stage, staging = None, 0
    largest = max(room.values(), default=-1)
    waiting = [items[n].bytes for n, device in placed.items() if device == CPU and items[n].bytes <= largest]
    if waiting:
        # Streamed blocks come last, so the last GPU that can take one computes them.
        smallest = min(waiting)
        stage = next((index for index in reversed(room) if room[index] >= smallest), None)
        if stage is not None:
            staging = max(items[n].bytes for n in blocks if items[n].bytes <= room[stage])
            placed = _next_fit(items, blocks, {**room, stage: room[stage] - staging})
    where = [fixed.get(number, CPU) for number in range(len(items))]
    for number, device in placed.items():
        where[number] = device
    streamed = {n for n in blocks if where[n] == CPU and stage is not None and items[n].bytes <= staging}
    if not streamed:
        return Packing(where, used=_used(items, where))
    return Packing(where, streamed, stage, staging, _used(items, where))


def _used(items: Sequence[Item], where: Sequence[int]) -> dict[int, int]:
    used: dict[int, int] = {}
    for item, device in zip(items, where, strict=True):
        used[device] = used.get(device, 0) + item.bytes
    return used


def _next_fit(items: Sequence[Item], blocks: Sequence[int], room: dict[int, int]) -> dict[int, int]:
    """Never back to an earlier GPU; after the first block that must wait for the CPU, all others do.

    A block larger than every GPU stays on the CPU without stopping the others.
    """
    left, order = dict(room), list(room)
    largest = max(room.values(), default=0)
    placed: dict[int, int] = {}
    current, full = 0, not order
    for number in blocks:
        size = items[number].bytes
        placed[number] = CPU
        if full or size > largest:
            continue
        following = next((i for i in range(current, len(order)) if left[order[i]] >= size), None)
        if following is None:
            full = True
            continue
        current = following
        left[order[current]] -= size
        placed[number] = order[current]
    return placed


def _spread(items: Sequence[Item], gpus: dict[int, int], packing: Packing, policy: str) -> Packing:
    """Distribute the blocks as ``policy`` says, where all of them are on GPUs."""
    blocks = [number for number, item in enumerate(items) if item.block]
    if policy == "sequential" or any(packing.where[number] == CPU for number in blocks) or not blocks:
        return packing
    fixed = {n: packing.where[n] for n, item in enumerate(items) if not item.block}
    room = _room(items, gpus, fixed)
    used = {index: gpus[index] - room[index] for index in gpus}
    limits = room
    if policy == "balanced_low_0" and len(gpus) > 1:
        first = next(iter(gpus))
        size = _least(room[first], lambda cap: CPU not in _next_fit(items, blocks, {**room, first: cap}).values())
        limits = {**room, first: size}
    free = [index for index in gpus if policy != "balanced_low_0" or index != next(iter(gpus))] or list(gpus)

    def caps(share: int) -> dict[int, int]:
        return {**limits, **{i: min(limits[i], gpus[i] * share // _PARTS - used[i]) for i in free}}

    share = _least(_PARTS, lambda part: CPU not in _next_fit(items, blocks, caps(part)).values())
    where = list(packing.where)
    for number, device in _next_fit(items, blocks, caps(share)).items():
        where[number] = device
    return Packing(where, used=_used(items, where))


_PARTS = 1 << 14  # budgets are shared out in these parts


def _least(high: int, works: Callable[[int], bool]) -> int:
    """The least number up to ``high`` for which ``works``, which holds at ``high``, by bisection."""
    low = -1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high


def _preference(items: Sequence[Item], gpus: dict[int, int], packing: Packing, policy: str) -> tuple[float, ...]:
    """Among packings of the same cost: what the policy wants, then the fewest jumps between devices."""
    blocks = [packing.where[n] for n, item in enumerate(items) if item.block and packing.where[n] != CPU]
    jumps = 0
    for number, item in enumerate(items):
        if not item.block and blocks and packing.where[number] not in (CPU, blocks[-1 if item.tail else 0]):
            jumps += 1
    used = [packing.used.get(index, 0) for index in gpus]
    if policy == "sequential":
        return (sum(place * size for place, size in enumerate(used)), jumps)
    fullest = max((size / gpus[index] for index, size in zip(gpus, used, strict=True)), default=0.0)
    if policy == "balanced_low_0" and len(used) > 1:
        return (used[0], fullest, jumps)
    return (round(fullest, 2), jumps, fullest)
