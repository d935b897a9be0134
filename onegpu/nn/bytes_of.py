"""Moving quantised tensors as bytes, so that no dtype cast can reach them, and the memory they take."""

from __future__ import annotations

from collections.abc import Callable

import torch


def move_as_bytes(tensor: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply what ``nn.Module._apply`` passes around (a move, a cast, ``share_memory_``, …) to the bytes of ``tensor``.

    A cast leaves integers alone, so only the move is left; ``.half()`` on a model must not touch float32 scales, nor
    packed codes that are stored as bfloat16.
    """
    if tensor.dim() == 0:
        return fn(tensor.view(1).view(torch.uint8)).view(tensor.dtype).view(())
    return fn(tensor.contiguous().view(torch.uint8)).view(tensor.dtype)


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the tensors that are there."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
