"""Moves and casts of quantised tensors: a move moves, a cast changes nothing."""

from __future__ import annotations

import pytest
import torch

from onegpu.nn.bytes_of import move_as_bytes, nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int8])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 1), (2, 3, 4)])
def test_casts_change_nothing_and_moves_keep_every_bit(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 255, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).view(shape)
    # As `nn.Module.half`, `.double` and `.to(device, dtype)` write them.
    casts = [lambda t: t.half() if t.is_floating_point() else t, lambda t: t.double() if t.is_floating_point() else t]
    moves = [lambda t: t.to(device, torch.float16 if t.is_floating_point() else None), lambda t: t.clone()]
    for fn in casts + moves:
        moved = move_as_bytes(tensor, fn)
        assert moved.dtype == dtype and moved.shape == shape
        assert moved.cpu().reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()
    assert move_as_bytes(tensor, moves[0]).device.type == device


def test_views_and_meta_tensors_are_moved() -> None:
    columns = torch.arange(6.0).view(2, 3).t()
    assert move_as_bytes(columns, torch.clone).tolist() == columns.tolist()
    on_meta = move_as_bytes(columns, lambda t: t.to("meta"))
    assert on_meta.is_meta and on_meta.shape == (3, 2) and on_meta.dtype == torch.float32


def test_nbytes_adds_up_what_is_there() -> None:
    assert nbytes(torch.ones(3), None, torch.ones(2, 2, dtype=torch.bfloat16), torch.ones((), dtype=torch.uint8)) == 21
    assert nbytes() == nbytes(None) == 0
