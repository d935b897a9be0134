"""``Params4bit``: bitsandbytes' parameter class for 4-bit weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from onegpu.functional import QuantState, check_4bit, quantize_4bit


def state_tensors(state: QuantState) -> dict[str, torch.Tensor | None]:
    """The tensors of a state under the names of their checkpoint entries; None where there is none."""
    nested = state.state2
    return {
        "absmax": state.absmax,
        "quant_map": state.code,
        "nested_absmax": nested.absmax if nested is not None else None,
        "nested_quant_map": nested.code if nested is not None else None,
        "nested_offset": state.offset,
    }


def _from_state(name: str) -> Any:
    """A read-only attribute that looks into ``quant_state``; ``__getattr__`` would break torch.compile."""

    def get(self: Params4bit) -> torch.Tensor:
        value = state_tensors(self.quant_state).get(name) if self.quant_state is not None else None
        if value is None:
            raise AttributeError(f"Params4bit has no {name}: the weight is not quantised, or not in this way")
        return value

    return property(get)


class Params4bit(nn.Parameter):
    """A weight that becomes 4-bit codes at its first move to a device.

    Before: the float matrix ``[N, K]``. After: packed codes ``[(N*K+1)//2, 1]`` of ``quant_storage``, with
    ``quant_state`` describing them; then it only moves, and dtype casts leave it alone.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: Any = None  # bitsandbytes' parameter knows its layer; PEFT hands the name on when it makes a new one

    def __new__(
        cls,
        data: torch.Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        bnb_quantized: bool = False,
        **_: Any,  # transformers and PEFT pass a parameter's whole __dict__ back, bitsandbytes `module`
    ) -> Params4bit:
        check_4bit(64 if blocksize is None else blocksize, quant_type)
        data = torch.empty(0) if data is None else data
        self: Params4bit = torch.Tensor._make_subclass(cls, data.detach(), requires_grad)
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = bool(compress_statistics)
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: torch.Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: torch.device | str = "cuda",
        **_: Any,
    ) -> Params4bit:
        """Packed codes and a checkpoint's entries below ``weight.`` (see :meth:`QuantState.from_dict`)."""
        state = QuantState.from_dict(quantized_stats, device)
        return cls(
            data.to(device),
            requires_grad=requires_grad,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type or "fp4",
            quant_storage=data.dtype,
            bnb_quantized=True,
        )

    def _like(self, data: torch.Tensor, state: QuantState | None) -> Params4bit:
        fields = {**self.__dict__, "quant_state": state, "requires_grad": self.requires_grad}
        return type(self)(data, **fields)

    def _quantize(self, device: torch.device) -> Params4bit:
        packed, state = quantize_4bit(
            self.data.contiguous().to(device),
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        # In place, like bitsandbytes: optimisers and user code keep their reference.
        self.data, self.quant_state, self.bnb_quantized = packed, state, True
        return self

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        """Move; the first move to a real device quantises. A dtype casts only a weight that is still float."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if not self.bnb_quantized:
            if device is not None and device.type != "meta":
                return self._quantize(device)
            return self._like(self.data.to(device=device, dtype=dtype, non_blocking=non_blocking), self.quant_state)
        state = self.quant_state
        if device is None:
            return self
        if state is not None and device.type != "meta":
            state = copy.copy(state)
            state.to(device)
        return self._like(self.data.to(device=device, non_blocking=non_blocking), state)

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Params4bit:  # type: ignore[override]
        """``to("cuda")``."""
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def cpu(self) -> Params4bit:  # type: ignore[override]
        """``to("cpu")``."""
        return self.to(device="cpu")

    # FSDP and checkpoint tools read `weight.absmax` and its siblings as attributes.
    absmax = _from_state("absmax")
    quant_map = code = _from_state("quant_map")
    nested_absmax = _from_state("nested_absmax")
    nested_quant_map = _from_state("nested_quant_map")
    nested_offset = offset = _from_state("nested_offset")

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        new = self._like(copy.deepcopy(self.data, memo), copy.deepcopy(self.quant_state, memo))
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild_params4bit, (self.data, self.requires_grad, dict(self.__dict__))


def _rebuild_params4bit(data: torch.Tensor, requires_grad: bool, fields: dict[str, Any]) -> Params4bit:
    return Params4bit(data, requires_grad, **fields)
