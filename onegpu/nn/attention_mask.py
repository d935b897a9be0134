"""An attention mask that is a rule instead of a matrix: causality, a window, padding, packed sequences.

It stands in for transformers' boolean mask ``[B, 1, S_q, S_k]`` (True: seen) and has its shape, dtype and device. Our
attention reads the rule; whatever else is done with it (slicing, ``torch.where``, …) is done with the matrix, made when
first asked for. So a model may treat its mask as it likes, and memory stays linear in the sequence length in those
that just pass it on. It lives as long as a checkpointed layer keeps its arguments, and is read once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from onegpu.errors import bad_argument
from onegpu.nn.attention_context import answer_all, enqueue, restarts

# With scores, where True stands for what is seen, none of these is right.
_ARITHMETIC = ("add", "sub", "rsub", "mul", "baddbmm", "masked_fill")
_CASTS = ("_to_copy", "detach", "alias")


@dataclass(frozen=True)
class Rule:
    """Query at position i sees the key at position j.

    causal: only if j <= i. left, right: only if ``i - left <= j <= i + right`` (-1: no limit). sequences: only if both
    have the same number in this ``[B, S]`` tensor, in which numbers never fall along a row. padding: only where this
    boolean ``[B, S]`` is True for j. q_offset, k_offset: positions of the first query and the first key; integers, or
    tensors of one where a static cache counts on the device.
    """

    causal: bool = False
    left: int = -1
    right: int = -1
    sequences: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    q_offset: Any = 0
    k_offset: Any = 0


class Plan(NamedTuple):
    """A rule in the arguments of :func:`onegpu.kernels.attention.attention`.

    keys: how many of the keys there are (None: all). The others as there.
    """

    causal: bool = False
    window: tuple[int, int] | None = None
    keys: int | None = None
    q_range: torch.Tensor | None = None
    k_range: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int = 0


class AttentionMask(torch.Tensor):
    """Boolean ``[B, 1, S_q, S_k]`` by a :class:`Rule`.

    Args:
        rule: what it says.
        shape: (B, S_q, S_k).
        matrix: makes the boolean tensor.
    """

    rule: Rule
    matrix: Callable[[], torch.Tensor]
    _reading: tuple[Plan | None] | None  # the plan, once it was read
    _bounds: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    _considered: bool

    @staticmethod
    def __new__(
        cls: Any, rule: Rule, shape: tuple[int, int, int], matrix: Callable[[], torch.Tensor], device: torch.device
    ) -> AttentionMask:
        batch, queries, keys = shape
        mask: AttentionMask = torch.Tensor._make_wrapper_subclass(
            cls, (batch, 1, queries, keys), dtype=torch.bool, device=device
        )
        mask.rule, mask.matrix = rule, matrix
        mask._reading, mask._considered = None, False
        if _open(rule) and not _capturing(device):
            enqueue(mask)
        return mask

    def __init__(self, *_: Any) -> None:
        super().__init__()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        name, kwargs = func.overloadpacket.__name__.rstrip("_"), kwargs or {}
        if name in _CASTS and kwargs.get("dtype") in (None, torch.bool):
            return args[0]._moved(kwargs.get("device"))
        if name in _ARITHMETIC and any(isinstance(a, torch.Tensor) and a.is_floating_point() for a in args):
            raise bad_argument(
                "attn_implementation",
                "onegpu",
                "is set for a model that applies masks to its scores by itself instead of calling the attention named",
                "load it without, or call onegpu.optimize(model), which changes what it can",
            )
        args, kwargs = tree_map_only(cls, lambda mask: mask.dense(), (args, kwargs))
        return func(*args, **kwargs)

    def consider(self, positions: torch.Tensor) -> None:
        """Take positions ``[B or 1, S]`` that start again as packed sequences, where the mask says nothing of it.

        Not in a graph that is being captured: the positions cannot be read there.
        """
        rule, (batch, _, queries, keys) = self.rule, self.shape
        first = type(rule.q_offset) is int and rule.q_offset == rule.k_offset == 0 and 1 < queries == keys
        plain = rule.causal and rule.sequences is None and rule.padding is None and first
        if self._considered or not plain or positions.shape not in ((batch, keys), (1, keys)):
            return
        if _capturing(self.device) or torch.compiler.is_compiling():
            return
        self._considered, starts = True, restarts(positions)
        if starts.sum() == positions.shape[0]:
            return
        numbers = starts.view(positions.shape).cumsum(-1).expand(batch, keys).to(self.device)
        self.rule, self._reading = replace(rule, sequences=numbers), (_packed(rule, starts, batch * keys, self.device),)
        causal = self.matrix
        self.matrix = lambda: causal() & (numbers[:, None, :, None] == numbers[:, None, None, :])

    def _moved(self, device: torch.device | None) -> AttentionMask:
        """The same mask, another object, on ``device``. It is read before it leaves: each layer there asks for it."""
        device = self.device if device is None else torch.device(device)
        if device != self.device:
            self.plan()
        (batch, _, queries, keys), source = self.shape, self
        rule = replace(self.rule, **_on(device, vars(self.rule)))
        moved = AttentionMask(rule, (batch, queries, keys), lambda: source.dense().to(device), device)
        moved._considered = self._considered
        if self._reading is not None:
            plan = self._reading[0]
            moved._reading = (None if plan is None else plan._replace(**_on(device, plan._asdict())),)
        return moved

    def dense(self) -> torch.Tensor:
        """The matrix, ``[B, 1, S_q, S_k]``."""
        made = self.__dict__.get("_dense")
        if made is None:
            made = self.__dict__["_dense"] = self.matrix()
        return made

    def plan(self) -> Plan | None:
        """The rule for the kernel; None where it takes the matrix. Waits for the device at most once."""
        if self._reading is None and _open(self.rule):
            if _capturing(self.device):
                return None  # nothing can be read there: the matrix needs no reading
            answer_all(self)
        if self._reading is None:
            self._reading = (_settled(self.rule, self.shape),)
        return self._reading[0]

    def ask(self) -> torch.Tensor | None:
        """See :class:`onegpu.nn.attention_context.Question`."""
        if self._reading is not None:
            return None
        if self.rule.sequences is not None:
            return _starts(self.rule.sequences).flatten()
        self._bounds = _bounds(_real(self.rule, self.shape[-1]))
        _, length, gaps = self._bounds
        return torch.stack([gaps.any(), (length < self.shape[-1]).any()])

    def answer(self, values: torch.Tensor) -> None:
        """See :class:`onegpu.nn.attention_context.Question`."""
        rule = self.rule
        if rule.sequences is not None:
            self._reading = (_packed(rule, values, self.shape[0] * self.shape[2], self.device),)
            return
        gaps, padded = values.tolist()
        if gaps:
            self._reading = (None,)
        elif not padded:
            self._reading = (_settled(replace(rule, padding=None), self.shape),)
        else:
            self._reading = (_padded(rule, self._bounds[0], self._bounds[1], self.shape),)


def matrix(rule: Rule, shape: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """``rule`` as a boolean ``[B, 1, S_q, S_k]``, from :class:`Rule`'s definition."""
    batch, queries, keys = shape
    i = (torch.arange(queries, device=device) + rule.q_offset)[:, None]
    j = torch.arange(keys, device=device) + rule.k_offset
    seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=device)
    if rule.causal:
        seen &= j <= i
    if rule.left >= 0:
        seen &= j >= i - rule.left
    if rule.right >= 0:
        seen &= j <= i + rule.right
    if rule.sequences is not None:
        seen &= (rule.sequences[:, :, None] == rule.sequences[:, None, :])[:, None]
    if rule.padding is not None:
        seen &= _real(rule, keys)[:, None, None]
    return seen


