"""A package named bitsandbytes that has nothing of its own: every name in it is one of onegpu's.

It is what "changing one import" stands for: bitsandbytes' tests import it, unchanged. It is written to a temporary
folder for a run and put in front of an installed bitsandbytes.
"""

from __future__ import annotations

from pathlib import Path

_MATMUL = {name: "onegpu.functional" for name in ("MatmulLtState", "matmul", "matmul_4bit")}
_FUNCTIONAL = """
    QuantState create_dynamic_map create_fp8_map create_linear_map create_normal_map dequantize_4bit
    dequantize_blockwise dequantize_fp4 dequantize_nf4 gemv_4bit int8_double_quant int8_linear_matmul int8_mm_dequant
    int8_vectorwise_dequant int8_vectorwise_quant quantize_4bit quantize_blockwise quantize_fp4 quantize_nf4
"""
_NN = """
    Embedding4bit Embedding8bit EmbeddingFP4 EmbeddingNF4 Int8Params Linear4bit Linear8bitLt LinearFP4 LinearNF4
    Params4bit
"""

# Module of bitsandbytes -> name in it -> module of onegpu that has it under the same name.
NAMES: dict[str, dict[str, str]] = {
    "bitsandbytes": _MATMUL,
    "bitsandbytes.autograd": {},
    "bitsandbytes.autograd._functions": _MATMUL,
    "bitsandbytes.cextension": {},
    "bitsandbytes.functional": dict.fromkeys(_FUNCTIONAL.split(), "onegpu.functional"),
    "bitsandbytes.nn": dict.fromkeys(_NN.split(), "onegpu.nn"),
    "bitsandbytes.nn.modules": dict.fromkeys(_NN.split(), "onegpu.nn"),
}

# What the tests ask about the machine and the build; onegpu has no such question.
FACTS = {
    "bitsandbytes": '__version__ = "onegpu"\n',
    "bitsandbytes.cextension": "HIP_ENVIRONMENT = False\n",
    # Whether 4-bit weights are rearranged, and multiplied in bfloat16, on a CPU: ours are not.
    "bitsandbytes.functional": "def has_avx512bf16() -> bool:\n    return False\n",
}


def source_of(module: str) -> str:
    """The source of one module of the package."""
    children = [name.rpartition(".")[2] for name in NAMES if name.rpartition(".")[0] == module]
    lines = [f"from {owner} import {name}" for name, owner in NAMES[module].items()]
    lines += [f"from {module} import {child}" for child in children]
    return "\n".join([*lines, "", FACTS.get(module, "")])


def write(folder: Path) -> None:
    """Write the package below ``folder``, which goes to the front of ``sys.path``."""
    for module in NAMES:
        path = folder.joinpath(*module.split("."))
        is_package = any(name.startswith(f"{module}.") for name in NAMES)
        file = path / "__init__.py" if is_package else path.with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source_of(module), encoding="utf-8")
