"""Triton kernels of ``next_token``, imported at the first call on a GPU.

A score and its token travel as one int64: the score's bits, so arranged that integers are in the order of the floats
(NaN is the highest, as for `torch.argmax` and `torch.topk`), above the token. One comparison then orders both, equals
have a defined order, and the maximum over any number of parts is the same in every run.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from onegpu.kernels.launch import triton_launch
from onegpu.kernels.next_token import Shape, State

_BLOCK = 1024
_PROGRAMS = 512  # so many keep the memory of any GPU busy; a power of two
# Numbers that differ between requests: one compiled kernel serves all.
_ANY = ["n_eos", "n_rows", "L", "n_shown", "parts", "span", "top_k", "least_top_p", "least_min_p"]
_FEW_EOS = 16  # one kernel for up to so many
_LOWEST = tl.constexpr(-(1 << 63))
_NAN = tl.constexpr(0x7FFFFFFF)
_INF = tl.constexpr(0x7F800000)
_MINUS_INF = tl.constexpr(-0x7F800001)


@triton.jit
def _ordered(b_x):
    """int32 in the order of the float32 `b_x`; both zeros are 0, and every NaN is the highest."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_key = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    b_key = tl.where(b_x == 0.0, 0, b_key)
    return tl.where(b_x != b_x, _NAN, b_key)


