"""``y = x @ dequantize(weight).T + bias`` for 4-bit weights.

x ``[..., K]``, weight packed ``[(N*K+1)//2, 1]`` with absmax ``[ceil(N*K/blocksize)]``, y ``[..., N]``. For few rows it
is bound by the N*K/2 bytes of weights, for many by 2*M*N*K FLOPs. The scales may themselves be quantised (double
quantisation, QLoRA section 3): ``absmax = map[absmax_8bit] * nested_absmax[block] + offset``.

The definition dequantises and multiplies in the dtype of x with the library's accumulation. On a GPU up to 128 rows
of 16 bits have kernels that decode as they read (few_rows.py; where those cannot serve, Triton's for up to 16 rows).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from onegpu.kernels import few_rows
from onegpu.kernels.autocast import autocast_input
from onegpu.kernels.codebooks import dynamic_map
from onegpu.kernels.library import check_columns, check_implementation, define, has_triton
from onegpu.kernels.warmup import register

from . import quant_4bit, quant_blockwise  # noqa: F401  (the ops that the definition calls)


class Packed4bit(NamedTuple):
    """A 4-bit matrix as kernels take it.

    weight: packed codes, ``[(N*K+1)//2, 1]`` of the storage dtype. absmax: float32 scales, or uint8 codes of them when
    nested_absmax is set. shape: ``(N, K)``. nested_code: their value table; None is the dynamic map, looked up inside
    the op, where torch.compile does not follow.
    """

    weight: torch.Tensor
    absmax: torch.Tensor
    blocksize: int
    quant_type: str
    shape: tuple[int, ...]
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    nested_blocksize: int = 256

    def scales(self) -> torch.Tensor:
        """The float32 scales, shape ``[ceil(N*K/blocksize)]``."""
        if self.nested_absmax is None:
            return self.absmax
        code = dynamic_map(self.absmax.device) if self.nested_code is None else self.nested_code
        dequantize = torch.ops.onegpu.dequantize_blockwise
        plain = dequantize(self.absmax, self.nested_absmax, code, self.nested_blocksize, torch.float32)
        return plain + self.offset  # type: ignore[no-any-return]

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in ``dtype``, shape ``shape``."""
        return torch.ops.onegpu.dequantize_4bit(  # type: ignore[no-any-return]
            self.weight, self.scales(), self.blocksize, self.quant_type, self.shape, dtype
        )


_FIELDS = len(Packed4bit._fields)  # what comes after them: the bias, and the implementation unless it is the default


def _forward(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return F.linear(x, Packed4bit(*arguments[:_FIELDS]).dequantize(x.dtype), arguments[_FIELDS])


def _few_rows(x: torch.Tensor, packed: Packed4bit, bias: torch.Tensor | None, portable: bool) -> torch.Tensor | None:
    """The product ``[M, N]`` of ``[M, K]`` by a kernel that decodes as it reads; None where there is none."""
    n, k = packed.shape
    weight = packed.weight
    if not portable and few_rows.supports("4bit", x, weight, k, packed.blocksize) and weight.is_contiguous():
        nested = None
        if packed.nested_absmax is not None:
            code = dynamic_map(x.device) if packed.nested_code is None else packed.nested_code
            assert packed.offset is not None
            nested = (packed.nested_absmax, code, packed.offset)
        y = few_rows.launch(
            "4bit", x, weight, n, bias, packed.absmax, blocksize=packed.blocksize, quant_type=packed.quant_type,
            nested=nested, nested_blocksize=packed.nested_blocksize,
        )  # fmt: skip
        if y is not None:
            return y
    if has_triton() and x.shape[0] <= few_rows.PORTABLE_ROWS and k % 2 == 0:
        from onegpu.kernels import linear_few_rows_triton as triton_kernels

        return triton_kernels.linear_4bit(x, packed, bias)
    return None


def _forward_cuda(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    matrix, bias = Packed4bit(*arguments[:_FIELDS]), arguments[_FIELDS]
    n, k = matrix.shape
    if 0 < x.numel() <= few_rows.MAX_ROWS["4bit"] * k and x.dtype != torch.float32:
        y = _few_rows(x.reshape(-1, k).contiguous(), matrix, bias, "portable" in arguments[_FIELDS + 1 :])
        if y is not None:
            return y if x.dim() == 2 else y.view(*x.shape[:-1], n)
    return _forward(x, *arguments)


def _forward_fake(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], arguments[4][0]))


def _backward(grad: torch.Tensor, *packed: Any) -> torch.Tensor:
    return grad @ Packed4bit(*packed).dequantize(grad.dtype)


def _backward_fake(grad: torch.Tensor, *packed: Any) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], packed[4][1]))


