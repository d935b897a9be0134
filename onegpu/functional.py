"""The functions people know from ``bitsandbytes.functional``: same names, arguments and results, thin over kernels/.

Formats: 4-bit (NF4, FP4) with one float32 scale a block, plain or double quantised; blockwise 8-bit; row-wise int8.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from onegpu.kernels import linear_int8, quant_4bit, quant_blockwise, quant_int8  # noqa: F401  (define the ops)
from onegpu.kernels.codebooks import BLOCK_SIZES, QUANT_TYPES, codebook_4bit, dynamic_map
from onegpu.kernels.linear_4bit import Packed4bit, linear_4bit

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
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


def _check_float(A: torch.Tensor, what: str) -> None:
    if A.dtype not in _FLOATS:
        raise ValueError(f"{what} takes float16, bfloat16 or float32, got A.dtype={A.dtype}; cast A first")


def check_4bit(blocksize: int, quant_type: str) -> None:
    """Raise ``ValueError`` naming argument, value and choices unless both are of the 4-bit format."""
    if blocksize not in BLOCK_SIZES:
        raise ValueError(f"blocksize={blocksize} is not supported; use one of {', '.join(map(str, BLOCK_SIZES))}")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type={quant_type!r} is not supported; use one of {', '.join(QUANT_TYPES)}")


def quantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """Quantise ``A`` (float, any shape, flattened) to 4 bits in blocks.

    Args:
        A: float16, bfloat16 or float32.
        absmax, out: filled with the scales and the codes where given.
        blocksize: 32 to 4096, a power of two; 64 by default.
        compress_statistics: quantise the scales too, in blocks of 256 to 8 bits (double quantisation).
        quant_type: "nf4" or "fp4".
        quant_storage: dtype that the packed bytes are viewed as.

    Returns:
        Packed codes ``[(n+1)//2 / quant_storage.itemsize, 1]`` and the state that undoes it.
    """
    blocksize = 64 if blocksize is None else blocksize
    check_4bit(blocksize, quant_type)
    _check_float(A, "quantize_4bit")
    packed, scales = torch.ops.onegpu.quantize_4bit(A, blocksize, quant_type, quant_storage)
    offset = state2 = None
    if compress_statistics:
        offset = scales.mean()
        scales, state2 = quantize_blockwise(scales - offset, blocksize=_NESTED_BLOCKSIZE)
    if out is not None:
        packed = out.copy_(packed)
    if absmax is not None:
        scales = absmax.copy_(scales)
    code = codebook_4bit(quant_type, A.device)
    return packed, QuantState(scales, A.shape, code, blocksize, quant_type, A.dtype, offset, state2)


def dequantize_4bit(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> torch.Tensor:
    """Undo :func:`quantize_4bit`: packed codes and their state (or absmax, out, blocksize, type) to the original."""
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit needs quant_state, or both absmax and out (for shape and dtype)")
        quant_state = QuantState(absmax, out.shape, None, blocksize or 64, quant_type, out.dtype)
    check_4bit(quant_state.blocksize or 0, quant_state.quant_type or "")
    dtype = quant_state.dtype or torch.float32
    if dtype not in _FLOATS:
        raise ValueError(f"dequantize_4bit gives float16, bfloat16 or float32, got quant_state.dtype={dtype}")
    values = quant_state.packed(A).dequantize(dtype)
    if out is not None:
        values = out.copy_(values)
    # bitsandbytes' convention: codes passed transposed, [1, n], come back transposed.
    return values.t() if A.shape[0] == 1 and values.dim() == 2 else values


def quantize_nf4(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """:func:`quantize_4bit` with ``quant_type="nf4"``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def quantize_fp4(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """:func:`quantize_4bit` with ``quant_type="fp4"``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def dequantize_nf4(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
) -> torch.Tensor:
    """:func:`dequantize_4bit` with ``quant_type="nf4"``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_fp4(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
) -> torch.Tensor:
    """:func:`dequantize_4bit` with ``quant_type="fp4"``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def quantize_blockwise(
    A: torch.Tensor,
    code: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[torch.Tensor, QuantState]:
    """Quantise ``A`` (float, any shape) to uint8 indices into ``code`` (ascending ``[256]``; the dynamic map).

    Returns codes of A's shape and their state; ``nested`` quantises the scales as well.
    """
    if blocksize <= 0:
        raise ValueError(f"blocksize={blocksize} must be positive; 256 and 4096 are usual")
    _check_float(A, "quantize_blockwise")
    code = dynamic_map(A.device) if code is None else code.to(A.device)
    codes, scales = torch.ops.onegpu.quantize_blockwise(A, code, blocksize)
    offset = state2 = None
    if nested:
        offset = scales.mean()
        scales, state2 = quantize_blockwise(scales - offset, blocksize=blocksize)
    if out is not None:
        codes = out.copy_(codes)
    if absmax is not None:
        scales = absmax.copy_(scales)
    return codes, QuantState(scales, None, code, blocksize, None, A.dtype, offset, state2)


def dequantize_blockwise(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    code: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> torch.Tensor:
    """Undo :func:`quantize_blockwise`: uint8 codes to floats of the same shape, in the state's dtype."""
    if A.dtype != torch.uint8:
        raise ValueError(f"dequantize_blockwise takes uint8 codes, got A.dtype={A.dtype}")
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise needs quant_state or absmax; pass what quantize_blockwise returned")
        code = dynamic_map(A.device) if code is None else code
        quant_state = QuantState(absmax, None, code, blocksize, None, torch.float32)
    scales = quant_state.absmax
    if quant_state.state2 is not None and quant_state.offset is not None:
        scales = dequantize_blockwise(scales, quant_state.state2).float() + quant_state.offset
    table = (quant_state.code if quant_state.code is not None else dynamic_map(A.device)).to(A.device)
    size, dtype = quant_state.blocksize or blocksize, quant_state.dtype or torch.float32
    if size <= 0:
        raise ValueError(f"blocksize={size} must be positive; 256 and 4096 are usual")
    values: torch.Tensor = torch.ops.onegpu.dequantize_blockwise(A, scales, table, size, dtype)
    return values if out is None else out.copy_(values)


def int8_vectorwise_quant(
    A: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantise each row of ``A`` (float16 ``[..., K]``) to int8 by its largest magnitude.

    Returns int8 codes of A's shape, float32 row maxima ``[rows]``, and int64 indices of the columns that hold a value
    at or above ``threshold`` (None where the threshold is 0), which are zero in the codes.
    """
    if threshold < 0.0:
        raise ValueError(f"threshold={threshold} must not be negative; 0 turns outliers off")
    codes, absmax, mask = torch.ops.onegpu.int8_vectorwise_quant(A, threshold)
    return codes, absmax, mask.nonzero().view(-1) if threshold > 0.0 else None


def int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """Undo :func:`int8_vectorwise_quant`: int8 ``[rows, K]`` and float32 ``[rows]`` to float32 ``[rows, K]``."""
    return A * stats.view(-1, 1) * (1.0 / 127.0)


def matmul_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    quant_state: QuantState,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``A @ dequantize(B).T + bias``: A ``[..., K]`` float, B packed codes of an ``[N, K]`` matrix; ``[..., N]``."""
    result = linear_4bit(A, quant_state.packed(B), bias)
    return result if out is None else out.copy_(result)
