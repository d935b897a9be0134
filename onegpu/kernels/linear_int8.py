"""``y = x @ (weight * SCB / 127).T + bias`` by LLM.int8().

x ``[..., K]`` float, weight int8 ``[N, K]``, SCB float32 ``[N]`` (absmax of each weight row), y ``[..., N]``. The rows
of x are quantised to int8, multiplied exactly in integers and scaled back; columns of x that hold a value at or above
``threshold`` are taken out and multiplied in the dtype of x (arXiv:2208.07339, section 3). Bound by N*K bytes for few
rows, by 2*M*N*K integer operations for many.

On a GPU x stays as it is and the weights are converted (in registers for up to 128 rows), unless ``exact`` asks for the
paper's arithmetic: that is faster, rounds no activation and makes the threshold irrelevant. Exact, outlier columns are
found by mask and never counted on the host: ``nonzero`` would synchronise and could not be captured in a CUDA graph.
The CPU, where counting is free, multiplies only those columns. It is exact unless asked not to be: bitsandbytes leaves
x as it is there while a model trains, so that gradients belong to the product that was computed.
"""

from __future__ import annotations

from typing import Any

import torch

from onegpu.kernels import few_rows
from onegpu.kernels.autocast import autocast_input
from onegpu.kernels.library import check_columns, check_implementation, define, has_triton
from onegpu.kernels.quant_int8 import dequantize_rows
from onegpu.kernels.warmup import register

_INT8_SQUARED = 1.0 / (127.0 * 127.0)
# bitsandbytes' own on a CPU: six digits, and 2e-5 too large. With it our outputs there equal its own bit for bit. That
# is worth more: activations are rounded in every layer, the last digit of one layer flips roundings in the next, and
# the perplexities of two models that differ in nothing else part by some 1e-3.
_INT8_SQUARED_CPU = 6.200124e-05


# The longest sum of int8 products that float32 holds exactly: 2**24 / 2**14.
_EXACT_COLUMNS = 1024


def integer_product(a: torch.Tensor, b: torch.Tensor, exact: bool = False) -> torch.Tensor:
    """``a @ b.T`` of int8 ``[M, K]`` and ``[N, K]``.

    Returns int32, exact; or, where no integer product is to be had, float32, which rounds past 2**24 unless ``exact``.
    """
    (m, k), n = a.shape, b.shape[0]
    if a.device.type == "cpu":
        # Where K is 1, torch 2.13's _int_mm reads past its input.
        if torch.backends.cpu.get_cpu_capability() == "AVX512" and a.numel() and k > 1:
            return torch._int_mm(a, b.t())
    elif m and not (k % 8 or n % 8):
        # cuBLAS takes at least 17 rows, in eights.
        rows = max(24, -(-m // 8) * 8)
        return torch._int_mm(torch.nn.functional.pad(a, (0, 0, 0, rows - m)), b.t())[:m]
    if not exact or k <= _EXACT_COLUMNS:
        return a.float() @ b.float().t()
    total = torch.zeros((m, n), dtype=torch.int32, device=a.device)
    for part_a, part_b in zip(a.split(_EXACT_COLUMNS, dim=1), b.split(_EXACT_COLUMNS, dim=1), strict=True):
        total += (part_a.float() @ part_b.float().t()).int()
    return total


def _few_rows(
    x: torch.Tensor, weight: torch.Tensor, SCB: torch.Tensor, bias: torch.Tensor | None, portable: bool
) -> torch.Tensor | None:
    """The product ``[M, N]`` of ``[M, K]`` by a kernel that converts as it reads; None where there is none."""
    n, k = weight.shape
    SCB = SCB.contiguous()
    if not portable and few_rows.supports("int8", x, weight, k):
        y = few_rows.launch("int8", x, weight, n, bias, SCB)
        if y is not None:
            return y
    if has_triton() and x.shape[0] <= few_rows.PORTABLE_ROWS:
        from onegpu.kernels import linear_few_rows_triton as triton_kernels

        y = x.new_empty((x.shape[0], n))
        triton_kernels.linear_int8(x, weight, SCB, bias, y)
        return y
    return None


def _forward_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    SCB: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    exact: bool,
    implementation: str = "auto",
) -> torch.Tensor:
    n, k = weight.shape
    small = 0 < x.numel() <= few_rows.MAX_ROWS["int8"] * k and x.dtype != torch.float32
    if small and not exact and weight.is_contiguous():
        y = _few_rows(x.reshape(-1, k).contiguous(), weight, SCB, bias, implementation == "portable")
        if y is not None:
            return y if x.dim() == 2 else y.view(*x.shape[:-1], n)
    return _forward(x, weight, SCB, bias, threshold, exact)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    SCB: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    exact: bool,
    implementation: str = "auto",
) -> torch.Tensor:
    if not exact:
        return torch.nn.functional.linear(x, dequantize_rows(weight, SCB, x.dtype), bias)
    rows = x.reshape(-1, x.shape[-1])
    codes, absmax, mask = torch.ops.onegpu.int8_vectorwise_quant(rows.half(), threshold)
    unit = _INT8_SQUARED_CPU if x.device.type == "cpu" else _INT8_SQUARED
    out = integer_product(codes, weight) * (absmax[:, None] * SCB[None, :]) * unit
    if bias is not None:
        out += bias
    out = out.to(x.dtype)
    if threshold > 0.0:
        if x.device.type == "cpu":
            columns = mask.nonzero().view(-1)
            if columns.numel():
                out = out.addmm(rows[:, columns], dequantize_rows(weight[:, columns], SCB, x.dtype).t())
        else:
            out = out.addmm(rows.masked_fill(~mask, 0.0), dequantize_rows(weight, SCB, x.dtype).t())
    # No view where none is needed: autograd refuses to modify in place what a custom function returns as one.
    result: torch.Tensor = out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])
    return result


