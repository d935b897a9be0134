"""Triton kernels of ``gated_mlp``, imported at the first call on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from onegpu.kernels.launch import triton_launch

_ROOT = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_BLOCK = 1024


@triton.jit
def _sigmoids(b_x):
    """sigmoid(x) and sigmoid(-x), neither by a difference."""
    b_small = tl.exp(-tl.abs(b_x))
    b_large = 1.0 / (1.0 + b_small)
    b_small *= b_large
    return tl.where(b_x < 0, b_small, b_large), tl.where(b_x < 0, b_large, b_small)


@triton.jit
def _act(b_x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return b_x / (1.0 + tl.exp(-b_x))
    elif ACTIVATION == "gelu":
        return 0.5 * b_x * (1.0 + tl.erf(b_x * 0.7071067811865476))
    else:  # 0.5 + 0.5 * tanh(z) is sigmoid(2 z)
        return b_x / (1.0 + tl.exp((b_x + 0.044715 * b_x * b_x * b_x) * (-2.0 * _ROOT)))


@triton.jit
def _slope(b_x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        b_half = 1.0 / (1.0 + tl.exp(-b_x))
        return b_half * (1.0 + b_x * (1.0 - b_half))
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(b_x * 0.7071067811865476)) + b_x * tl.exp(-0.5 * b_x * b_x) * (0.5 * _ROOT)
    else:
        b_plus, b_minus = _sigmoids((b_x + 0.044715 * b_x * b_x * b_x) * (2.0 * _ROOT))
        b_inner = (1.0 + 0.134145 * b_x * b_x) * (2.0 * _ROOT)
        return b_plus + b_x * b_plus * b_minus * b_inner


@triton.jit
def _forward_kernel(p_gate, p_up, p_y, g_row, u_row, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_n = o_n < N
    b_gate = tl.load(p_gate + i_row * g_row + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + i_row * u_row + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_y = _act(b_gate, ACTIVATION) * b_up
    tl.store(p_y + i_row * N + o_n, b_y.to(p_y.dtype.element_ty), mask=m_n)


@triton.jit
def _backward_kernel(
    p_grad, p_gate, p_up, p_grad_gate, p_grad_up, d_row, g_row, u_row, N,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_n = o_n < N
    b_grad = tl.load(p_grad + i_row * d_row + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + i_row * g_row + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + i_row * u_row + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_grad_gate = b_grad * b_up * _slope(b_gate, ACTIVATION)
    b_grad_up = b_grad * _act(b_gate, ACTIVATION)
    tl.store(p_grad_gate + i_row * N + o_n, b_grad_gate.to(p_grad_gate.dtype.element_ty), mask=m_n)
    tl.store(p_grad_up + i_row * N + o_n, b_grad_up.to(p_grad_up.dtype.element_ty), mask=m_n)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as ``[rows, I]`` with neighbours side by side: halves of one tensor are not copied for it."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, x.shape[-1])


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str, y: torch.Tensor) -> None:
    """gate, up: ``[..., I]`` of any strides; y: contiguous."""
    if not y.numel():
        return
    g2, u2 = _rows(gate), _rows(up)
    rows, n = g2.shape
    triton_launch(
        _forward_kernel,
        (rows, triton.cdiv(n, _BLOCK)),
        g2,
        u2,
        y,
        g2.stride(0),
        u2.stride(0),
        n,
        ACTIVATION=activation,
        BLOCK=_BLOCK,
        num_warps=4,
    )


def backward(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    grad_gate: torch.Tensor,
    grad_up: torch.Tensor,
) -> None:
    """grad, gate, up: ``[..., I]`` of any strides; the results: contiguous."""
    if not grad.numel():
        return
    d2, g2, u2 = _rows(grad), _rows(gate), _rows(up)
    rows, n = g2.shape
    triton_launch(
        _backward_kernel, (rows, triton.cdiv(n, _BLOCK)),
        d2, g2, u2, grad_gate, grad_up, d2.stride(0), g2.stride(0), u2.stride(0), n,
        ACTIVATION=activation, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
