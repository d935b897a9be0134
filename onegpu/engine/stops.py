"""What ends a row: the end-of-sequence token on the device, everything else on the host, one step late."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from onegpu.kernels.driver import copy_to_host

_SLOTS = 4  # of a ring, a power of two: two tokens are under way at most


class Readback:
    """Copies of a small device tensor to the host, in the order of :meth:`push`, without waiting for the device.

    Made, and used, in the stream that the tensor is written in. For each token this is most of what the host does.
    """

    def __init__(self, device: torch.device) -> None:
        self._free: list[_Copy] = []
        self._waiting: deque[_Copy] = deque()
        # Asked for once: asked for each token, in a profile it was a quarter of what a token costs the host.
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._raw = 0 if self._stream is None else self._stream.cuda_stream
        self._direct = self._stream is not None and torch.cuda.current_device() == self._stream.device_index

    def push(self, source: torch.Tensor, written: _Copy | None = None) -> None:
        """Take a copy of ``source`` as it is now in its stream; ``written``: the one that was written with it."""
        if written is not None:
            assert len(self._waiting) < _SLOTS - 1, "the next token would overwrite one that nobody has read"
            if written.event is not None:
                written.event.record(self._stream)
            self._waiting.append(written)
            return
        if self._stream is None:
            self._waiting.append(_Copy(source.clone(), None))
            return
        if self._free and self._direct:
            copy = self._free.pop()
            copy_to_host(copy.address, source.data_ptr(), copy.bytes, self._raw)
        else:
            if self._free:
                copy = self._free.pop()
            else:
                copy = _Copy(torch.empty(source.shape, dtype=source.dtype, pin_memory=True), torch.cuda.Event())
            # torch's own, the first time: so its allocator knows which stream has to be done before it gives the
            # pinned memory to somebody else, when a request ends with a copy under way.
            copy.tensor.copy_(source, non_blocking=True)
        copy.event.record(self._stream)
        self._waiting.append(copy)

    def pop(self) -> list[list[int]]:
        """The oldest copy, once it is there."""
        copy = self._waiting.popleft()
        if copy.event is not None:
            copy.event.synchronize()
            if not copy.lent:
                self._free.append(copy)
        rows: list[list[int]] = copy.tensor.tolist()
        return rows


class _Copy:
    """Where a copy goes, and the event behind it. lent: the place is a ring's."""

    __slots__ = ("address", "bytes", "event", "lent", "tensor")

    def __init__(self, tensor: torch.Tensor, event: Any, lent: bool = False) -> None:
        self.tensor, self.event, self.lent = tensor, event, lent
        self.address, self.bytes = tensor.data_ptr(), tensor.nbytes


class Ring:
    """Host memory that a captured choice of tokens writes to as it goes: a copy behind it would cost the device 12 µs.

    Args:
        memory: int64 [_SLOTS, 3, B], pinned where the device is a GPU.
        shown: the same, as the device sees it.
    """

    def __init__(self, memory: torch.Tensor, shown: torch.Tensor) -> None:
        self.shown, self._memory = shown, memory
        self._copies = [_Copy(slot, torch.cuda.Event() if shown.is_cuda else None, lent=True) for slot in memory]

    @classmethod
    def make(cls, out: torch.Tensor) -> Ring | None:
        """For a choice that writes to ``out``, int64 [3, B]; None if its device cannot write to the host's memory."""
        with torch.inference_mode(False):
            memory = torch.zeros(_SLOTS, *out.shape, dtype=out.dtype, pin_memory=out.is_cuda)
            shown = torch.as_tensor(_Mapped(memory), device=out.device) if out.is_cuda else memory
        if shown.data_ptr() != memory.data_ptr():
            return None  # it is a copy
        ring = cls(memory, shown)
        ring.begin(out)
        return ring

    def begin(self, out: torch.Tensor) -> None:
        """A request begins in the current stream, which torch's allocator learns by a copy: it gives the memory to
        nobody else before what is in the stream when the ring dies is done."""
        self._memory[0].copy_(out, non_blocking=True)

    def at(self, columns: int) -> _Copy:
        """The copy that is written by the choice that makes ``columns`` columns."""
        return self._copies[(columns - 1) % _SLOTS]


