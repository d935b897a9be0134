"""Registration of ops under ``torch.ops.onegpu``.

``Library.define``/``impl`` rather than ``custom_op``: the latter costs 12 microseconds of host time a call, this 4
(measured, see DESIGN section 3 "Registration"), and a 7B decoding step has about 350 ops.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from onegpu.errors import bad_argument

_LIBRARY = torch.library.Library("onegpu", "DEF")


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported: CUDA builds of torch bring it. Looks, and does not import."""
    return importlib.util.find_spec("triton") is not None


def define(
    schema: str, definition: Callable[..., Any], fake: Callable[..., Any], cuda: Callable[..., Any] | None = None
) -> None:
    """Define ``onegpu::<schema>`` with its PyTorch definition.

    Args:
        schema: op name and signature in torch's schema language.
        definition: the plain PyTorch implementation: CPU, and every device without a kernel of its own.
        fake: shape, dtype and stride propagation for meta tensors.
        cuda: the implementation for CUDA tensors; the definition where it is ``None``.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, definition, "CPU")
    _LIBRARY.impl(name, cuda or definition, "CUDA")
    torch.library.register_fake(f"onegpu::{name}", fake, lib=_LIBRARY)


def check_implementation(implementation: str) -> None:
    """Raises ArgumentError unless it is "auto" or "portable"."""
    if implementation not in ("auto", "portable"):
        raise bad_argument("implementation", implementation, "is not known", 'Use "auto" or "portable"')


def check_columns(x: torch.Tensor, columns: int) -> None:
    """Raises ArgumentError unless x is ``[..., columns]``: kernels take the weight's length of a row for x's."""
    if x.dim() == 0 or x.shape[-1] != columns:
        raise bad_argument(
            "x", list(x.shape), "has rows of another length than the weight", f"Pass an x of {columns} columns"
        )
