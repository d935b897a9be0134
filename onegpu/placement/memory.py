"""What a model's weights take, by format, against 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from onegpu.nn import ExpertStack4bit, Linear4bit, Linear8bitLt
from onegpu.nn.bytes_of import nbytes
from onegpu.nn.experts import ExpertStack


@dataclass(frozen=True)
class MemoryRow:
    """One line of the table: format, number of tensors, bytes of weights, of scales, and of 16-bit weights instead.

    name: "weights", or "expanded copies" for what :func:`onegpu.placement.expand.allow_expansion` keeps on a CPU.
    """

    name: str
    format: str
    count: int
    bytes: int
    bytes_16bit: int


def memory_table(model: Any) -> list[MemoryRow]:
    """Rows by format, shared tensors once; their ``bytes`` sum to what parameters and buffers take."""
    totals: dict[tuple[str, str], list[int]] = {}
    seen: set[int] = set()

    def add(name: str, kind: str, size: int, numel: int, tensors: int = 1) -> None:
        row = totals.setdefault((name, kind), [0, 0, 0])
        row[0] += tensors
        row[1] += size
        row[2] += 2 * numel

    for module in model.modules():
        quantized = quantized_bytes(module)
        if quantized is not None:
            kind, numel, parts = quantized
            add("weights", kind, parts["weight"] + parts["scales"], numel)
            if parts.get("expanded"):
                add("expanded copies", f"of {kind}", parts["expanded"], 0)
        own = quantized_tensors(module)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) in seen or id(tensor) in own:
                continue
            seen.add(id(tensor))
            add("weights", str(tensor.dtype).removeprefix("torch."), nbytes(tensor), tensor.numel())
    return [MemoryRow(name, kind, *row) for (name, kind), row in totals.items()]


def quantized_bytes(module: nn.Module) -> tuple[str, int, dict[str, int]] | None:
    """Format, weights stood for, and bytes by kind ("weight", "scales", …) of a quantised module; None for another."""
    if isinstance(module, (Linear4bit, Linear8bitLt)):
        kind = "int8" if isinstance(module, Linear8bitLt) else module.weight.quant_type
        if module.weight.is_floating_point() and (kind == "int8" or not module.weight.bnb_quantized):  # type: ignore[union-attr]
            return None
        if isinstance(module, Linear4bit) and module.nested_absmax is not None:
            kind += " double"
        return kind, module.in_features * module.out_features, module.nbytes()
    if isinstance(module, ExpertStack):
        kind = "int8"
        if isinstance(module, ExpertStack4bit):
            kind = module.quant_type + (" double" if module.nested_absmax is not None else "")
        return f"{kind} experts", module.shape.numel(), module.nbytes()
    return None


def quantized_tensors(module: nn.Module) -> set[int]:
    """Ids of the tensors that :func:`quantized_bytes` counts for ``module``."""
    if quantized_bytes(module) is None:
        return set()
    bias = module._parameters.get("bias")
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return {id(tensor) for tensor in tensors if tensor is not bias}
