"""What the attention of the current forward knows beside its arguments: the engine's decode step, masks not yet read.

Both belong to the thread. The engine announces a step with :func:`decode_step`; masks queue here until the first of
them is needed, and then all of them are brought to the host together, so that a forward waits for the GPU once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol
from weakref import ref

import torch


class DecodeStep(NamedTuple):
    """One step against a static cache: ``first`` and ``length``, int32 ``[B]`` on the device of the cache.

    The real keys of row b are ``first[b] <= j < length[b]``, those that this step writes among them. It is for caches
    of ``keys`` positions; None: for all.
    """

    first: torch.Tensor
    length: torch.Tensor
    keys: int | None = None


class Question(Protocol):
    """Something that the host has to know of a tensor on the device."""

    def ask(self) -> torch.Tensor | None:
        """The answer on the device, as a vector; None if nothing is open."""

    def answer(self, values: torch.Tensor) -> None:
        """The same vector, on the host."""


class _Local(threading.local):
    def __init__(self) -> None:
        self.step: DecodeStep | None = None
        self.open: list[ref[Question]] = []
        self.positions: tuple[ref[torch.Tensor], int | None, torch.Tensor] | None = None


_local = _Local()
_MOST_OPEN = 64  # of masks that nobody came to use


@contextlib.contextmanager
def decode_step(first: torch.Tensor, length: torch.Tensor, keys: int | None = None) -> Iterator[None]:
    """Causal self-attention inside reads its keys from ``first`` up to ``length``, whatever mask it is given.

    Nothing of it waits for the device, so a step can be captured in a CUDA graph: it is replayed after the two tensors
    were changed in place. Attention that is not causal (to an encoder), or over another number of keys than ``keys``
    (a ring of one window), is served by its mask as always.

    Args:
        first, length: int32 ``[B]``. keys: positions of the caches that this is about. See :class:`DecodeStep`.
    """
    before, _local.step = _local.step, DecodeStep(first, length, keys)
    try:
        yield
    finally:
        _local.step = before


def current_step() -> DecodeStep | None:
    """The engine's step, or None outside of one."""
    return _local.step


def enqueue(question: Question) -> None:
    """Let ``question`` be answered together with the next one that is needed."""
    if len(_local.open) >= _MOST_OPEN:
        del _local.open[: _MOST_OPEN // 2]
    _local.open.append(ref(question))


def answer_all(needed: Question) -> None:
    """Answer ``needed`` and what else is open on its device, with one wait for that device."""
    waiting = [q for q in (entry() for entry in _local.open) if q is not None and q is not needed]
    _local.open.clear()
    asked = [(q, vector) for q in [needed, *waiting] if (vector := q.ask()) is not None]
    for device in {vector.device for _, vector in asked}:
        there = [(q, vector) for q, vector in asked if vector.device == device]
        values = torch.cat([vector for _, vector in there]).cpu()
        _distribute(there, values)


def restarts(positions: torch.Tensor) -> torch.Tensor:
    """Where positions ``[B, S]`` start again from the row's first one: boolean ``[B * S]``, on the host.

    Each row begins with a start. Positions that jump to anywhere else are no packed sequences, and have no other start.
    All layers of a forward ask this of the same tensor; it waits for the device once. A tensor of inference mode does
    not count its changes, so it is read each time that it is asked for (once for each mask).
    """
    known, version = _local.positions, None if positions.is_inference() else positions._version
    if known is not None and version is not None and known[0]() is positions and known[1] == version:
        return known[2]
    first = positions[:, :1]
    starts = torch.diff(positions, dim=-1, prepend=first - 2) != 1
    elsewhere = (starts & (positions != first)).any()
    starts = starts & (~elsewhere | (torch.arange(positions.shape[1], device=positions.device) == 0))
    found = starts.flatten().cpu()
    _local.positions = (ref(positions), version, found)
    return found


def _distribute(asked: Sequence[tuple[Question, torch.Tensor]], values: torch.Tensor) -> None:
    for (question, _), part in zip(asked, values.split([v.numel() for _, v in asked]), strict=True):
        question.answer(part)
