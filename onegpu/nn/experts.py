"""Quantised stacks of experts.

transformers keeps the experts of a mixture as one 3-D parameter ``[experts, rows, K]`` and multiplies by ``stack[e]``.
A module of this file takes the parameter's place: ``stack[e]`` is then that expert's matrix, dequantised. Files hold
every expert's matrices under their own names, each quantised by itself in bitsandbytes' layout: a stack whose rows are
several matrices of the checkpoint (gate and up) has that many ``parts``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from onegpu.functional import QuantState, int8_vectorwise_quant, quantize_4bit
from onegpu.kernels.codebooks import codebook_4bit, dynamic_map
from onegpu.kernels.quant_4bit import packed_bytes
from onegpu.kernels.quant_int8 import dequantize_rows
from onegpu.nn.bytes_of import move_as_bytes, nbytes
from onegpu.nn.check import check_state
from onegpu.nn.linear_8bit import check_int8
from onegpu.nn.params_4bit import Params4bit

_SCALES_4BIT = ("absmax", "nested_absmax", "nested_offset")


class ExpertStack(nn.Module):
    """What both formats share.

    Args:
        shape: of the parameter replaced: ``(experts, rows, K)``.
        dtype: what ``stack[e]`` gives.
        names: checkpoint name of each part's weight below the parent module, ``"{}"`` standing for the expert:
            ``("{}.w1.weight", "{}.w3.weight")``.
    """

    weight: nn.Parameter

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, names: tuple[str, ...]) -> None:
        super().__init__()
        _, rows, columns = shape
        if rows % len(names):
            raise ValueError(f"names={names}: {rows} rows are not {len(names)} matrices of one size; name each once")
        self.shape = torch.Size(shape)
        self.out_dtype = dtype
        self.names = names
        self.part_shape = (rows // len(names), columns)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of ``stack[e]``."""
        return self.out_dtype

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return next(self.parameters()).device

    @property
    def scales(self) -> torch.Tensor:
        """The float32 scales that a NaN or an infinity in the weights would show in."""
        raise NotImplementedError

    def nbytes(self) -> dict[str, int]:
        """Bytes by kind: weight, scales."""
        raise NotImplementedError

    def dim(self) -> int:
        """3, as the parameter's."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """As the parameter's."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[expert] for expert in range(len(self)))

    def __getitem__(self, expert: int | torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _check_present(self) -> None:
        """accelerate's offloading wraps ``forward``, which nobody calls here: the weight would stay on meta."""
        if self.weight.is_meta and hasattr(self, "_hf_hook"):
            raise RuntimeError(
                "the experts were offloaded by accelerate's hooks, which cannot bring a stack back for its call; load "
                "the model with device_map= and max_memory= instead, which keep experts in CPU memory"
            )

    def quantize_(self, stack: torch.Tensor) -> None:
        """Fill from a float stack ``[experts, rows, K]`` on its device."""
        raise NotImplementedError

    def load_part(self, expert: int, part: int, entries: dict[str, torch.Tensor]) -> None:
        """Fill one matrix from its checkpoint entries, by the ending of their names ("" for the weight itself).

        Raises ``ValueError`` where they do not fit.
        """
        raise NotImplementedError

    def part_entries(self, expert: int, part: int) -> dict[str, torch.Tensor]:
        """One matrix as checkpoint entries, by the ending of their names."""
        raise NotImplementedError

    def dequantize(self) -> torch.Tensor:
        """The whole stack as floats, ``[experts, rows, K]``."""
        return torch.stack(list(self))

    def _entry_name(self, expert: int, part: int, ending: str) -> str:
        raise NotImplementedError

    def _matrices(self) -> Iterator[tuple[int, int]]:
        return ((expert, part) for expert in range(self.shape[0]) for part in range(len(self.names)))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # The buffers are persistent only because transformers' loader wipes those that are not.
        outer = self._outer(prefix)
        for expert, part in self._matrices():
            for ending, value in self.part_entries(expert, part).items():
                destination[outer + self._entry_name(expert, part, ending)] = value

    @staticmethod
    def _outer(prefix: str) -> str:
        """The prefix of the module around, whose names the matrices have: "a.b." of "a.b.gate_up_proj."."""
        return prefix[: prefix[:-1].rfind(".") + 1]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Names arrive below this module: see _route_entries.
        outer = self._outer(prefix)
        for expert, part in self._matrices():
            name = self._entry_name(expert, part, "")
            stem = prefix + name.removesuffix("weight")
            tails = {key[len(stem) :]: value for key, value in state_dict.items() if key.startswith(stem)}
            entries = {ending: value for tail, value in tails.items() if (ending := self._ending(tail)) is not None}
            unexpected_keys += [
                outer + name.removesuffix("weight") + tail for tail in tails if self._ending(tail) is None
            ]
            if "" not in entries:
                missing_keys.append(outer + name)
                continue
            try:
                self.load_part(expert, part, entries)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{outer}{name}: {error}")

    @staticmethod
    def _ending(tail: str) -> str | None:
        """Ending that ``part_entries`` uses for what follows a matrix's name (``weight.absmax``, ``SCB``)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, matrices={len(self.names)} an expert"


class ExpertStack4bit(ExpertStack):
    """A stack of 4-bit matrices.

    weight: uint8 ``[experts * parts, bytes]``; absmax: float32 (uint8 when nested) ``[experts * parts, blocks]``;
    nested_absmax, nested_offset: float32 ``[experts * parts, groups]`` and ``[experts * parts]``.
    """

    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_offset: torch.Tensor | None

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        names: tuple[str, ...],
        quant_type: str = "fp4",
        compress_statistics: bool = False,
        quant_storage: torch.dtype = torch.uint8,
        blocksize: int = 64,
    ) -> None:
        super().__init__(shape, dtype, names)
        self.quant_type = quant_type
        self.compress_statistics = compress_statistics
        self.quant_storage = quant_storage
        self.blocksize = blocksize
        self.source_dtype = dtype
        count = shape[0] * len(names)
        numel = self.part_shape[0] * self.part_shape[1]
        blocks = -(-numel // blocksize)
        self.weight = nn.Parameter(
            torch.empty(count, packed_bytes(numel, quant_storage), dtype=torch.uint8), requires_grad=False
        )
        scales = torch.empty(count, blocks, dtype=torch.uint8 if compress_statistics else torch.float32)
        self.register_buffer("absmax", scales)
        nested = (torch.empty(count, -(-blocks // 256)), torch.empty(count)) if compress_statistics else (None, None)
        self.register_buffer("nested_absmax", nested[0])
        self.register_buffer("nested_offset", nested[1])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ExpertStack4bit:
        scales = {name: self._buffers.pop(name) for name in _SCALES_4BIT}
        super()._apply(fn, recurse)
        for name, value in scales.items():
            self._buffers[name] = None if value is None else move_as_bytes(value, fn)
        return self

    def quantize_(self, stack: torch.Tensor) -> None:
        if tuple(stack.shape) != tuple(self.shape):
            raise ValueError(f"stack has shape {tuple(stack.shape)}, this module holds {tuple(self.shape)}")
        self.to_empty(device=stack.device)
        self.source_dtype = stack.dtype
        matrices = stack.reshape(-1, *self.part_shape)
        for index, matrix in enumerate(matrices):
            packed, state = quantize_4bit(
                matrix.contiguous(),
                blocksize=self.blocksize,
                quant_type=self.quant_type,
                compress_statistics=self.compress_statistics,
                quant_storage=self.quant_storage,
            )
            self._store(index, packed, state)

    def _store(self, index: int, packed: torch.Tensor, state: QuantState) -> None:
        with torch.no_grad():
            self.weight[index] = packed.view(-1).view(torch.uint8)
        self.absmax[index] = state.absmax
        if self.nested_absmax is not None and self.nested_offset is not None and state.state2 is not None:
            self.nested_absmax[index] = state.state2.absmax
            self.nested_offset[index] = torch.as_tensor(state.offset)

    def _state(self, index: int) -> QuantState:
        state2 = offset = None
        if self.nested_absmax is not None and self.nested_offset is not None:
            table = dynamic_map(self.absmax.device)
            state2 = QuantState(self.nested_absmax[index], None, table, 256, None, torch.float32)
            offset = self.nested_offset[index]
        code = codebook_4bit(self.quant_type, self.absmax.device)
        return QuantState(
            self.absmax[index],
            self.part_shape,
            code,
            self.blocksize,
            self.quant_type,
            self.source_dtype,
            offset,
            state2,
        )

    def __getitem__(self, expert: int | torch.Tensor) -> torch.Tensor:
        self._check_present()
        first = int(expert) * len(self.names)
        parts = [
            self._state(index).packed(self.weight.data[index]).dequantize(self.out_dtype)
            for index in range(first, first + len(self.names))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def load_part(self, expert: int, part: int, entries: dict[str, torch.Tensor]) -> None:
        device = self.device if self.device.type != "meta" else entries[""].device
        stats = {ending: value for ending, value in entries.items() if ending}
        loaded = Params4bit.from_prequantized(entries[""], stats, device=device)
        check_state(loaded, self.part_shape)
        state = loaded.quant_state
        assert state is not None
        if (state.quant_type, state.blocksize, state.nested) != (
            self.quant_type,
            self.blocksize,
            self.compress_statistics,
        ):
            raise ValueError(
                f"{state.quant_type}, blocksize {state.blocksize}, nested {state.nested} differ from the other "
                f"experts' {self.quant_type}, {self.blocksize}, {self.compress_statistics}"
            )
        if self.device.type == "meta":
            self.to_empty(device=device)
        self.source_dtype = state.dtype or self.source_dtype
        self._store(expert * len(self.names) + part, loaded.data, state)

    def part_entries(self, expert: int, part: int) -> dict[str, torch.Tensor]:
        index = expert * len(self.names) + part
        stats = self._state(index).as_dict(packed=True)
        # Copies: views of one storage are refused by safetensors, and the tables are shared by every layer.
        entries = {f".{ending}": value.clone() for ending, value in stats.items()}
        entries[""] = self.weight.data[index].clone().view(self.quant_storage).unsqueeze(1)
        return entries

    def _entry_name(self, expert: int, part: int, ending: str) -> str:
        return self.names[part].format(expert) + ending

    @staticmethod
    def _ending(tail: str) -> str | None:
        return tail.removeprefix("weight") if tail == "weight" or tail.startswith("weight.") else None

    @property
    def scales(self) -> torch.Tensor:
        return self.absmax if self.nested_offset is None else self.nested_offset

    def nbytes(self) -> dict[str, int]:
        return {
            "weight": nbytes(self.weight),
            "scales": nbytes(self.absmax, self.nested_absmax, self.nested_offset),
        }

    def extra_repr(self) -> str:
        facts = {"quant_type": self.quant_type, "blocksize": self.blocksize, "nested": self.compress_statistics}
        return f"{super().extra_repr()}, {json.dumps(facts)}"


class ExpertStack8bit(ExpertStack):
    """A stack of int8 matrices: weight int8 ``[experts, rows, K]``, SCB float32 ``[experts, rows]``."""

    SCB: torch.Tensor

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, names: tuple[str, ...]) -> None:
        super().__init__(shape, dtype, names)
        self.weight = nn.Parameter(torch.empty(*shape, dtype=torch.int8), requires_grad=False)
        self.register_buffer("SCB", torch.empty(*shape[:2]))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ExpertStack8bit:
        scales = self._buffers.pop("SCB")
        assert scales is not None
        super()._apply(fn, recurse)
        self._buffers["SCB"] = move_as_bytes(scales, fn)
        return self

    def quantize_(self, stack: torch.Tensor) -> None:
        if tuple(stack.shape) != tuple(self.shape):
            raise ValueError(f"stack has shape {tuple(stack.shape)}, this module holds {tuple(self.shape)}")
        self.to_empty(device=stack.device)
        for expert, matrix in enumerate(stack):
            codes, maxima, _ = int8_vectorwise_quant(matrix.half())
            self.weight.data[expert] = codes
            self.SCB[expert] = maxima

    def __getitem__(self, expert: int | torch.Tensor) -> torch.Tensor:
        self._check_present()
        index = int(expert)
        return dequantize_rows(self.weight.data[index], self.SCB[index], self.out_dtype)

    def _rows(self, part: int) -> slice:
        return slice(part * self.part_shape[0], (part + 1) * self.part_shape[0])

    def load_part(self, expert: int, part: int, entries: dict[str, torch.Tensor]) -> None:
        if "SCB" not in entries:
            raise ValueError("int8 codes without SCB, the scales of their rows")
        check_int8(entries[""], entries["SCB"], entries.get("weight_format"), self.part_shape)
        if self.device.type == "meta":
            self.to_empty(device=entries[""].device)
        self.weight.data[expert, self._rows(part)] = entries[""].to(self.device)
        self.SCB[expert, self._rows(part)] = entries["SCB"].to(self.device)

    def part_entries(self, expert: int, part: int) -> dict[str, torch.Tensor]:
        return {
            "": self.weight.data[expert, self._rows(part)].clone(),
            "SCB": self.SCB[expert, self._rows(part)].clone(),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }

    def _entry_name(self, expert: int, part: int, ending: str) -> str:
        name = self.names[part].format(expert)
        return name if not ending else name.removesuffix("weight") + ending

    @staticmethod
    def _ending(tail: str) -> str | None:
        return {"weight": "", "SCB": "SCB", "weight_format": "weight_format"}.get(tail)

    @property
    def scales(self) -> torch.Tensor:
        return self.SCB

    def nbytes(self) -> dict[str, int]:
        return {"weight": nbytes(self.weight), "scales": nbytes(self.SCB)}


def replace_parameter(parent: nn.Module, name: str, stack: ExpertStack) -> None:
    """Put ``stack`` where ``parent`` has the parameter ``name``."""
    delattr(parent, name)
    setattr(parent, name, stack)
    if not any(getattr(hook, "hook", hook) is _route_entries for hook in parent._load_state_dict_pre_hooks.values()):
        parent._register_load_state_dict_pre_hook(_route_entries, with_module=True)


def _route_entries(parent: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hand ``experts.3.w1.weight`` to the stack ``experts.gate_up_proj``: a child is shown only names below its own."""
    for child_name, stack in parent.named_children():
        if not isinstance(stack, ExpertStack):
            continue
        for expert, part in stack._matrices():
            stem = prefix + stack._entry_name(expert, part, "").removesuffix("weight")
            for key in [key for key in state_dict if key.startswith(stem)]:
                state_dict[f"{prefix}{child_name}.{key[len(prefix) :]}"] = state_dict.pop(key)
