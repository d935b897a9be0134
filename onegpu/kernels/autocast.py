"""Autocast for ops that torch does not know."""

from __future__ import annotations

import torch


def autocast_input(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the autocast dtype of its device where autocast is on, as ``F.linear`` would take it; else ``x``."""
    device = x.device.type
    if not x.is_floating_point() or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
