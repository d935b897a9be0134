"""Products with quantised matrices: ``bitsandbytes.matmul``, ``matmul_4bit``, ``gemv_4bit`` and ``MatmulLtState``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields

import torch

from onegpu.functional.int8 import int8_vectorwise_quant
from onegpu.functional.quant_state import QuantState
from onegpu.kernels.linear_4bit import linear_4bit
from onegpu.kernels.linear_int8 import linear_int8


def matmul_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    quant_state: QuantState,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``A @ dequantize(B).T + bias``: A ``[..., K]`` float, B packed codes of an ``[N, K]`` matrix; ``[..., N]``.

    Gradients flow to A and to the bias. Codes of a ``[K, N]`` matrix are multiplied too, with a ``DeprecationWarning``:
    bitsandbytes is about to refuse them, and a square matrix is always taken for ``[N, K]``.
    """
    if quant_state is None or quant_state.shape is None or len(quant_state.shape) != 2:
        raise ValueError("matmul_4bit needs the quant_state of a matrix; pass what quantize_4bit returned")
    rows, columns = quant_state.shape
    if A.shape[-1] == rows != columns:
        if not torch.compiler.is_compiling():
            message = (
                f"quant_state.shape={[rows, columns]} is [K, N] for A.shape={list(A.shape)}. Re-quantize from the "
                "weight as [N, K], a row an output: this order is slow and goes away."
            )
            warnings.warn(message, DeprecationWarning, stacklevel=2)
        matrix = quant_state.packed(B).dequantize(A.dtype)
        result = torch.nn.functional.linear(A, matrix.t(), bias)
    else:
        result = linear_4bit(A, quant_state.packed(B), bias)
    return result if out is None else out.copy_(result)


def gemv_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> torch.Tensor:
    """:func:`matmul_4bit` without bias and gradient, under the name for one row; takes any number of them.

    The two flags exist for bitsandbytes' signature and do nothing, as there.
    """
    if state is None:
        raise ValueError("gemv_4bit needs state; pass what quantize_4bit returned")
    with torch.no_grad():
        return matmul_4bit(A, B, state, out)


@dataclass(eq=False)
class MatmulLtState:
    """What :func:`matmul` knows of a weight between calls.

    CB, SCB: its int8 codes ``[N, K]`` and row maxima ``[N]``, made from the weight where missing. threshold: of the
    outlier columns, 0 for none. has_fp16_weights: quantise the weight anew in every call while ``is_training``.
    The rest is there for scripts that set or read it, and changes nothing.
    """

    CB: torch.Tensor | None = None
    SCB: torch.Tensor | None = None
    threshold: float = 0.0
    has_fp16_weights: bool = True
    is_training: bool = True
    use_pool: bool = False
    idx: torch.Tensor | None = None
    force_no_igemmlt: bool = False
    memory_efficient_backward: bool = False

    def reset_grads(self) -> None:
        """Forget the codes."""
        self.CB = self.SCB = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MatmulLtState):
            return NotImplemented
        return all(_same(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))

    __hash__ = None  # type: ignore[assignment]


def _same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return a is b or (not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and a == b)


def matmul(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``A @ W.T + bias`` by LLM.int8(): A ``[..., K]`` float, W ``[N, K]``; ``[..., N]`` in the dtype of A.

    Args:
        B: W as floats, any strides. Not looked at where ``state`` holds its codes and ``has_fp16_weights`` is off.
        out: filled with the result where given.
        state: codes and settings; keeps the codes for the next call.
        threshold: overrides the state's, unless 0.
        bias: ``[N]`` or None.

    Gradients flow to A, to the bias, and to a B that is quantised here.
    """
    state = state or MatmulLtState()
    if threshold > 0.0:
        state.threshold = threshold
    source = None
    if state.has_fp16_weights or state.CB is None or state.SCB is None:
        source = B if B.requires_grad else None
        if state.is_training or state.CB is None or state.SCB is None:
            state.CB, state.SCB, _ = int8_vectorwise_quant(B.detach().to(torch.float16).contiguous())
    exact = A.device.type == "cpu" and not state.is_training  # as in Linear8bitLt
    result = linear_int8(A, state.CB, state.SCB, bias, state.threshold, source, exact)
    return result if out is None else out.copy_(result)