def _forward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    SCB: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    exact: bool,
    implementation: str = "auto",
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward(grad: torch.Tensor, weight: torch.Tensor, SCB: torch.Tensor) -> torch.Tensor:
    return grad @ dequantize_rows(weight, SCB, grad.dtype)


def _backward_fake(grad: torch.Tensor, weight: torch.Tensor, SCB: torch.Tensor) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


define(
    "int8_linear(Tensor x, Tensor weight, Tensor SCB, Tensor? bias, float threshold, bool exact, "
    "str implementation='auto') -> Tensor",
    _forward,
    _forward_fake,
    cuda=_forward_cuda,
)
define("int8_linear_backward(Tensor grad, Tensor weight, Tensor SCB) -> Tensor", _backward, _backward_fake)


class _LinearInt8(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        source: torch.Tensor | None,
        weight: torch.Tensor,
        SCB: torch.Tensor,
        bias: torch.Tensor | None,
        threshold: float,
        exact: bool,
        implementation: str,
    ) -> torch.Tensor:
        ctx.weight, ctx.SCB = weight, SCB
        # x is kept only where a 16-bit weight learns from it (has_fp16_weights).
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        arguments = (x, weight, SCB, bias, threshold, exact, implementation)
        return torch.ops.onegpu.int8_linear(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        need_x, need_source, _, _, need_bias, _, _, _ = ctx.needs_input_grad
        grad_x = torch.ops.onegpu.int8_linear_backward(grad, ctx.weight, ctx.SCB) if need_x else None
        grad_source = grad.t() @ x if need_source else None
        return grad_x, grad_source, None, None, grad.sum(dim=0) if need_bias else None, None, None, None


def linear_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    SCB: torch.Tensor,
    bias: torch.Tensor | None = None,
    threshold: float = 0.0,
    source: torch.Tensor | None = None,
    exact: bool | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Multiply by an int8 matrix.

    Args:
        x: float16, bfloat16 or float32, ``[..., K]``.
        weight: int8 ``[N, K]``.
        SCB: float32 ``[N]``.
        bias: ``[N]`` or None.
        threshold: outlier threshold in units of x; 0 quantises every column.
        exact: the paper's arithmetic, or x as it is; by default the former on a CPU and the latter on a GPU.
        source: the float matrix that ``weight`` was just made from, where it learns; gets the gradient.
        implementation: "auto", or "portable": on a GPU no kernel but Triton's, which run everywhere.

    Returns:
        ``[..., N]`` in the dtype of x (of autocast, where it is on). Gradients flow to x, bias and ``source``.

    Raises:
        ArgumentError: the implementation has another name, or x another K.
    """
    check_implementation(implementation)
    check_columns(x, weight.shape[1])
    x = autocast_input(x)
    if exact is None:
        exact = x.device.type == "cpu"
    if bias is not None and bias.dtype != x.dtype and not exact:
        bias = bias.to(x.dtype)
    learns = any(t is not None and t.requires_grad for t in (x, bias, source))
    if torch.is_grad_enabled() and learns:
        y = _LinearInt8.apply(x.reshape(-1, x.shape[-1]), source, weight, SCB, bias, threshold, exact, implementation)
        return y.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]
    return torch.ops.onegpu.int8_linear(x, weight, SCB, bias, threshold, exact, implementation)  # type: ignore[no-any-return]


@register("linear_int8")
def _warm(device: torch.device, dtype: torch.dtype, rows: int, n: int, k: int, bias: bool = False) -> None:
    weight = torch.zeros(n, k, dtype=torch.int8, device=device)
    b = torch.zeros(n, dtype=dtype, device=device) if bias else None
    linear_int8(torch.zeros(rows, k, dtype=dtype, device=device), weight, torch.zeros(n, device=device), b)


def cost(m: int, n: int, k: int, itemsize: int) -> tuple[int, int]:
    """Bytes moved and FLOPs of one product with M = ``m`` rows of ``itemsize`` bytes."""
    return n * k + 4 * n + m * (n + k) * itemsize, 2 * m * n * k
