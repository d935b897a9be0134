"""The functions people know from ``bitsandbytes`` and ``bitsandbytes.functional``: same names, arguments and results.

Formats: 4-bit (NF4, FP4) with one float32 scale a block, plain or double quantised; blockwise 8-bit; row-wise int8.
All of it is thin over kernels/.
"""

from onegpu.functional.blockwise import (
    check_4bit,
    dequantize_4bit,
    dequantize_blockwise,
    dequantize_fp4,
    dequantize_nf4,
    quantize_4bit,
    quantize_blockwise,
    quantize_fp4,
    quantize_nf4,
)
from onegpu.functional.int8 import (
    int8_double_quant,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from onegpu.functional.maps import create_dynamic_map, create_fp8_map, create_linear_map, create_normal_map
from onegpu.functional.products import MatmulLtState, gemv_4bit, matmul, matmul_4bit
from onegpu.functional.quant_state import QuantState

__all__ = [
    "MatmulLtState",
    "QuantState",
    "check_4bit",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "matmul",
    "matmul_4bit",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]
