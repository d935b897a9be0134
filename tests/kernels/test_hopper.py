"""The pieces of the Hopper kernels, each in a kernel of its own."""

from __future__ import annotations

import itertools
import math
import types
from typing import Any

import pytest
import torch

from onegpu.kernels.launch import triton_launch
from onegpu.kernels.triton_kernel import TritonKernel
from tests.triton_tools import needs_triton


def kernels() -> Any:
    from tests.kernels import hopper_kernels

    return hopper_kernels


@needs_triton
def test_pieces_compile() -> None:
    x = torch.zeros(64, 128, dtype=torch.float16)
    made, _ = TritonKernel(kernels().cleared).compile(90, (x, x, 37), {"num_warps": 4})
    assert "fence.proxy.async" in made.asm["ptx"]


def in_python(name: str) -> Any:
    """A function of scalars as plain Python."""
    import onegpu.kernels.hopper as module

    gl = types.SimpleNamespace(
        minimum=min, maximum=max, where=lambda x, y, z: y if x else z, cdiv=lambda x, y: -(-x // y)
    )
    return types.FunctionType(getattr(module, name).fn.__code__, {"gl": gl})


@needs_triton
def test_whoever_waits_for_a_turn_waits_for_a_tile_drawn_before() -> None:
    """Tile after tile as they are drawn, each finds its turn at each of its query blocks: nobody ever waits in vain."""
    key_tile_of, query_blocks, turn_of = map(in_python, ("key_tile_of", "query_blocks", "turn_of"))
    lengths = (1, 64, 127, 128, 129, 300, 640)
    windows = (None, None), (None, 0), (None, 70), (200, 0), (100, None), (3, 130)
    for n_q, n_k, (left, right), m in itertools.product(lengths, lengths, windows, (64, 128)):
        a = types.SimpleNamespace(
            LEFT=left is not None, RIGHT=right is not None, left=left, right=right, M=m, ORDER=True
        )
        a.NN, a.HK, a.B, a.section, a.RK = (
            -(-n_k // 128) + 1,
            2,
            2,
            3,
            True,
        )  # one tile past the end, as packed ones have
        counts: dict[tuple[int, ...], int] = {}
        for drawn in range(a.NN * a.HK * a.B):
            n, head, batch = key_tile_of(a, drawn)
            first, stop = query_blocks(a, n, n_q, n_k)
            for block in range(first, stop):
                for consumer in range(2):
                    row0 = n * 128 + consumer * 64
                    at = batch, head, block, consumer
                    assert counts.get(at, 0) == turn_of(a, block, row0, n_q, n_k)
                    counts[at] = (row0 >> 7) + 1  # as pass_turn does
        if right is None and left is None:
            assert len(counts) == 2 * 2 * 2 * -(-n_q // m)


@needs_triton
@pytest.mark.parametrize("m", [64, 128])
def test_scratch_blocks_and_turns_are_each_heads_own_and_inside(m: int) -> None:
    """Of dense, padded and packed sequences, grouped heads too; keys of packed ones longer than was said."""
    key_tile_of, query_blocks, turn_of, first_block, sequence = map(
        in_python, ("key_tile_of", "query_blocks", "turn_of", "first_block", "sequence")
    )
    sequence.__globals__["gl"].load = lambda p: p.data[p.at]
    ends = [3, 3, 8, 205, 206, 590, 700]
    ranges = [(0, 700), (200, 400), (650, 80), (13, 0)]
    for how, rows, right, said in itertools.product((0, 1, 2), (64, 700), (None, 0, 90), (0, 200)):
        if how == 2 and rows == 64:
            continue
        batch = {0: 2, 1: len(ranges), 2: len(ends) - 1}[how]
        longest = max(b - a for a, b in itertools.pairwise(ends)) if how == 2 else rows
        a = types.SimpleNamespace(RQ=how, RK=how, M=m, SQ=rows, SK=rows, B=batch, H=4, HK=2, section=3, ORDER=True)
        a.LEFT, a.RIGHT, a.left, a.right = False, right is not None, -1, right
        a.NN = -(-(longest - said if how == 2 else longest) // 128)
        a.NB = rows // m + batch if how == 2 else -(-rows // m)  # as attention_hopper.backward does
        blocks = a.NB * a.H * (1 if how == 2 else batch)
        flat = ends if how == 2 else [min(x, rows) for pair in ranges for x in pair]
        counts: dict[int, int] = {}
        owner: dict[int, tuple[int, int]] = {}
        for drawn in range(a.NN * a.HK * a.B):
            n, hk, b = key_tile_of(a, drawn)
            i_q, n_q = sequence(Pointer(flat), b, rows, how)
            first, stop = query_blocks(a, n, n_q, n_q)
            for h, block in itertools.product((2 * hk, 2 * hk + 1), range(first, stop)):
                at = first_block(a, b, h, i_q) + block
                assert 0 <= at < blocks and owner.setdefault(at, (b, h)) == (b, h)
                for consumer in range(2):
                    place = 2 + at * 2 + consumer
                    assert place < 2 + 2 * blocks
                    assert counts.get(place, 0) == turn_of(a, block, n * 128 + consumer * 64, n_q, n_q)
                    counts[place] = n + 1
        assert counts


class Pointer:
    """What `sequence` does with one."""

    def __init__(self, data: list[int], at: int = 0) -> None:
        self.data, self.at = data, at

    def __add__(self, other: int) -> Pointer:
        return Pointer(self.data, self.at + other)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [-5, 0, 1, 16, 37, 64, 70])
def test_cleared_rows(n: int) -> None:
    x = torch.randn(64, 128, device="cuda").half()
    x[max(n, 0) :] = math.nan
    y = torch.empty_like(x)
    triton_launch(kernels().cleared, (1,), x, y, n, num_warps=4)
    assert torch.equal(y[: max(n, 0)], x[: max(n, 0)]) and not y[max(n, 0) :].any()
