"""A model as the parts that a device map names: repeated blocks, and what stands around them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from onegpu.placement.pack import Item
from onegpu.placement.sizes import Sizes


@dataclass(frozen=True)
class Unit:
    """A module (or a tensor of a module that is divided) that goes to one device as a whole."""

    name: str
    module: nn.Module | None
    bytes: int
    block: bool


def find_units(model: Any, sizes: Sizes, cut: Collection[str] = ()) -> list[Unit]:
    """The parts of ``model`` in its order; together they hold every tensor once.

    Not divided: what the model says must not be (``_no_split_modules``), elements of a ``ModuleList``, and containers
    with none of these inside. ``cut``: names that the user's map has, whatever they are.
    """
    whole = {name for name in _blocks(model) if not any(_below(other, name) for other in cut)}
    return list(_walk("", model, sizes, whole, (*whole, *cut)))


def _below(name: str, parent: str) -> bool:
    return name.startswith(f"{parent}.")


def _blocks(model: Any) -> set[str]:
    classes = set(getattr(model, "_no_split_modules", None) or ())
    named: list[str] = []
    listed: list[str] = []
    for name, module in model.named_modules():
        # Parents come before their children, so the outermost is taken.
        if not name or any(_below(name, other) for other in named):
            continue
        if type(module).__name__ in classes:
            named.append(name)
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList):
            listed.append(name)
    holding = {name for name in listed if any(_below(other, name) for other in named)}
    outer = [name for name in listed if name not in holding]
    return set(named) | {name for name in outer if not any(_below(name, other) for other in outer)}


def _walk(name: str, module: nn.Module, sizes: Sizes, whole: set[str], inside: Collection[str]) -> Iterator[Unit]:
    if name and not any(_below(other, name) for other in inside):
        if any(_below(key, name) for key in sizes.bytes):
            yield Unit(name, module, _bytes(sizes, name), name in whole)
        return
    for key in (*module._parameters, *module._buffers):
        full = f"{name}.{key}".lstrip(".")
        if full in sizes.bytes:
            yield Unit(full, None, sizes.bytes[full], False)
    for key, child in module.named_children():
        yield from _walk(f"{name}.{key}".lstrip("."), child, sizes, whole, inside)


def _bytes(sizes: Sizes, name: str) -> int:
    return sum(size for key, size in sizes.bytes.items() if _below(key, name))


def group_tied(units: list[Unit], sizes: Sizes) -> list[list[Unit]]:
    """Units that share a tensor, together; the groups in the order of their first unit."""
    owner = {key: unit.name for unit in units for key in sizes.bytes if key == unit.name or _below(key, unit.name)}
    leader = {unit.name: unit.name for unit in units}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for name, source in sizes.tied.items():
        first, second = find(owner[name]), find(owner[source])
        leader[second] = first
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(find(unit.name), []).append(unit)
    return list(groups.values())


def items_of(groups: list[list[Unit]]) -> list[Item]:
    """The groups as :func:`onegpu.placement.pack.pack` takes them."""
    blocks = [number for number, group in enumerate(groups) if _is_plain_block(group)]
    items = []
    for number, group in enumerate(groups):
        size = sum(unit.bytes for unit in group)
        table = all(isinstance(unit.module, nn.Embedding) for unit in group)
        # An embedding tied to the head stands on both sides of the blocks: the head's side is the one that works.
        tail = bool(blocks) and (number > blocks[0] or (len(group) > 1 and not table))
        items.append(Item(size, _is_plain_block(group), 0 if table else size, tail))
    return items


def _is_plain_block(group: list[Unit]) -> bool:
    return len(group) == 1 and group[0].block