def _real(rule: Rule, keys: int) -> torch.Tensor:
    """``[B, S_k]``: which keys are real. The 2-D mask begins at position 0, and ends where real keys end."""
    assert rule.padding is not None
    padding = rule.padding[:, rule.k_offset : rule.k_offset + keys]
    return torch.nn.functional.pad(padding, (0, keys - padding.shape[-1]))


def _on(device: torch.device, fields: dict[str, Any]) -> dict[str, Any]:
    """The tensors among these, on ``device``."""
    return {name: value.to(device) for name, value in fields.items() if isinstance(value, torch.Tensor)}


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _open(rule: Rule) -> bool:
    return rule.sequences is not None or rule.padding is not None


def _window(rule: Rule) -> tuple[int, int] | None:
    return None if rule.left < 0 and rule.right < 0 else (rule.left, rule.right)


def _settled(rule: Rule, shape: torch.Size) -> Plan | None:
    """The plan of a rule without padding."""
    batch, _, queries, keys = shape
    plan = Plan(rule.causal, _window(rule))
    if not rule.causal:
        # The kernel aligns the last query with the last key.
        same = isinstance(rule.q_offset, int) and rule.q_offset - rule.k_offset == keys - queries
        return plan if plan.window is None or same else None
    end = rule.q_offset + queries - rule.k_offset  # of the keys that the last query sees
    if isinstance(end, int):
        return plan._replace(keys=None if end == keys else end) if end <= keys else None
    ends = end.reshape(1).expand(batch)
    return plan._replace(k_range=_range(torch.zeros_like(ends), ends))