class _Mapped:
    """Pinned memory in the form in which torch takes memory of a GPU: addresses are the same on both sides."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory  # kept for as long as torch's view of it
        self.__cuda_array_interface__ = {
            "shape": tuple(memory.shape),
            "typestr": "<i8",
            "data": (memory.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


class Stops:
    """The stopping criteria and the streamer of a request.

    Attributes:
        eos: whether end-of-sequence tokens end a row. pads: whether an ended row is filled with the pad token.
        looks: whether the host has to see each token. brief: it has to see only whether all rows have ended, and the
            time.
    """

    def __init__(self, request: Any) -> None:
        self._rows = request.rows
        self._streamer = request.streamer
        criteria = list(request.stopping)
        self.eos = any(type(c) is EosTokenCriteria for c in criteria)
        self.pads = any(hasattr(c, "eos_token_id") for c in criteria)
        self._time = [c for c in criteria if type(c) is MaxTimeCriteria]
        limits = [c for c in criteria if type(c) is MaxLengthCriteria]
        self._limits = [c for c in limits if c.max_position_embeddings is not None]
        self._others = [c for c in criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)]
        self._pad = None if request.config._pad_token_tensor is None else int(request.config._pad_token_tensor)
        self.looks = bool(self.eos or self._time or self._others or self._streamer is not None)
        self.brief = self.looks and not (self._others or self._streamer is not None)
        self._done = torch.zeros(self._rows, dtype=torch.bool)
        self._some = False  # of them are done: without, a token costs the host half as much
        self._text: torch.Tensor | None = None
        if any(type(c) is StopStringCriteria for c in self._others):
            self._text = torch.zeros(self._rows, request.max_length + 1, dtype=torch.long)
            self._text[:, : request.columns] = request.ids.cpu()

    def __call__(
        self, out: list[list[int]], columns: int, history: torch.Tensor, scores: tuple[torch.Tensor, ...]
    ) -> tuple[bool, torch.Tensor | None]:
        """Judge one token of each row.

        Args:
            out: 3 x B numbers: tokens, finished, invalid.
            columns: tokens in ``history``, those of ``out`` the last of them.
            scores: processed scores so far, empty where nobody asked for them.

        Returns:
            whether all rows are done, and which rows a criterion on the host ended just now (None: none).
        """
        if self._others or self._time:
            newly = self._ended(columns, out[0], history, scores)
        else:
            newly = None
        if self._streamer is not None:
            self._streamer.put(self._shown(out[0]))
        if newly is not None:
            newly &= ~self._done
            self._done |= newly
            self._some = bool(self._done.any())
        if not self._some:
            return 0 not in out[1], None
        done = bool((self._done | torch.tensor(out[1], dtype=torch.bool)).all())
        return done, newly if newly is not None and bool(newly.any()) else None

    def _shown(self, tokens: list[int]) -> torch.Tensor:
        """Tokens, of rows that the host ended earlier the pad token."""
        shown = torch.tensor(tokens)
        if self._some and self.pads and self._pad is not None:
            shown.masked_fill_(self._done, self._pad)
        return shown

    def late(self) -> bool:
        """Whether the time is over."""
        return any(time.time() - c.initial_timestamp > c.max_time for c in self._time)

    def remind(self, columns: int, history: torch.Tensor) -> None:
        """Let transformers warn, as it does, once an answer leaves the model's context behind."""
        for limit in self._limits:
            if columns - 1 == limit.max_position_embeddings:
                limit(history[:, :columns], None)

    def _ended(
        self, columns: int, tokens: list[int], history: torch.Tensor, scores: tuple[torch.Tensor, ...]
    ) -> torch.Tensor | None:
        if self._text is not None:
            self._text[:, columns - 1] = self._shown(tokens)
        ended: torch.Tensor | None = None
        seen: torch.Tensor | None = None
        for criterion in self._others:
            if type(criterion) is StopStringCriteria:
                assert self._text is not None
                verdict = criterion(self._text[:, :columns], scores or None)
            else:
                if seen is None:
                    seen = history[:, :columns].contiguous()
                verdict = criterion(seen, scores or None)
            verdict = torch.as_tensor(verdict).to("cpu", torch.bool).expand(self._rows)
            ended = verdict if ended is None else ended | verdict
        if self.late():
            ended = torch.ones(self._rows, dtype=torch.bool)
        return None if ended is None else ended.clone()
