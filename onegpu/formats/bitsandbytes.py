"""bitsandbytes' checkpoint format: which tensors of a file belong to a quantised weight, and are they whole.

4-bit: ``<m>.weight`` (packed) with ``<m>.weight.absmax``, ``.quant_map``, ``.quant_state.bitsandbytes__nf4|fp4`` and,
double quantised, ``.nested_absmax``, ``.nested_quant_map``. 8-bit: ``<m>.weight`` (int8) with ``<m>.SCB`` and, since
0.37, ``<m>.weight_format``. ``config.json`` carries ``quantization_config`` with ``quant_method: bitsandbytes``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from onegpu.errors import CheckpointError, bad_argument
from onegpu.formats.checkpoint import TensorInfo
from onegpu.kernels.codebooks import QUANT_TYPES

STATE_KEYS = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
PLAIN_KEYS = ("absmax", "quant_map")
NESTED_KEYS = ("nested_absmax", "nested_quant_map")
# Endings of a 4-bit weight's entries as transformers collects them; the bare weight last, where the first match wins.
ENDINGS_4BIT = (*(f"weight.{key}" for key in (*NESTED_KEYS, *PLAIN_KEYS, *STATE_KEYS)), "weight")
ENDINGS_8BIT = ("SCB", "weight_format", "weight")


@dataclass(frozen=True)
class Settings:
    """How to quantise: ``BitsAndBytesConfig`` in one frozen place.

    quant_type: "nf4", "fp4" or "int8". skip: module names that stay as they are, beside the default ones. exact:
    int8 layers round activations on every device.
    """

    quant_type: str
    double_quant: bool = False
    compute_dtype: Any = None
    quant_storage: Any = None
    threshold: float = 6.0
    has_fp16_weight: bool = False
    skip: tuple[str, ...] = ()
    keep_default_skips: bool = True
    exact: bool = False

    @property
    def bits(self) -> int:
        """4 or 8."""
        return 8 if self.quant_type == "int8" else 4

    @classmethod
    def from_config(cls, config: Any, keep_default_skips: bool = True) -> Settings:
        """From a ``BitsAndBytesConfig``; raises ``ArgumentError`` for a type that is none of ours."""
        if not (config.load_in_4bit or config.load_in_8bit):
            raise bad_argument(
                "quantization_config",
                config.to_diff_dict(),
                "asks for no quantisation",
                "set load_in_4bit=True or load_in_8bit=True in it, or leave it out",
            )
        if config.load_in_4bit and config.bnb_4bit_quant_type not in QUANT_TYPES:
            raise bad_argument(
                "bnb_4bit_quant_type",
                config.bnb_4bit_quant_type,
                "is not a 4-bit type",
                f"use one of {', '.join(QUANT_TYPES)}",
            )
        return cls(
            quant_type="int8" if config.load_in_8bit else config.bnb_4bit_quant_type,
            double_quant=config.bnb_4bit_use_double_quant,
            compute_dtype=config.bnb_4bit_compute_dtype,
            quant_storage=config.bnb_4bit_quant_storage,
            threshold=config.llm_int8_threshold,
            has_fp16_weight=config.llm_int8_has_fp16_weight,
            skip=tuple(config.llm_int8_skip_modules or ()),
            keep_default_skips=keep_default_skips,
        )


@dataclass
class QuantizedEntry:
    """One quantised weight of a file: its name, its kind ("4bit" or "8bit") and its tensors by ending."""

    name: str
    kind: str
    tensors: dict[str, TensorInfo] = field(default_factory=dict)


def find_quantized(tensors: Iterable[TensorInfo], bits: int) -> dict[str, QuantizedEntry]:
    """The quantised weights among a checkpoint's tensors, by the name of the weight.

    Args:
        tensors: everything the checkpoint holds.
        bits: what ``config.json`` says: 4 or 8.

    Raises:
        CheckpointError: a set of statistics is incomplete, orphaned or of the wrong kind, or there is none at all.
    """
    table = {info.name: info for info in tensors}
    entries: dict[str, QuantizedEntry] = {}
    for name, info in table.items():
        stem, ending = _split(name)
        if ending is None:
            continue
        kind = "8bit" if ending in ("SCB", "weight_format") else "4bit"
        weight = f"{stem}weight"
        if weight not in table:
            raise CheckpointError(
                file=info.file, tensor=name, reason=f"statistics of {weight!r}, which is missing", fix=_AGAIN
            )
        entry = entries.setdefault(weight, QuantizedEntry(weight, kind, {"weight": table[weight]}))
        entry.tensors[ending] = info
    for entry in entries.values():
        _check_entry(entry, bits)
    for name, info in table.items():
        if name.endswith(".weight") and info.dtype in ("U8", "I8") and name not in entries:
            raise CheckpointError(
                file=info.file, tensor=name, reason=f"{info.dtype} codes without their statistics", fix=_AGAIN
            )
    if not entries:
        file = next(iter(table.values())).file if table else "checkpoint"
        raise CheckpointError(
            file=file,
            reason=f"config.json says quantised to {bits} bits, but no tensor in the files is",
            fix="remove quantization_config from config.json and load with load_in_4bit or load_in_8bit",
        )
    return entries


_AGAIN = "save or download the checkpoint again"


def _split(name: str) -> tuple[str, str | None]:
    """``("a.b.", "weight.absmax")`` for the statistics of a weight, ``(name, None)`` for anything else."""
    for ending in (*ENDINGS_4BIT[:-1], *ENDINGS_8BIT[:-1]):
        if name.endswith(f".{ending}"):
            return name[: -len(ending)], ending
    return name, None


def _check_entry(entry: QuantizedEntry, bits: int) -> None:
    have = entry.tensors
    weight = have["weight"]
    if (entry.kind == "8bit") != (bits == 8):
        raise CheckpointError(
            file=weight.file,
            tensor=entry.name,
            reason=f"stored with {entry.kind} statistics, config.json says {bits} bits",
            fix="correct quantization_config in config.json",
        )
    if entry.kind == "8bit":
        needed, nested = ["SCB"], 0
        if weight.dtype != "I8":
            raise CheckpointError(
                file=weight.file, tensor=entry.name, reason=f"dtype {weight.dtype}, an 8-bit weight is I8", fix=_AGAIN
            )
    else:
        needed = [f"weight.{key}" for key in PLAIN_KEYS]
        nested = sum(f"weight.{key}" in have for key in NESTED_KEYS)
        states = sum(f"weight.{key}" in have for key in STATE_KEYS)
        if states != 1:
            raise CheckpointError(
                file=weight.file,
                tensor=entry.name,
                reason=f"{states} quant_state entries, there must be one",
                fix=_AGAIN,
            )
        if weight.dtype in ("F32", "F64", "I64", "I32") and len(weight.shape) > 1 and weight.shape[-1] != 1:
            raise CheckpointError(
                file=weight.file,
                tensor=entry.name,
                reason=f"{weight.dtype} {weight.shape} is no packed 4-bit weight",
                fix=_AGAIN,
            )
    missing = [key for key in needed if key not in have]
    if nested == 1:
        missing += [f"weight.{key}" for key in NESTED_KEYS if f"weight.{key}" not in have]
    if missing:
        raise CheckpointError(
            file=weight.file, tensor=entry.name, reason=f"its {' and '.join(missing)} is missing", fix=_AGAIN
        )
