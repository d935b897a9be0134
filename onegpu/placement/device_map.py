"""``device_map`` and ``max_memory``: where every part of a model goes, decided before a byte is loaded.

The map is ours, from exact bytes; transformers gets it as a plain dict and accelerate hooks the modules. A part mapped
to ``torch.device("cpu")`` beside GPUs is one that accelerate leaves where it is: blocks in CPU memory are copied to a
GPU for each call by our own hook (:mod:`onegpu.placement.hooks`), embeddings and heads are computed on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from onegpu.errors import MemoryBudgetError, bad_argument
from onegpu.hardware import check_device
from onegpu.placement.advice import advice
from onegpu.placement.budget import DISK, Budgets, device_key, read_budgets
from onegpu.placement.fit import check_fits, format_bytes
from onegpu.placement.pack import CPU, Packing, pack
from onegpu.placement.sizes import Sizes, in_4_bits, output_head
from onegpu.placement.units import Unit, find_units, group_tied, items_of

logger = logging.getLogger("onegpu")

POLICIES = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Wish:
    """What the user asked for. free: bytes by device, measured if None (tests and plans invent them)."""

    device_map: Any = None
    max_memory: Any = None
    free: Mapping[int | str, int | None] | None = None


@dataclass(frozen=True)
class Placement:
    """Where a model goes.

    device_map: by part, as transformers takes it. streamed: parts in CPU memory that a GPU computes, and which one.
    used: bytes by GPU index and "cpu". main: where calls begin. text: one line for the user.
    """

    device_map: dict[str, Any]
    streamed: dict[str, int] = field(default_factory=dict)
    used: dict[int | str, int] = field(default_factory=dict)
    main: Any = None
    text: str = ""

    @property
    def spread(self) -> bool:
        """Whether it is on several devices, so that hooks must move what goes between them."""
        return len(set(self.device_map.values())) > 1


@dataclass(frozen=True)
class Weights:
    """The model on the meta device and its sizes. form: "fp4", "bfloat16", …; shrinks: 4 bits could be asked for."""

    model: Any
    sizes: Sizes
    form: str
    shrinks: bool = False

    @property
    def name(self) -> str:
        """For sentences."""
        return f"{type(self.model).__name__} in {self.form}"


def place(weights: Weights, wish: Wish) -> Placement:
    """Decide where everything goes.

    Raises:
        ArgumentError: a device that this machine does not have, a map with gaps, "disk". MemoryBudgetError: the model
            does not fit in what is allowed; it says how many bytes are missing and what would fit.
    """
    device_map = wish.device_map
    if device_map is None and wish.max_memory is not None:
        device_map = "auto"
    if isinstance(device_map, str) and device_map in POLICIES:
        return _plan(weights, device_map, read_budgets(wish.max_memory, wish.free))
    if isinstance(device_map, Mapping):
        return _explicit(weights, device_map, wish)
    return _single(weights, device_map)


def _plan(weights: Weights, policy: str, budgets: Budgets) -> Placement:
    groups = group_tied(find_units(weights.model, weights.sizes), weights.sizes)
    packing = pack(items_of(groups), budgets.gpus, budgets.cpu, policy)
    if packing.missing:
        raise MemoryBudgetError(_too_small(weights, budgets, packing, policy))
    devices = {unit.name: packing.where[number] for number, group in enumerate(groups) for unit in group}
    units = [unit for group in groups for unit in group]
    stage = {groups[number][0].name: packing.stage or 0 for number in packing.streamed}
    return _placement(weights, units, devices, stage)


def _too_small(weights: Weights, budgets: Budgets, packing: Packing, policy: str) -> str:
    allowed = [f"{format_bytes(size)} on GPU {index}" for index, size in budgets.gpus.items()]
    allowed.append(f"{format_bytes(budgets.cpu or 0)} of CPU memory")
    smaller = in_4_bits(weights.model, weights.sizes) if weights.shrinks else None
    options = []
    for sizes in (weights.sizes, *((smaller,) if smaller else ())):
        options.append(items_of(group_tied(find_units(weights.model, sizes), sizes)))
    fixes = advice(options[0], budgets, policy, options[1] if smaller else None)
    source = "max_memory allows" if budgets.given else "free are"
    return (
        f"{weights.name} takes {format_bytes(weights.sizes.total)}; {source} {', '.join(allowed)}: "
        f"{format_bytes(packing.missing)} ({packing.missing} bytes) are missing. "
        f"What would fit: {'; '.join(fixes)}."
    )


def _placement(weights: Weights, units: list[Unit], devices: dict[str, int], streamed: dict[str, int]) -> Placement:
    order = {name: number for number, name in enumerate(dict(weights.model.named_modules()))}
    units = sorted(units, key=lambda unit: order.get(unit.name, order.get(unit.name.rpartition(".")[0], 0)))
    gpus = sorted({device for device in devices.values() if device != CPU})
    # "cpu" makes accelerate copy leaf by leaf and leave scales on the GPU; a torch.device is a place like any other.
    host: Any = torch.device("cpu") if gpus else "cpu"
    mapped = {unit.name: host if devices[unit.name] == CPU else devices[unit.name] for unit in units}
    if len(set(mapped.values())) == 1:
        mapped = {"": next(iter(mapped.values()))}
    used: dict[int | str, int] = {}
    for unit in units:
        key = "cpu" if devices[unit.name] == CPU else devices[unit.name]
        used[key] = used.get(key, 0) + unit.bytes
    text = _describe(weights, units, devices, streamed, used)
    return Placement(mapped, streamed, used, gpus[0] if gpus else "cpu", text)


def _describe(
    weights: Weights, units: list[Unit], devices: dict[str, int], streamed: dict[str, int], used: dict[int | str, int]
) -> str:
    parts = []
    for key in sorted(used, key=lambda key: (key == "cpu", str(key))):
        here = [unit for unit in units if ("cpu" if devices[unit.name] == CPU else devices[unit.name]) == key]
        blocks = [unit for unit in here if unit.block]
        others = [unit.name for unit in here if not unit.block and not unit.name.endswith(("norm", "ln_f"))]
        what = [f"{len(blocks)} blocks"] if blocks else []
        what += others if len(others) <= 3 else [f"{len(others)} other parts"]
        place = "in CPU memory" if key == "cpu" else f"on GPU {key}"
        how = ""
        if key == "cpu" and len(used) > 1:
            waiting = [unit for unit in here if unit.name in streamed]
            gpu = next(iter(streamed.values()), 0)
            how = f"; blocks stay in {weights.form} there and are copied to GPU {gpu} for each call" if waiting else ""
            how += "; the rest is computed there" if len(waiting) < len(here) and waiting else ""
            how += "; computed there" if not waiting else ""
        parts.append(f"{format_bytes(used[key])} {place} ({', '.join(what) or 'norms'}{how})")
    return f"{weights.name}, {format_bytes(weights.sizes.total)}: {', '.join(parts)}"


def _explicit(weights: Weights, device_map: Mapping[Any, Any], wish: Wish) -> Placement:
    count = None if wish.free is None else sum(isinstance(key, int) for key in wish.free)
    given: dict[str, int] = {}
    for name, device in device_map.items():
        key = device_key(device, "device_map", count)
        if key == "disk":
            raise bad_argument("device_map", {name: device}, "asks for the disk, which holds no weights here", DISK)
        given[str(name)] = CPU if key == "cpu" else int(key)
    units = find_units(weights.model, weights.sizes, [name for name in given if name])
    devices = {unit.name: _lookup(unit.name, given) for unit in units}
    for group in group_tied(units, weights.sizes):
        # One tensor is in one place: that of the part which holds it (an embedding), for the others too (a head).
        holder = max(group, key=lambda unit: unit.bytes)
        for unit in group:
            devices[unit.name] = devices[holder.name]
    gpus = [device for device in devices.values() if device != CPU]
    streamed = {}
    last = gpus[0] if gpus else CPU
    for unit in units:
        last = devices[unit.name] if devices[unit.name] != CPU else last
        if gpus and devices[unit.name] == CPU and not _stays(weights.model, unit):
            streamed[unit.name] = last
    placement = _placement(weights, units, devices, streamed)
    budgets = read_budgets({index: _EVERYTHING for index in set(gpus)} | {"cpu": _EVERYTHING}, wish.free)
    if wish.max_memory is not None:
        budgets = read_budgets(wish.max_memory, wish.free)
    for key, size in placement.used.items():
        limit = budgets.gpus.get(key, 0) if isinstance(key, int) else budgets.cpu
        if limit is not None and size > limit:
            raise MemoryBudgetError(
                f"device_map puts {format_bytes(size)} of {weights.name} {_where(key)}, {format_bytes(limit)} are "
                f"allowed: {format_bytes(size - limit)} ({size - limit} bytes) are missing. Map less of it there, or "
                f"pass device_map='auto'."
            )
    return placement


_EVERYTHING = 1 << 62


def _where(key: int | str) -> str:
    return "into CPU memory" if key == "cpu" else f"on GPU {key}"


def _lookup(name: str, given: Mapping[str, int]) -> int:
    """The device of the longest entry that ``name`` is or stands below."""
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        if ".".join(parts[:length]) in given:
            return given[".".join(parts[:length])]
    raise bad_argument(
        "device_map", dict(given), f"names no device for {name!r}", f"add {name!r}, or '' for all that is not named"
    )


def _stays(model: Any, unit: Unit) -> bool:
    """Whether a part in CPU memory is computed there: tables of which a call reads a few rows, and heads."""
    return unit.module is None or isinstance(unit.module, nn.Embedding) or unit.module is output_head(model)


def _single(weights: Weights, device: Any) -> Placement:
    check_device(device, name="device_map")
    target = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    if target.type != "meta":
        fixes = "load_in_4bit=True makes it smaller" if weights.shrinks else "Free memory, or take a smaller model"
        if target.type == "cuda":
            fixes += ". device_map='auto' also uses other GPUs and CPU memory"
        check_fits(weights.sizes.total, target, weights.name, f"{fixes}.")
    return Placement({"": target}, used={str(target): weights.sizes.total}, main=target)
