"""Embeddings with quantised tables: bitsandbytes' ``Embedding4bit`` (NF4, FP4) and ``Embedding8bit``.

Only the rows that are looked up are dequantised.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from onegpu.functional import QuantState
from onegpu.kernels.codebooks import codebook_4bit
from onegpu.kernels.linear_4bit import Packed4bit
from onegpu.kernels.quant_int8 import dequantize_rows
from onegpu.nn.bytes_of import move_as_bytes, nbytes
from onegpu.nn.linear_8bit import Int8Params
from onegpu.nn.params_4bit import Params4bit, state_tensors
from onegpu.nn.set_aside import set_aside


class _QuantizedEmbedding(nn.Embedding):
    """What both formats share: load a float table, then move the module to a device, which quantises it."""

    def __init__(self, num_embeddings: int, embedding_dim: int, device: Any, dtype: torch.dtype | None) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype  # of the rows that forward gives, whatever becomes of the table

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _QuantizedEmbedding:
        weight = self._parameters["weight"]
        assert weight is not None
        with set_aside(self, "weight"):
            super()._apply(fn, recurse)
        self.weight = self._moved(weight, fn)
        return self

    def _moved(self, weight: nn.Parameter, fn: Callable[[torch.Tensor], torch.Tensor]) -> nn.Parameter:
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        raise NotImplementedError(
            f"{prefix}weight: no checkpoint format has quantised embeddings, so {type(self).__name__} cannot be saved; "
            "save the nn.Embedding that it was made from"
        )


class Embedding4bit(_QuantizedEmbedding):
    """An embedding whose table is in 4-bit blocks.

    Args:
        num_embeddings, embedding_dim: rows and columns of the table.
        dtype: of the float table, and of what forward gives.
        quant_type: "nf4" or "fp4". quant_storage: dtype that the packed bytes are viewed as.
        device: where the table is created.

    Raises:
        RuntimeError: forward before the table was quantised. NotImplementedError: ``state_dict()``.
    """

    weight: Params4bit
    quant_state: QuantState | None = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device, dtype)
        self.weight = Params4bit(
            self.weight.data, compress_statistics=False, quant_type=quant_type, quant_storage=quant_storage
        )

    def _moved(self, weight: nn.Parameter, fn: Callable[[torch.Tensor], torch.Tensor]) -> nn.Parameter:
        assert isinstance(weight, Params4bit)
        if not weight.bnb_quantized:
            moved = fn(weight)  # Params4bit.to quantises where fn names a device
            moved = moved if isinstance(moved, Params4bit) else weight._like(moved, None)
            self.quant_state = moved.quant_state
            return moved
        state = copy.copy(self._state(weight))
        absmax = move_as_bytes(state.absmax, fn)
        if not absmax.is_meta:
            state.to(absmax.device)  # the shared tables
        state.absmax = absmax
        self.quant_state = state
        return weight._like(move_as_bytes(weight.data, fn), state)

    def _state(self, weight: Params4bit) -> QuantState:
        if weight.quant_state is None:
            weight.quant_state = self.quant_state  # tools that rebuild parameters lose it
        self.quant_state = weight.quant_state
        if self.quant_state is None or not weight.bnb_quantized:
            raise RuntimeError(
                f"{type(self).__name__} holds a float table: move it to a device first (`.to(device)`, `.cuda()`), "
                "which quantises it"
            )
        return self.quant_state

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows of the table by their numbers: integers of any shape to ``[..., embedding_dim]`` of ``dtype``."""
        state = self._state(self.weight)
        matrix = state.packed(self.weight.data)
        ids, columns, block = input.reshape(-1), self.embedding_dim, matrix.blocksize
        codes, scales = matrix.weight.contiguous().view(torch.uint8).view(-1), matrix.scales()
        if columns % block == 0:
            picked = codes.view(self.num_embeddings, -1)[ids], scales.view(self.num_embeddings, -1)[ids]
            shape = (ids.numel(), columns)
            rows = Packed4bit(picked[0].view(-1, 1), picked[1].view(-1), block, matrix.quant_type, shape)
            values = rows.dequantize(self.dtype)
        else:
            elements = ids[:, None] * columns + torch.arange(columns, device=ids.device)
            pairs = codes[elements // 2]
            code = torch.where(elements % 2 == 0, pairs >> 4, pairs & 15).int()
            values = (codebook_4bit(matrix.quant_type, ids.device)[code] * scales[elements // block]).to(self.dtype)
        return values.view(*input.shape, columns)

    def nbytes(self) -> dict[str, int]:
        """Bytes by kind: weight, scales."""
        state = self.weight.quant_state or self.quant_state
        tensors = {} if state is None else state_tensors(state)
        return {"weight": nbytes(self.weight), "scales": nbytes(tensors.get("absmax"), tensors.get("nested_absmax"))}


class EmbeddingNF4(Embedding4bit):
    """:class:`Embedding4bit` with ``quant_type="nf4"``."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class EmbeddingFP4(Embedding4bit):
    """:class:`Embedding4bit` with ``quant_type="fp4"``."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class Embedding8bit(_QuantizedEmbedding):
    """An embedding whose table is row-wise int8; see :class:`Embedding4bit`."""

    weight: Int8Params

    def __init__(
        self, num_embeddings: int, embedding_dim: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device, dtype)
        self.weight = Int8Params(self.weight.data, requires_grad=False)

    def _moved(self, weight: nn.Parameter, fn: Callable[[torch.Tensor], torch.Tensor]) -> nn.Parameter:
        assert isinstance(weight, Int8Params)
        if weight.dtype != torch.int8:
            moved = fn(weight)  # Int8Params.to quantises where fn names a device
            return moved if isinstance(moved, Int8Params) else weight._like(moved, None)
        return weight._like(fn(weight.data), None if weight.SCB is None else move_as_bytes(weight.SCB, fn))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows of the table by their numbers: integers of any shape to ``[..., embedding_dim]`` of ``dtype``."""
        if self.weight.dtype != torch.int8 or self.weight.SCB is None:
            raise RuntimeError(
                "Embedding8bit holds a float table: move it to a device first (`.to(device)`, `.cuda()`), which "
                "quantises it"
            )
        return dequantize_rows(self.weight.data[input], self.weight.SCB[input], self.dtype)

    def nbytes(self) -> dict[str, int]:
        """Bytes by kind: weight, scales."""
        return {"weight": nbytes(self.weight), "scales": nbytes(self.weight.SCB)}