def _padded(rule: Rule, first: torch.Tensor, length: torch.Tensor, shape: torch.Size) -> Plan | None:
    """The plan of a rule whose padding lies outside ``first <= j < first + length`` in each row."""
    queries, keys = shape[-2:]
    plan = Plan(rule.causal, _window(rule))
    if not rule.causal:
        same = isinstance(rule.q_offset, int) and rule.q_offset - rule.k_offset == keys - queries
        # The keys of an encoder may belong to other queries than its own: all queries are kept. A window counts from
        # their positions, which ranges of keys alone would shift.
        if plan.window is not None:
            return plan._replace(q_range=_range(first, length), k_range=_range(first, length)) if same else None
        return plan._replace(k_range=_range(first, length))
    shift = rule.q_offset - rule.k_offset  # of the query at a position against the key at that position
    end = torch.minimum(first + length, torch.as_tensor(shift + queries, device=first.device))
    q_first = (first - shift).clamp(0, queries)
    q_end = (end - shift).clamp(0, queries)
    return plan._replace(
        q_range=_range(q_first, (q_end - q_first).clamp(min=0)), k_range=_range(first, (end - first).clamp(min=0))
    )


def _range(first: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    return torch.stack([first, length], dim=1).to(torch.int32)


def _bounds(padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(first, length, gaps), ``[B]`` each: where the real ones of a row begin, how many they are, and if others lie
    between them."""
    real = padding.to(torch.int32)
    first, length = real.argmax(-1), real.sum(-1)
    last = padding.shape[-1] - real.flip(-1).argmax(-1)
    return first, length, (last - first != length) & (length > 0)


def _starts(sequences: torch.Tensor) -> torch.Tensor:
    """Boolean ``[B, S]``: where a sequence begins; none goes over the end of a row."""
    return torch.diff(sequences, dim=-1, prepend=sequences[:, :1] - 1) != 0


def _packed(rule: Rule, starts: torch.Tensor, tokens: int, device: torch.device) -> Plan:
    """starts: on the host, where sequences begin in the rows one after the other, or in one row that all are like."""
    starts = starts.repeat(tokens // max(starts.numel(), 1))
    ends = torch.cat([starts.nonzero().flatten(), torch.tensor([tokens])])
    longest = int(ends.diff().max()) if ends.numel() > 1 else 0
    return Plan(rule.causal, _window(rule), cu_seqlens=ends.to(device, torch.int32), max_seqlen=longest)
