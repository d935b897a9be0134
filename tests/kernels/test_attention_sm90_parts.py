"""Which keys the tiles of the Hopper forward walk and mask: its functions on plain numbers, against the definition."""

from __future__ import annotations

from types import FunctionType, SimpleNamespace
from typing import Any

import pytest

from tests.triton_tools import needs_triton

GL = SimpleNamespace(
    cdiv=lambda a, b: -(-a // b), maximum=max, minimum=min, where=lambda c, a, b: a if c else b,
    load=lambda p: p[0][p[1]], constexpr=None,
)  # fmt: skip


class Pointer(tuple[Any, ...]):
    def __add__(self, step: Any) -> Any:
        return Pointer((self[0], self[1] + step))


def plain(name: str) -> Any:
    """A Gluon function as one on numbers."""
    from onegpu.kernels import attention_sm90_parts, hopper

    functions = {**vars(hopper), **vars(attention_sm90_parts)}

    def of(function: Any) -> Any:
        code = function.fn.__code__
        known = {key: of(functions[key]) for key in code.co_names if hasattr(functions.get(key), "fn")}
        return FunctionType(code, {"gl": GL, **known})

    return of(functions[name])


def arguments(n_q: int, n_k: int, left: int, right: int, **other: Any) -> Any:
    bn = other.get("BN", 128)
    aligned = right >= 0 and (n_k - n_q + right) % 64 == 0
    made = {
        "BN": bn, "LEFT": left >= 0, "RIGHT": right >= 0, "left": left, "right": right, "B": 1, "H": 2,
        "SQ": n_q, "SK": n_k, "NM": -(-n_q // 128), "section": 1, "RQ": 0, "RK": 0, "ALIGNED": aligned,
        "WIDE": left >= bn + 128, "ROTATE": 0, "p_q_rows": None, "p_k_rows": None,
    }  # fmt: skip
    return SimpleNamespace(**made | other)


@needs_triton
@pytest.mark.parametrize("bn", [64, 128])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (-1, 3), (70, 0), (300, 0), (1023, 0), (100, 7), (400, -1)])
def test_every_key_that_is_seen_is_walked_and_whole_blocks_are_whole(window: tuple[int, int], bn: int):
    place, masked = plain("place"), plain("masked")
    left, right = window
    for n_q, n_k in ((113, 203), (203, 113), (1, 1), (1, 300), (700, 700), (1024, 2048), (1023, 1024)):
        a = arguments(n_q, n_k, left, right, BN=bn)
        for m in range(a.NM):
            for group in range(2):
                _, _, _, row0, first, n, mine = place(a, m, 0, group)
                assert 1 <= mine <= n and n - mine <= 1
                at = row0 + n_k - n_q
                whole, cut = masked(a, at, first, mine - 1)
                for row in range(row0, min(row0 + 64, n_q)):
                    i = row + n_k - n_q
                    low = 0 if left < 0 else max(0, i - left)
                    high = n_k - 1 if right < 0 else min(n_k - 1, i + right)
                    if low > high:
                        continue
                    assert first * bn <= low and high < (first + mine) * bn
                    # blocks without a mask, those masked on the left only, the first one
                    assert cut >= whole or (low <= (first + cut) * bn and (first + whole) * bn - 1 <= high)
                    if a.WIDE:
                        assert cut == 0 or high >= (first + cut) * bn - 1
                        assert low <= (first + max(whole, cut)) * bn


@needs_triton
@pytest.mark.parametrize("rotate", [0, 1])
@pytest.mark.parametrize("section", [1, 3, 5, 40])
def test_every_tile_is_one_and_rotated_ones_are_mixed(section: int, rotate: int) -> None:
    tile_of = plain("tile_of")
    a = arguments(1024, 1024, -1, 0, section=section, ROTATE=rotate, B=3, H=4)
    tiles = [tile_of(a, tile) for tile in range(a.NM * 12)]
    assert len(set(tiles)) == len(tiles) and all(m < a.NM and h < 4 and b < 3 for m, h, b in tiles)
    if section == 1:
        dealt = {m for m, _, _ in tiles[:: a.NM]}  # to the first of as many blocks as there are tiles in a section
        assert len(dealt) == (a.NM if rotate else 1)


@needs_triton
def test_rows_without_queries_have_no_tiles() -> None:
    key_blocks, place = plain("key_blocks"), plain("place")
    a = arguments(512, 512, -1, 0, RQ=1, RK=1, ALIGNED=False, B=2, H=1)
    a.p_q_rows = a.p_k_rows = Pointer(([100, 130, 0, 512], 0))
    assert [key_blocks(a, m, 130, 130)[1] for m in range(4)] == [1, 2, 0, 0]
    assert place(a, 1, 0, 1)[:4] == (100, 130, 130, 192)
    assert place(a, 1, 1, 1)[:4] == (0, 512, 512, 192)
