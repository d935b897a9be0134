"""Launches the kernel of decode_step_attention.cu, the attention of a decoding step; the op is in decode_step.py."""

from __future__ import annotations

from typing import NamedTuple

import torch

from onegpu.kernels import decode_step_cuda as step
from onegpu.kernels.decode_step import Attended, Heads, Matrix


class Split(NamedTuple):
    """How the attention is laid out: warps of a block, steps of values in a warp's ring, and how many steps beyond the
    first the L2 cache is sent for."""

    warps: int
    stages: int
    sent: int

    def shared(self, heads: Heads, apart: bool = False) -> int:
        """Bytes of shared memory, as the kernel divides it: ring, queries, new key and value, a head, sines, ends, and
        the outputs of the warps, if they lie not in the ring."""
        wide, rotated = -(-heads.size // 32) * 32, _rotated(heads)
        ring = self.warps * self.stages * (16 if heads.size > 128 else 32) * 2 * wide
        work = 4 * self.warps * wide * (bool(rotated % 64) + _together(heads) * apart)
        return ring + 2 * wide * (_together(heads) + 2) + work + 4 * max(rotated, 2) + 64 * (self.warps + 1)


ALONE, BESIDE = Split(4, 2, 0), Split(4, 1, 3)


def _rotated(heads: Heads) -> int:
    return 0 if heads.inv_freq is None else 2 * heads.inv_freq.numel()


def _together(heads: Heads) -> int:
    """Query heads of a key head that are taken at a time."""
    return -(-heads.query // (heads.kv * step.chunks(heads)))


def beside(heads: Heads, rows: int, *products: Matrix) -> int:
    """Bytes that the products in front of the attention and behind it leave to it; 0: it cannot lie beside them.

    It can for one row: products of more do not leave it its quarter of the registers.
    """
    if rows > 1 or heads.size > 128:
        return 0
    taken = (BESIDE.shared(heads) + 1023) // 1024 * 1024 + 2048  # the system takes 1024 a block
    return taken if all(step.leaves(matrix, rows, taken) for matrix in products) else 0


def attend(
    qkv: torch.Tensor,
    heads: Heads,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    rope_position: torch.Tensor,
    first: torch.Tensor | None,
    out: Attended,
    pdl: bool = True,
    beside: int = 0,
    fixed: Split | None = None,
) -> None:
    """One launch. beside: what the kernels in front of it and behind it leave to it, or 0."""
    size, rotated, group = heads.size, _rotated(heads), heads.query // heads.kv
    split = fixed or (BESIDE if beside else ALONE)
    norms = 0 if heads.q_gain is None else 1 if heads.q_gain.numel() == size else 2
    kernel = step._kernel("attention").variant(
        None, **step._COMMON, FMT=0, BF16=int(keys.dtype == torch.bfloat16), HD=size, ALL=group,
        GQ=_together(heads), HKV=heads.kv, SPLITS=out.values.shape[2], ROT=rotated, NORMS=norms,
        GROUPED=int(heads.grouped), CAP=int(heads.cap > 0), ALIBI=0 if heads.slopes is None else 1 + heads.rounded,
        CLIP=int(heads.clip > 0), WARPS=split.warps, STAGES=split.stages, SENT=split.sent, BESIDE=int(beside > 0),
    )  # fmt: skip
    if step._collected(kernel):
        return
    shared = split.shared(heads) if beside else max(split.shared(heads, True), step._ALONE)
    length = keys.shape[2]
    kernel(
        (step.multiprocessors(qkv.get_device()),), 32 * split.warps, shared,
        qkv, position, rope_position, first, keys, values, heads.inv_freq, heads.q_gain, heads.k_gain, heads.slopes,
        *out, len(qkv), length, heads.window or length, int(position.numel() > 1),
        int(rope_position.numel() > 1), heads.scale, heads.rope_scale, heads.eps, heads.one, heads.cap, heads.clip,
        pdl=pdl,
    )  # fmt: skip
