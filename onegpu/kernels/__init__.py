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
    "int8_vectorwise_dequant",
    "int8_linear",
    "linear_4bit",
    "linear_16bit",
    "decode_attention",
    "rms_norm",
    "layer_norm",
    "rotary",
    "gated_mlp",
)


_TRITON = {
    "quantize_4bit": "Triton",
    "dequantize_4bit": "Triton",
    "quantize_blockwise": "Triton",
    "int8_vectorwise_quant": "Triton",
    "int8_vectorwise_dequant": "Triton",
    "int8_linear": "CUDA C++ up to 128 rows, then dequantised",
    "linear_4bit": "CUDA C++ up to 64 rows, then dequantised",
    "linear_16bit": "CUDA C++ up to 8 rows, then cuBLAS",
    **dict.fromkeys(("decode_attention", "rms_norm", "layer_norm", "rotary", "gated_mlp"), "Triton"),
}


def available() -> dict[str, str]:
    """Which implementation every op uses on this machine: ``{op: implementation}``, the table of ``onegpu env``."""
    import torch

    from onegpu.kernels.library import has_triton

    names = dict.fromkeys(OPS, "PyTorch definition")
    if torch.cuda.is_available() and has_triton():
        names |= _TRITON
    return names
