"""Does it fit? Asked before a byte is loaded."""

from __future__ import annotations

from typing import Any

import torch

from onegpu.errors import ArgumentError, MemoryBudgetError
from onegpu.hardware import free_host_bytes


def format_bytes(count: float) -> str:
    """``6.57 GB``: decimal units, as ``max_memory`` and data sheets have them."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on ``device`` now, torch's unused cache included; None where nobody knows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_host_bytes() if device.type == "cpu" else None


def check_fits(needed: int, device: torch.device, what: str, fixes: str) -> None:
    """Raise ``MemoryBudgetError`` saying how much is missing unless ``needed`` bytes are free on ``device``."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise MemoryBudgetError(
            f"{what} needs {format_bytes(needed)} on {device}, {format_bytes(free)} are free: "
            f"{format_bytes(needed - free)} are missing. {fixes}"
        )


def refuse_move(model: Any, device: Any) -> None:
    """Raise ``ArgumentError`` if ``model`` is spread over devices and is asked to move to ``device``."""
    if device is not None and len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ArgumentError(
            f"device={device} cannot be given to .to() of a model that device_map spread over several devices. Load it "
            f"again with device_map={str(device)!r}."
        )
