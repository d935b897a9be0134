"""Triton kernel of ``rotary``, imported at the first call on a GPU.

One program turns a few heads of one token. Programs are numbered through q's heads, then k's, then v's, which are
copied; of k and v the row to write is the token's, or its place in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from onegpu.kernels.launch import triton_launch

_HEADS = 4  # of a program


@triton.jit
def _heads(
    p_in, p_out, p_cos, p_sin, i_block, i_t, i_to, n_heads, in_h, in_t, out_h, out_t,
    D: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BHALF: tl.constexpr, BREST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    o_h = (i_block * BH + tl.arange(0, BH)).to(tl.int64)  # [BH]
    p_from = p_in + (o_h * in_h + i_t * in_t)[:, None]
    p_to = p_out + (o_h * out_h + i_to * out_t)[:, None]
    m_h = (o_h < n_heads)[:, None]
    if HALF > 0:
        o_r = tl.arange(0, BHALF)  # [BHALF]
        m_r = m_h & (o_r < HALF)[None, :]
        o_a, o_b = o_r[None, :], o_r[None, :] + HALF
        if INTERLEAVED:
            o_a, o_b = 2 * o_r[None, :], 2 * o_r[None, :] + 1
        b_cos = tl.load(p_cos + o_r, mask=o_r < HALF, other=0.0).to(tl.float32)[None, :]
        b_sin = tl.load(p_sin + o_r, mask=o_r < HALF, other=0.0).to(tl.float32)[None, :]
        b_a = tl.load(p_from + o_a, mask=m_r, other=0.0).to(tl.float32)  # [BH, BHALF]
        b_b = tl.load(p_from + o_b, mask=m_r, other=0.0).to(tl.float32)
        tl.store(p_to + o_a, (b_a * b_cos - b_b * b_sin).to(p_out.dtype.element_ty), mask=m_r)
        tl.store(p_to + o_b, (b_b * b_cos + b_a * b_sin).to(p_out.dtype.element_ty), mask=m_r)
    if 2 * HALF < D:
        o_d = 2 * HALF + tl.arange(0, BREST)[None, :]
        m_d = m_h & (o_d < D)
        tl.store(p_to + o_d, tl.load(p_from + o_d, mask=m_d, other=0.0).to(p_out.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["T", "H", "HKV", "L"])
def _rotary_kernel(
    p_q, p_k, p_v, p_cos, p_sin, p_places, p_q_out, p_k_out, p_v_out, T, H, HKV, L,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, c_b, c_t, s_b, s_t, p_b, p_t,
    qo_b, qo_h, qo_t, ko_b, ko_h, ko_t, vo_b, vo_h, vo_t,
    D: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BHALF: tl.constexpr,
    BREST: tl.constexpr, BDV: tl.constexpr, INTERLEAVED: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // T).to(tl.int64)
    i_t = (tl.program_id(0) % T).to(tl.int64)
    i_block = tl.program_id(1)
    n_q, n_k = tl.cdiv(H, BH), tl.cdiv(HKV, BH)
    p_c, p_s = p_cos + i_b * c_b + i_t * c_t, p_sin + i_b * s_b + i_t * s_t
    if i_block < n_q:
        _heads(p_q + i_b * q_b, p_q_out + i_b * qo_b, p_c, p_s, i_block, i_t, i_t, H, q_h, q_t, qo_h, qo_t,
               D, HALF, BH, BHALF, BREST, INTERLEAVED)  # fmt: skip
    else:
        i_to = i_t
        if CACHE:
            i_to = tl.load(p_places + i_b * p_b + i_t * p_t).to(tl.int64)
        if (i_to >= 0) & (i_to < L):
            if i_block < n_q + n_k:
                _heads(p_k + i_b * k_b, p_k_out + i_b * ko_b, p_c, p_s, i_block - n_q, i_t, i_to, HKV, k_h, k_t, ko_h,
                       ko_t, D, HALF, BH, BHALF, BREST, INTERLEAVED)  # fmt: skip
            elif CACHE:
                _heads(p_v + i_b * v_b, p_v_out + i_b * vo_b, p_c, p_s, i_block - n_q - n_k, i_t, i_to, HKV, v_h, v_t,
                       vo_h, vo_t, DV, 0, BH, BHALF, BDV, INTERLEAVED)  # fmt: skip


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
) -> None:
    """q, k and the results: ``[B, H, T, D]`` of any strides; cos, sin: ``[B, T, R / 2]``."""
    _launch(q, k, k, cos, sin, None, q_out, k_out, k_out, interleaved)


def rotary_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    places: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    interleaved: bool,
    q_out: torch.Tensor,
) -> None:
    """The same, with k and v written to ``places`` ``[B, T]`` of the caches ``[B, H_kv, L, D]``."""
    _launch(q, k, v, cos, sin, places, q_out, k_cache, v_cache, interleaved)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    places: torch.Tensor | None,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    interleaved: bool,
) -> None:
    (b, h, t, d), h_kv, half, d_v = q.shape, k.shape[1], cos.shape[-1], v.shape[-1]
    if not b * t:
        return
    q, k, v, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, cos, sin))
    blocks = triton.cdiv(h, _HEADS) + (2 if places is not None else 1) * triton.cdiv(h_kv, _HEADS)
    places_strides = (0, 0) if places is None else places.stride()
    triton_launch(
        _rotary_kernel, (b * t, blocks),
        q, k, v, cos, sin, places, q_out, k_out, v_out, t, h, h_kv, k_out.shape[2],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *cos.stride()[:2], *sin.stride()[:2], *places_strides,
        *q_out.stride()[:3], *k_out.stride()[:3], *v_out.stride()[:3],
        D=d, DV=d_v, HALF=half, BH=_HEADS, BHALF=triton.next_power_of_2(max(1, half)),
        BREST=triton.next_power_of_2(max(1, d - 2 * half)), BDV=triton.next_power_of_2(d_v),
        INTERLEAVED=interleaved, CACHE=places is not None, num_warps=2,
    )  # fmt: skip
