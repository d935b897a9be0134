"""Triton kernels of ``rms_norm`` and ``layer_norm``, imported at the first call on a GPU.

A row lies in the registers of one program, so that it is read once. Going back, each program takes every P-th row and
keeps its share of the gradients of weight and bias; the shares are added in order by a second, small kernel of torch's.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from onegpu.kernels.launch import triton_launch


@triton.jit
def _forward_kernel(
    p_x, p_residual, p_weight, p_bias, p_y, p_total, x_row, r_row, eps, offset,
    N: tl.constexpr, BLOCK: tl.constexpr, MEAN: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, MIDDLE: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)  # [BLOCK]
    m_n = o_n < N
    b_x = tl.load(p_x + i_row * x_row + o_n, mask=m_n, other=0.0).to(tl.float32)
    if RESIDUAL:
        b_x += tl.load(p_residual + i_row * r_row + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_total = b_x.to(p_total.dtype.element_ty)
        tl.store(p_total + i_row * N + o_n, b_total, mask=m_n)
        b_x = b_total.to(tl.float32)  # what is normalised is the rounded sum, as it is when two modules do it
    if MEAN:
        b_x = tl.where(m_n, b_x - tl.sum(b_x, 0) / N, 0.0)
    b_x = b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / N + eps)
    b_x = b_x.to(MIDDLE).to(tl.float32)
    if WEIGHT:
        b_x = b_x * (tl.load(p_weight + o_n, mask=m_n, other=0.0).to(tl.float32) + offset)
    if BIAS:
        b_x += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_y + i_row * N + o_n, b_x.to(p_y.dtype.element_ty), mask=m_n)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    p_grad, p_x, p_weight, p_grad_x, p_grad_weight, p_grad_bias, rows, g_row, x_row, eps, offset,
    N: tl.constexpr, BLOCK: tl.constexpr, MEAN: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    o_n = tl.arange(0, BLOCK)  # [BLOCK]
    m_n = o_n < N
    b_grad_weight = tl.zeros([BLOCK], tl.float32)
    b_grad_bias = tl.zeros([BLOCK], tl.float32)
    b_weight = tl.full([BLOCK], 1.0, tl.float32)
    if WEIGHT:
        b_weight = tl.load(p_weight + o_n, mask=m_n, other=0.0).to(tl.float32) + offset
    for i_row in range(i_program, rows, tl.num_programs(0)):
        i_wide = tl.cast(i_row, tl.int64)
        b_x = tl.load(p_x + i_wide * x_row + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_grad = tl.load(p_grad + i_wide * g_row + o_n, mask=m_n, other=0.0).to(tl.float32)
        if MEAN:
            b_x = tl.where(m_n, b_x - tl.sum(b_x, 0) / N, 0.0)
        scale = tl.rsqrt(tl.sum(b_x * b_x, 0) / N + eps)
        b_x = b_x * scale
        b_inner = b_grad * b_weight
        b_grad_x = b_inner - b_x * (tl.sum(tl.where(m_n, b_inner * b_x, 0.0), 0) / N)
        if MEAN:
            b_grad_x -= tl.sum(tl.where(m_n, b_inner, 0.0), 0) / N
            b_grad_bias += b_grad
        b_grad_weight += b_grad * b_x
        tl.store(p_grad_x + i_wide * N + o_n, (b_grad_x * scale).to(p_grad_x.dtype.element_ty), mask=m_n)
    tl.store(p_grad_weight + i_program.to(tl.int64) * N + o_n, b_grad_weight, mask=m_n)
    if MEAN:
        tl.store(p_grad_bias + i_program.to(tl.int64) * N + o_n, b_grad_bias, mask=m_n)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as ``[rows, N]`` with neighbours side by side, without a copy where it has the strides for that."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, x.shape[-1])


def _warps(block: int) -> int:
    return max(1, min(32, block // 512))


_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    middle: torch.dtype,
    mean: bool,
    y: torch.Tensor,
    total: torch.Tensor | None,
) -> None:
    """x, residual: ``[..., N]``; y, and total for ``x + residual``: contiguous; ``mean``: subtract the mean."""
    n = x.shape[-1]
    if not x.numel():
        return
    x2, r2 = _rows(x), None if residual is None else _rows(residual)
    block = triton.next_power_of_2(n)
    triton_launch(
        _forward_kernel, (x2.shape[0],),
        x2, r2, weight, bias, y, total, x2.stride(0), 0 if r2 is None else r2.stride(0), eps, offset,
        N=n, BLOCK=block, MEAN=mean, RESIDUAL=residual is not None, WEIGHT=weight is not None,
        BIAS=bias is not None, MIDDLE=_TYPES[middle], num_warps=_warps(block),
    )  # fmt: skip


@functools.cache
def _programs(index: int) -> int:
    return 2 * torch.cuda.get_device_properties(index).multi_processor_count


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    mean: bool,
    grad_x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills grad_x; returns the gradients of weight and bias, float32 ``[N]``."""
    n = x.shape[-1]
    x2, g2 = _rows(x), _rows(grad)
    programs = min(x2.shape[0], _programs(x.device.index) if x.is_cuda else 3)
    if not x.numel():
        return x.new_zeros(n, dtype=torch.float32), x.new_zeros(n, dtype=torch.float32)
    shares = torch.empty(2 if mean else 1, programs, n, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(n)
    triton_launch(
        _backward_kernel, (programs,),
        g2, x2, weight, grad_x, shares[0], shares[-1], x2.shape[0], g2.stride(0), x2.stride(0), eps, offset,
        N=n, BLOCK=block, MEAN=mean, WEIGHT=weight is not None, num_warps=_warps(block),
    )  # fmt: skip
    sums = shares.sum(1)
    return sums[0], sums[-1]