_PACKED = (
    "Tensor weight, Tensor absmax, int blocksize, str quant_type, SymInt[] shape, "
    "Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, int nested_blocksize"
)
define(
    f"linear_4bit(Tensor x, {_PACKED}, Tensor? bias, str implementation='auto') -> Tensor",
    _forward,
    _forward_fake,
    cuda=_forward_cuda,
)
define(f"linear_4bit_backward(Tensor grad, {_PACKED}) -> Tensor", _backward, _backward_fake)


class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, packed: Packed4bit, implementation: str
    ) -> torch.Tensor:
        ctx.packed = packed  # frozen: nothing of x is needed for the gradient
        return torch.ops.onegpu.linear_4bit(x, *packed, bias, implementation)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        grad_x = torch.ops.onegpu.linear_4bit_backward(grad, *ctx.packed) if ctx.needs_input_grad[0] else None
        grad_bias = grad.sum(dim=0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, None


def linear_4bit(
    x: torch.Tensor, packed: Packed4bit, bias: torch.Tensor | None = None, implementation: str = "auto"
) -> torch.Tensor:
    """Multiply by a 4-bit matrix.

    Args:
        x: float16, bfloat16 or float32, ``[..., K]``, any strides.
        packed: the matrix, ``shape == (N, K)``, on the device of x.
        bias: ``[N]`` in the dtype of x, or None.
        implementation: "auto", or "portable": on a GPU no kernel but Triton's, which run everywhere.

    Returns:
        ``[..., N]`` in the dtype of x (of autocast, where it is on). Gradients flow to x and to the bias.

    Raises:
        ArgumentError: the implementation has another name, or x another K.
    """
    check_implementation(implementation)
    check_columns(x, packed.shape[1])
    x = autocast_input(x)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        # Rows, so that the function returns no view: autograd refuses to modify one in place, and Falcon does.
        y = _Linear4bit.apply(x.reshape(-1, x.shape[-1]), bias, packed, implementation)
        return y.view(*x.shape[:-1], packed.shape[0])  # type: ignore[no-any-return]
    return torch.ops.onegpu.linear_4bit(x, *packed, bias, implementation)  # type: ignore[no-any-return]


@register("linear_4bit")
def _warm(
    device: torch.device, dtype: torch.dtype, rows: int, n: int, k: int, blocksize: int = 64, quant_type: str = "nf4",
    bias: bool = False, nested: bool = False,
) -> None:  # fmt: skip
    packed = torch.zeros((n * k + 1) // 2, 1, dtype=torch.uint8, device=device)
    blocks = -(-n * k // blocksize)
    absmax = torch.zeros(blocks, device=device, dtype=torch.uint8 if nested else torch.float32)
    b = torch.zeros(n, dtype=dtype, device=device) if bias else None
    matrix = Packed4bit(packed, absmax, blocksize, quant_type, (n, k))
    if nested:
        matrix = matrix._replace(
            nested_absmax=torch.zeros(-(-blocks // 256), device=device), offset=torch.zeros((), device=device)
        )
    linear_4bit(torch.zeros(rows, k, dtype=dtype, device=device), matrix, b)


def cost(m: int, n: int, k: int, itemsize: int, blocksize: int, nested: bool = False) -> tuple[int, int]:
    """Bytes moved and FLOPs of one product with M = ``m`` rows of ``itemsize`` bytes."""
    scales = -(-n * k // blocksize) * (1 if nested else 4)
    return (n * k + 1) // 2 + scales + m * (n + k) * itemsize, 2 * m * n * k
