"""Inputs that the tests of quantised code share."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# One element, less than a block, rows that end inside a block, rows of whole blocks, more than two dimensions.
SHAPES = ((1,), (63,), (1, 1), (3, 65), (113, 203), (24, 256), (2, 5, 27))


def weights(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """Normal values with what quantisers trip over: a run of zeros, a huge value, a tiny one, and minus zero."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(shape, generator=generator).view(-1) * 0.05
    if flat.numel() >= 512:
        flat[64:192] = 0.0  # at least one whole block of zeros for every block size up to 64
        flat[300], flat[301], flat[302] = 100.0, 1e-6, -0.0
    return flat.view(shape).to(dtype).to(device)


def activations(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 1) -> torch.Tensor:
    """Normal values, a few of them multiplied by ten, as the outlier features of a language model are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if shape[-1] >= 16:
        x[..., 3::16] *= 10
    return x.to(dtype).to(device)
