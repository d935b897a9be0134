"""``QuantState``: what undoes a blockwise quantisation, in bitsandbytes' attributes and checkpoint entries."""

from __future__ import annotations

import json
from typing import Any

import torch

from onegpu.kernels.linear_4bit import Packed4bit

_NESTED_BLOCKSIZE = 256


class QuantState:
    """What is needed beside the packed codes to undo a blockwise quantisation.

    The value tables are shared by all states of a device: clone one before changing it.

    absmax: float32 scales ``[blocks]``, or their uint8 codes when nested. shape: of the original tensor. code: float32
    value table (``[16]`` or ``[256]``). blocksize: weights a scale. quant_type: "nf4", "fp4" or None (8-bit). dtype: of
    the original tensor. offset, state2: mean and state of the double quantised scales (QLoRA section 3), else None.
    """

    def __init__(
        self,
        absmax: torch.Tensor,
        shape: Any = None,
        code: torch.Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: torch.Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape = torch.Size(shape) if shape is not None else None
        self.code = code
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.dtype = dtype
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str) -> QuantState:
        """Rebuild a state from a checkpoint's entries (names as ``as_dict`` gives them, any prefix).

        Raises ``ValueError`` where one is missing or unreadable; whether they fit each other is not looked at.
        """
        fields = {key.split(".")[-1]: value for key, value in qs_dict.items()}
        blobs = [key for key in fields if key.startswith("bitsandbytes__")]
        if len(blobs) == 1:
            fields |= _read_facts(f"quant_state.{blobs[0]}", fields.pop(blobs[0]))
        elif "quant_type" not in fields:
            raise ValueError(f"expected one quant_state entry (bitsandbytes__nf4 or bitsandbytes__fp4), found {blobs}")
        needed = _STATE_ENTRIES + (_NESTED_ENTRIES if "nested_absmax" in fields else ())
        if missing := [name for name in needed if name not in fields]:
            raise ValueError(f"the 4-bit statistics lack {', '.join(missing)}")
        offset = state2 = None
        if "nested_absmax" in fields:
            offset = torch.tensor(float(fields["nested_offset"])).to(device)
            state2 = cls(
                absmax=fields["nested_absmax"].to(device),
                code=fields["nested_quant_map"].to(device),
                blocksize=fields["nested_blocksize"],
                dtype=_dtype_named("nested_dtype", fields["nested_dtype"]),
            )
        return cls(
            absmax=fields["absmax"].to(device),
            shape=fields["shape"],
            code=fields["quant_map"].to(device),
            blocksize=fields["blocksize"],
            quant_type=fields["quant_type"],
            dtype=_dtype_named("dtype", fields["dtype"]),
            offset=offset,
            state2=state2,
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The entries of a state dict. ``packed=True`` gives tensors only: the rest as JSON in a uint8 tensor."""
        # Tables are copied: every layer shares them, and safetensors refuses shared memory.
        table = self.code.clone() if packed and self.code is not None else self.code
        tensors: dict[str, Any] = {"absmax": self.absmax, "quant_map": table}
        plain: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": _dtype_name(self.dtype),
            "shape": tuple(self.shape) if self.shape is not None else None,
        }
        if self.state2 is not None and self.offset is not None:
            map2 = self.state2.code.clone() if packed and self.state2.code is not None else self.state2.code
            tensors |= {"nested_absmax": self.state2.absmax, "nested_quant_map": map2}
            plain |= {
                "nested_blocksize": self.state2.blocksize,
                "nested_dtype": _dtype_name(self.state2.dtype),
                "nested_offset": self.offset.item(),
            }
        if not packed or self.quant_type is None:
            return plain | tensors
        blob = torch.tensor(list(json.dumps(plain).encode()), dtype=torch.uint8)
        return tensors | {f"quant_state.bitsandbytes__{self.quant_type}": blob}

    def to(self, device: torch.device | str) -> None:
        """Move every tensor to ``device``, in place."""
        self.absmax = self.absmax.to(device)
        self.code = self.code.to(device) if self.code is not None else None
        self.offset = self.offset.to(device) if self.offset is not None else None
        if self.state2 is not None:
            self.state2.to(device)

    def packed(self, weight: torch.Tensor) -> Packed4bit:
        """``weight`` (packed codes) and this state as kernels take them."""
        if self.blocksize is None or self.quant_type is None or self.shape is None:
            raise ValueError("this QuantState does not describe a 4-bit tensor: blocksize, quant_type or shape is None")
        if self.state2 is None:
            return Packed4bit(weight, self.absmax, self.blocksize, self.quant_type, tuple(self.shape))
        return Packed4bit(
            weight,
            self.absmax,
            self.blocksize,
            self.quant_type,
            tuple(self.shape),
            self.state2.absmax,
            self.state2.code,
            self.offset,
            self.state2.blocksize or _NESTED_BLOCKSIZE,
        )

    def __getattr__(self, name: str) -> Any:
        # FSDP walks state-dict names attribute by attribute, the packed entry's among them.
        if name.startswith("bitsandbytes__") and f"quant_state.{name}" in (entries := self.as_dict(packed=True)):
            return entries[f"quant_state.{name}"]
        raise AttributeError(f"'QuantState' object has no attribute {name!r}")

    def __getitem__(self, index: int) -> Any:
        # The list that bitsandbytes < 0.39 used in place of this class; PEFT and older scripts still index it.
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        mine, theirs = self.as_dict(), other.as_dict()
        return mine.keys() == theirs.keys() and all(_same(value, theirs[key]) for key, value in mine.items())

    __hash__ = None  # type: ignore[assignment]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-6)
    return bool(a == b)


_STATE_ENTRIES = ("absmax", "quant_map", "quant_type", "blocksize", "dtype", "shape")
_NESTED_ENTRIES = ("nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset")
_FACTS = {"shape": (list,), "quant_type": (str,), "nested_offset": (int, float), "blocksize": (int,)}


def _read_facts(name: str, blob: torch.Tensor) -> dict[str, Any]:
    """The JSON object in a uint8 tensor, as far as its types go: a checkpoint's bytes are anyone's."""
    try:
        facts = json.loads(bytes(blob.cpu().tolist()))
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{name} is not a JSON object, but {type(facts).__name__}")
    for field, value in facts.items():
        if type(value) not in _FACTS.get(field, (type(value),)):
            raise ValueError(f"{field}={value!r} in {name} has the wrong type")
    if any(type(size) is not int for size in facts.get("shape", [])):
        raise ValueError(f"shape={facts['shape']!r} in {name} is not a list of whole numbers")
    return facts


def _dtype_named(field: str, name: Any) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{field}={name!r} is not a dtype of torch, such as float16")
    return dtype


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
