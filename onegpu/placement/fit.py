"""Does it fit? Asked before a byte is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from onegpu.errors import MemoryBudgetError
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


def model_bytes(model: Any, quantizer: Any = None) -> int:
    """Bytes of a model on the meta device once it is loaded: parameters as ``quantizer`` will store them, and buffers.

    Scales are counted as one float32 per 64 weights in 4 bits (an upper bound for every block size but 32) and per row
    in 8.
    """
    total = 0.0
    seen: set[int] = set()
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        size = parameter.element_size()
        if quantizer is not None and quantizer.param_needs_quantization(model, name):
            size = quantizer.param_element_size(model, name, parameter)
            total += 4 * parameter.numel() / (64 if size < 1 else parameter.shape[-1])
        total += size * parameter.numel()
    return int(total)


def check_fits(needed: int, device: torch.device, what: str, fixes: str) -> None:
    """Raise ``MemoryBudgetError`` saying how much is missing unless ``needed`` bytes are free on ``device``."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise MemoryBudgetError(
            f"{what} needs {format_bytes(needed)} on {device}, {format_bytes(free)} are free: "
            f"{format_bytes(needed - free)} are missing. {fixes}"
        )


def check_device_fits(model: Any, quantizer: Any, device_map: Any) -> None:
    """Check a model on the meta device that goes to one device as a whole. Maps over several are planned elsewhere."""
    if not isinstance(device_map, Mapping) or len(set(map(str, device_map.values()))) != 1:
        return
    target = next(iter(device_map.values()))
    device = torch.device("cuda", target) if isinstance(target, int) else torch.device(target)
    if device.type == "meta":
        return
    fix = "Quantise to 4 bits" if quantizer.settings.bits == 8 else "Free memory, or take a smaller model"
    name = type(model).__name__
    check_fits(model_bytes(model, quantizer), device, f"{name} in {quantizer.settings.quant_type}", f"{fix}.")
