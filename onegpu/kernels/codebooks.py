"""The value tables of the 4-bit and dynamic 8-bit formats.

Sources: NF4 is defined in QLoRA (Dettmers et al. 2023, arXiv:2305.14314, appendix E), the dynamic 8-bit map in 8-Bit
Approximations for Parallelism in Deep Learning (Dettmers 2015, arXiv:1511.04561) as extended in 8-bit Optimizers
(arXiv:2110.02861), and FP4 (1 sign, 2 exponent, 1 fraction bit, in bit-pattern order) in bitsandbytes' format. The
numbers are stored in every checkpoint as ``quant_map``, so they are compared bit by bit at load.
"""

from __future__ import annotations

from functools import lru_cache

import torch

QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Magnitudes in twelfths, by the three low bits of the code; bit 3 is the sign.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@lru_cache(maxsize=64)
def codebook_4bit(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values of ``quant_type`` by code: float32, shape ``[16]``, in [-1, 1]. Shared: clone before changing."""
    if quant_type == "nf4":
        values = torch.tensor(_NF4, dtype=torch.float32)
    elif quant_type == "fp4":
        # Code 8 is plus zero too: checkpoints hold this table, and bitsandbytes' has no minus zero.
        values = torch.tensor(_FP4_TWELFTHS + tuple(0.0 - v for v in _FP4_TWELFTHS), dtype=torch.float32)
        values /= values.abs().max()
    else:
        raise ValueError(f"quant_type={quant_type!r} is not a 4-bit type; use one of {', '.join(QUANT_TYPES)}")
    return values.to(device)


@lru_cache(maxsize=64)
def pair_table_4bit(quant_type: str, device: torch.device) -> torch.Tensor:
    """Both values of every packed byte, high nibble first, as one 64-bit element: int64, shape ``[256]``.

    View what is looked up as float32: one look-up decodes two weights, three times as fast as rows of ``[256, 2]``.
    """
    code = codebook_4bit(quant_type, device)
    byte = torch.arange(256, device=device)
    return torch.stack((code[byte >> 4], code[byte & 15]), dim=1).view(torch.int64).view(-1)


@lru_cache(maxsize=16)
def dynamic_map(device: torch.device) -> torch.Tensor:
    """The signed dynamic 8-bit map: float32, shape ``[256]``, ascending, in (-1, 1].

    Seven decades; decade ``i`` holds ``2**i`` fraction steps of each sign at the middles of an even division of
    [0.1, 1]; zero and one complete it.
    """
    values: list[float] = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        positive = ((10 ** (decade - 6)) * middles).tolist()
        values += positive + [-v for v in positive]
    return torch.tensor(sorted(values), dtype=torch.float32).to(device)