@triton.jit
def _record(
    i_row, token, invalid, p_eos, n_eos, p_pad, p_out, n_rows, p_history, L, p_lengths, p_shown, n_shown,
    EOS: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    finished = tl.load(p_out + n_rows + i_row)
    if PAD:
        token = tl.where(finished != 0, tl.load(p_pad), token)
    o_eos = tl.arange(0, EOS)
    b_eos = tl.load(p_eos + o_eos, mask=o_eos < n_eos, other=-1)  # [EOS]
    hit = tl.max((b_eos == token).to(tl.int32), axis=0)
    finished = ((finished != 0) | (hit != 0)).to(tl.int64)
    invalid = tl.load(p_out + 2 * n_rows + i_row) | invalid.to(tl.int64)
    length = tl.load(p_lengths + i_row)
    tl.store(p_out + i_row, token)
    tl.store(p_out + n_rows + i_row, finished)
    tl.store(p_out + 2 * n_rows + i_row, invalid)
    if n_shown > 0:  # who reads it there waits for an event behind this kernel
        p_slot = p_shown + (length & (n_shown - 1)) * 3 * n_rows + i_row
        tl.store(p_slot, token)
        tl.store(p_slot + n_rows, finished)
        tl.store(p_slot + 2 * n_rows, invalid)
    tl.store(p_history + i_row * L + tl.minimum(length, L - 1), token)
    tl.store(p_lengths + i_row, length + 1)


@triton.jit(do_not_specialize=_ANY)
def _best_kernel(
    p_scores, p_noise, p_best, V, stride, scale, span, BLOCK: tl.constexpr, RACE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """The best key of each span of a row. Reads each score once, in parts that fill the GPU."""
    if PDL:
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()
    i_row = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(1)
    b_best = tl.full([BLOCK], _LOWEST, tl.int64)  # [BLOCK]
    for start in range(0, span, BLOCK):
        o_token = i_part * span + start + tl.arange(0, BLOCK)  # [BLOCK]
        m_token = o_token < V
        b_x = tl.load(p_scores + i_row * stride + o_token, mask=m_token, other=0.0).to(tl.float32)
        if RACE:
            b_x = b_x * scale - tl.log(tl.load(p_noise + i_row * V + o_token, mask=m_token, other=1.0))
        b_key = (_ordered(b_x).to(tl.int64) << 32) | (0x7FFFFFFF - o_token).to(tl.int64)  # of equals the first
        b_best = tl.maximum(b_best, tl.where(m_token, b_key, _LOWEST))
    tl.store(p_best + i_row * tl.num_programs(1) + i_part, tl.max(b_best, axis=0))


@triton.jit(do_not_specialize=_ANY)
def _take_kernel(
    p_best, parts, p_eos, n_eos, p_pad, p_out, n_rows, p_history, L, p_lengths, p_shown, n_shown,
    PARTS: tl.constexpr, RACE: tl.constexpr, EOS: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best of a row's parts, recorded."""
    if PDL:
        tl_cuda.gdc_wait()
    i_row = tl.program_id(0).to(tl.int64)
    o_part = tl.arange(0, PARTS)
    b_best = tl.load(p_best + i_row * parts + o_part, mask=o_part < parts, other=_LOWEST)  # [PARTS]
    best = tl.max(b_best, axis=0)
    value = best >> 32
    # Scores that are infinite upwards or NaN have no probabilities, nor have scores that are all -inf.
    invalid = ((value >= _INF) | (value <= _MINUS_INF)) if RACE else value != value
    token = 0x7FFFFFFF - (best & 0xFFFFFFFF)
    _record(
        i_row, token, invalid, p_eos, n_eos, p_pad, p_out, n_rows, p_history, L, p_lengths, p_shown, n_shown, EOS, PAD
    )


@triton.jit(do_not_specialize=_ANY)
def _candidates_kernel(
    p_values, p_ids, p_noise, V, scale, top_k, cut, least_top_p, min_p, least_min_p,
    p_eos, n_eos, p_pad, p_out, n_rows, p_history, L, p_lengths, p_shown, n_shown,
    K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, EOS: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """One row: its candidates sorted, cut from the left, raced, recorded."""
    i_row = tl.program_id(0).to(tl.int64)
    o_rank = tl.arange(0, K)  # [K], 0 is the lowest
    b_x = tl.load(p_values + i_row * K + o_rank).to(tl.float32)
    b_key = (_ordered(b_x).to(tl.int64) << 32) | tl.load(p_ids + i_row * K + o_rank)
    b_key = tl.sort(b_key)
    b_ids = b_key & 0xFFFFFFFF
    b_bits = (b_key >> 32).to(tl.int32)
    b_x = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits).to(tl.float32, bitcast=True) * scale
    least = tl.max(tl.where(o_rank == K - top_k, b_x, -float("inf")), axis=0)
    b_x = tl.where(b_x < least, -float("inf"), b_x)
    highest = tl.max(tl.where(o_rank == K - 1, b_x, -float("inf")), axis=0)
    b_e = tl.exp(b_x - highest)  # [K]; 1 for the highest
    total = tl.sum(b_e, axis=0)  # NaN where one score is, or is inf, or where all are -inf
    if TOP_P:
        b_removed = (tl.cumsum(b_e / total, axis=0) <= cut) & (o_rank < K - least_top_p)
        b_e = tl.where(b_removed, 0.0, b_e)
    if MIN_P:
        b_e = tl.where((b_e < min_p) & (o_rank < K - least_min_p), 0.0, b_e)
    b_score = b_e / tl.load(p_noise + i_row * V + b_ids)
    # Not negative: the bits are in the order of the numbers.
    best = tl.max((b_score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | b_ids, axis=0)
    token = best & 0xFFFFFFFF
    invalid = total != total
    _record(
        i_row, token, invalid, p_eos, n_eos, p_pad, p_out, n_rows, p_history, L, p_lengths, p_shown, n_shown, EOS, PAD
    )


def take(scores: torch.Tensor, noise: torch.Tensor | None, temperature: float, state: State) -> None:
    """As `next_token.take`; all but `scores` contiguous, its last stride 1."""
    rows, vocab = scores.shape
    span = _BLOCK
    while rows * triton.cdiv(vocab, span) > _PROGRAMS and span < vocab:
        span *= 2
    parts = triton.cdiv(vocab, span)
    best = torch.empty(rows, parts, dtype=torch.int64, device=scores.device)
    race, pdl = noise is not None, _starts_early(scores.device)
    options = {"launch_pdl": True} if pdl else {}
    triton_launch(
        _best_kernel, (rows, parts),
        scores, noise if race else scores, best, vocab, scores.stride(0), 1.0 / temperature, span,
        BLOCK=_BLOCK, RACE=race, PDL=pdl, **options,
    )  # fmt: skip
    triton_launch(
        _take_kernel, (rows,),
        best, parts, *_pointers(state),
        PARTS=_PROGRAMS, RACE=race, PDL=pdl, **_constants(state), num_warps=1, **options,
    )  # fmt: skip


def take_candidates(values: torch.Tensor, ids: torch.Tensor, noise: torch.Tensor, shape: Shape, state: State) -> None:
    """As `next_token.take_candidates`; K is a power of two, and all tensors contiguous."""
    rows, count = values.shape
    temperature, top_k, top_p, least_top_p, min_p, least_min_p = shape
    triton_launch(
        _candidates_kernel, (rows,),
        values, ids, noise, noise.shape[1], 1.0 / temperature, top_k, 1.0 - top_p, least_top_p, min_p, least_min_p,
        *_pointers(state), K=count, TOP_P=top_p < 1, MIN_P=min_p > 0, **_constants(state), num_warps=4,
    )  # fmt: skip


@functools.cache
def _starts_early(device: torch.device) -> bool:
    """Whether there is programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def _pointers(state: State) -> tuple[torch.Tensor | int, ...]:
    eos, pad, out, history, lengths, shown = state
    pad, slots = out if pad is None else pad, 0 if shown is None else len(shown)
    ring = out if shown is None else shown
    return eos, len(eos), pad, out, out.shape[1], history, history.shape[1], lengths, ring, slots


def _constants(state: State) -> dict[str, int | bool]:
    return {"EOS": triton.next_power_of_2(max(_FEW_EOS, len(state.eos))), "PAD": state.pad is not None}
