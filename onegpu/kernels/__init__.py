"""Ops: one file each, with the definition in plain PyTorch (the CPU path for good), the kernel and its cost.

Importing a module of this package defines its ops under ``torch.ops.onegpu``; nothing compiles and no GPU is touched.
"""

from __future__ import annotations

OPS = (
    "quantize_4bit",
    "dequantize_4bit",
    "quantize_blockwise",
    "dequantize_blockwise",
    "int8_vectorwise_quant",
    "int8_linear",
    "linear_4bit",
)


def available() -> dict[str, str]:
    """Which implementation every op uses on this machine: ``{op: implementation}``, the table of ``onegpu env``."""
    return dict.fromkeys(OPS, "PyTorch definition")
