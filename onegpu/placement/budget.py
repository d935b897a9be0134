"""``max_memory``: bytes allowed on each device, in every spelling transformers accepts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from onegpu.errors import bad_argument
from onegpu.hardware import check_device_index, device_count
from onegpu.placement.fit import free_bytes

# Left free on a device whose budget the user did not give: activations, the cache, workspaces of libraries.
RESERVED_SHARE = 0.10
RESERVED_LEAST = 256 * 1024**2
_HOST_SHARE = 0.90

_POWER = {"K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"\s*([0-9][0-9._]*(?:e[+-]?[0-9]+)?|\.[0-9]+)\s*([KMGT])(I?)(B)\s*", re.IGNORECASE)
_FIX = "Write bytes as a number, or a size such as '600MB', '1.5GB' or '1GiB'"


@dataclass(frozen=True)
class Budgets:
    """Bytes of weights that may go to each device.

    gpus: by index, ascending; a GPU that is not in it gets nothing. cpu: bytes of CPU memory, None where nobody knows
    how much there is. given: the user said so (``max_memory``); otherwise measured, less a reserve for activations.
    """

    gpus: dict[int, int]
    cpu: int | None
    given: bool


def parse_bytes(value: Any, name: str = "max_memory") -> int:
    """``"600MB"`` to 600000000; numbers are bytes. As in transformers, ``GB`` is 10⁹, ``GiB`` 2³⁰ and ``Gb`` bits.

    Raises:
        ArgumentError: not a size, negative, infinite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise bad_argument(name, value, "is not a size", _FIX)
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match is None:
            raise bad_argument(name, value, "is not a size", _FIX)
        number, prefix, binary, unit = match.groups()
        try:
            count = float(number) * (1024 if binary else 1000) ** _POWER[prefix.upper()]
        except ValueError:
            raise bad_argument(name, value, "is not a size", _FIX) from None
        # transformers: a small b means bits, but not after the binary prefixes.
        value = count / 8 if unit == "b" and not binary else count
    if not math.isfinite(value) or value < 0:
        raise bad_argument(name, value, "is not a size", _FIX)
    return int(value)


def read_budgets(max_memory: Any = None, free: Mapping[int | str, int | None] | None = None) -> Budgets:
    """What may be used of each device.

    Args:
        max_memory: the user's mapping from GPU indices and ``"cpu"`` to sizes, or None: all GPUs, all of the CPU.
        free: bytes that are free, by GPU index and ``"cpu"``; measured if None.

    Raises:
        ArgumentError: no mapping, a key that is no device of this machine, a value that is no size, or ``"disk"``.
    """
    gpus_free, cpu_free = _measure(max_memory) if free is None else _split(free)
    cpu = None if cpu_free is None else int(cpu_free * _HOST_SHARE)
    if max_memory is None:
        return Budgets({index: less_reserve(size) for index, size in sorted(gpus_free.items())}, cpu, False)
    gpus: dict[int, int] = {}
    for key, value in _named(max_memory, len(gpus_free)).items():
        size = parse_bytes(value, f"max_memory[{key!r}]")
        if key == "cpu":
            cpu = size if cpu_free is None else min(size, cpu_free)
        elif isinstance(key, int):
            gpus[key] = min(size, gpus_free[key])
    return Budgets(dict(sorted(gpus.items())), cpu, True)


def less_reserve(free: int) -> int:
    """``free`` bytes less what activations and the cache are left, on a device without a budget of its own."""
    return max(0, free - max(int(free * RESERVED_SHARE), min(RESERVED_LEAST, free // 2)))


def _measure(max_memory: Any) -> tuple[dict[int, int], int | None]:
    # Asking a GPU for its free memory makes a context there: not on one that the user left out.
    wanted = set(_named(max_memory, device_count())) if max_memory is not None else None
    free = {
        index: (free_bytes(torch.device("cuda", index)) or 0) if wanted is None or index in wanted else 0
        for index in range(device_count())
    }
    return free, free_bytes(torch.device("cpu"))


def _split(free: Mapping[int | str, int | None]) -> tuple[dict[int, int], int | None]:
    return {key: size or 0 for key, size in free.items() if isinstance(key, int)}, free.get("cpu")


def _named(max_memory: Any, count: int) -> dict[int | str, Any]:
    """The mapping with its keys as GPU indices and "cpu"."""
    if not isinstance(max_memory, Mapping):
        raise bad_argument(
            "max_memory", max_memory, "is not a mapping", "pass a dict such as {0: '6GB', 'cpu': '30GB'}"
        )
    named: dict[int | str, Any] = {}
    for key, value in max_memory.items():
        device = device_key(key, "max_memory", count)
        if device == "disk":
            raise bad_argument("max_memory", dict(max_memory), "offers the disk, which holds no weights here", DISK)
        if device in named:
            raise bad_argument("max_memory", dict(max_memory), f"names {device!r} twice", "give each device once")
        named[device] = value
    return named


DISK = (
    "leave 'disk' out: what does not fit on the GPUs goes to CPU memory, quantised as on a GPU; load_in_4bit=True "
    "makes it smaller"
)


def device_key(key: Any, name: str, count: int | None = None) -> int | str:
    """A GPU index, "cpu" or "disk" from ``1``, ``"1"``, ``"cuda:1"``, ``torch.device("cuda", 1)``, ….

    Raises:
        ArgumentError: no device, or none of this machine's; it says ``name``.
    """
    if isinstance(key, int) and not isinstance(key, bool):
        index = key
    else:
        text = str(key)
        if text in ("cpu", "disk"):
            return text
        kind, _, number = text.partition(":")
        number = kind if kind.isdecimal() else number or "0"
        if isinstance(key, bool) or not (kind == "cuda" or kind.isdecimal()) or not number.isdecimal():
            raise bad_argument(name, key, "is not a device", "Name GPUs by their index (0, 1, …) and memory as 'cpu'")
        index = int(number)
    check_device_index(index, name=name, count=count)
    return index
