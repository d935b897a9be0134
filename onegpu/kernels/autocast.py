"""Autocast for ops that torch does not know."""

from __future__ import annotations

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives the inputs of a linear on ``device_type``; None where autocast is off."""
    # Asking torch about a device without autocast ("meta") is an error there, and asking which devices have it
    # (torch.amp.is_autocast_available) ends torch 2.11's compiled graphs.
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_input(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the autocast dtype of its device where autocast is on, as ``F.linear`` would take it; else ``x``."""
    dtype = autocast_dtype(x.device.type) if x.is_floating_point() else None
    return x if dtype is None else x.to(dtype)
