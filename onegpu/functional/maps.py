"""The value tables that :func:`quantize_blockwise` takes as ``code``: float32 ``[256]``, ascending, largest value 1.

A type of fewer than 8 bits fills the rest of its table with zeros, so that codes are bytes whatever the type.
"""

from __future__ import annotations

import torch

from onegpu.kernels.codebooks import dynamic_map


def _table(values: torch.Tensor) -> torch.Tensor:
    """Sorted, with zeros up to 256 entries, divided by the largest."""
    zeros = values.new_zeros(256 - values.numel())
    table = torch.cat((values, zeros)).sort().values
    return table / table.max()


def _check_bits(total_bits: int) -> None:
    if not 2 <= total_bits <= 8:
        raise ValueError(f"total_bits={total_bits} is not supported; use 2 to 8, a code is one byte")


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> torch.Tensor:
    """Evenly spaced values in [-1, 1], or [0, 1] unless ``signed``.

    Args:
        signed: whether there are negative values.
        total_bits: 2 to 8; there are two to that power values.
        add_zero: give one value up, so that zero is among the rest; always so for fewer than 8 bits.
    """
    _check_bits(total_bits)
    count = 2**total_bits
    if signed and (add_zero or total_bits < 8):
        count -= 1
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, count)
    if signed and count % 2:
        values[count // 2] = 0.0  # linspace misses it by 3e-8
    return _table(values)


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> torch.Tensor:
    """Decades of shrinking resolution (arXiv:1511.04561): leading zeros give the decade, the other bits the fraction.

    Args:
        signed: whether one bit is a sign; else its values go to the fractions.
        max_exponent_bits: number of decades.
        total_bits: 2 to 8.
    """
    _check_bits(total_bits)
    spare = total_bits - 1 - max_exponent_bits
    if not 0 < max_exponent_bits <= total_bits or (max_exponent_bits == total_bits and not signed):
        raise ValueError(
            f"max_exponent_bits={max_exponent_bits} leaves no fraction in total_bits={total_bits}; use 1 to "
            f"{total_bits - 1}"
        )
    if (signed, max_exponent_bits, total_bits) == (True, 7, 8):
        return dynamic_map(torch.device("cpu")).clone()
    values = [0.0, 1.0]
    for decade in range(max_exponent_bits):
        scale = 10 ** (decade - max_exponent_bits + 1)
        values += _fractions(int(2 ** (decade + spare + (not signed))), scale, signed)
    if spare > 0:  # the patterns without an indicator bit, in the last decade
        values += _fractions(2**spare - 1, 1, signed)
    return torch.tensor(sorted(values + [0.0] * (256 - len(values))), dtype=torch.float32)


def _fractions(count: int, scale: float, signed: bool) -> list[float]:
    """``scale`` times the middles of an even division of [0.1, 1]; with their negatives if ``signed``."""
    edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float32)
    positive: list[float] = (scale * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
    return positive + [-value for value in positive] if signed else positive


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> torch.Tensor:
    """Every value of a small float with subnormals and without infinities or NaN.

    Args:
        signed: whether one bit is the sign.
        exponent_bits, precision_bits: how many bits each part has.
        total_bits: the sum, for the reader; 2 to 8.
    """
    _check_bits(total_bits)
    if exponent_bits + precision_bits + signed != total_bits:
        raise ValueError(
            f"total_bits={total_bits} is not the sum of exponent_bits={exponent_bits}, precision_bits="
            f"{precision_bits} and signed={signed}"
        )
    bias = 2 ** (exponent_bits - 1)
    fractions = torch.arange(2**precision_bits, dtype=torch.float64) / 2**precision_bits
    # Exponents run downwards, the order does not matter in a table: the value of pattern e is 2**(bias + 1 - e).
    normal = [(1 + fractions) * 2.0 ** (bias + 1 - e) for e in range(1, 2**exponent_bits)]
    values = torch.cat([fractions * 2.0**-bias, *normal])
    if signed:
        values = torch.cat((values, 0.0 - values))
    return _table(values.float())


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> torch.Tensor:
    """NormalFloat with 4 bits: values that a normal variable falls between with equal chance (arXiv:2305.14314).

    Args:
        offset: the probability at the outer edge, between 0.5 and 1.
        use_extra_value: 8 positive values beside 7 negative ones and zero; else 7 of each.
    """
    if not 0.5 < offset < 1:
        raise ValueError(f"offset={offset} is not a probability between 0.5 and 1; NF4's is 0.9677083")
    # The points are float32 and the quantiles float64, as those of the format's own table.
    positive, negative = (
        torch.special.ndtri(torch.linspace(offset, 0.5, steps)[:-1].double())
        for steps in (9 if use_extra_value else 8, 8)
    )
    return _table(torch.cat((positive, -negative)).float())
