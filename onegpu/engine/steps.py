"""What a logits processor becomes: a function of tensors whose shapes never change, with its numbers and tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor


class Text(NamedTuple):
    """The tokens so far: what transformers passes as `input_ids`, in a buffer of fixed size.

    Attributes:
        history: int64 [B, L]; row b holds `history[b, :lengths[b]]`, left padding included, and then anything.
        lengths: int64 [B].
    """

    history: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Frame:
    """The sizes that a plan is made for.

    Attributes:
        batch: rows of the step; `rows` of them are real, the others fill it up.
        vocab: width of the logits.
        max_length: the longest row there can be.
    """

    batch: int
    rows: int
    vocab: int
    max_length: int
    device: Any


@dataclass(frozen=True, eq=False)
class Step:
    """One processor.

    Attributes:
        function: ``function(scores [B, V] float32, text, **numbers, **tensors)`` returns the new scores.
        numbers: Python numbers, fixed in a captured graph.
        tensors: what another request of the same `key` may bring with other contents.
    """

    function: Callable[..., Tensor]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, scores: Tensor, text: Text) -> Tensor:
        return self.function(scores, text, **self.numbers, **self.tensors)

    @property
    def key(self) -> Hashable:
        """Equal for two steps of which one can take the other's tensors."""
        shapes = tuple((name, tuple(value.shape), value.dtype) for name, value in self.tensors.items())
        return self.function.__name__, tuple(self.numbers.items()), shapes

    def copy_from(self, other: Step) -> None:
        for name, value in self.tensors.items():
            value.copy_(other.tensors[name])


@dataclass(frozen=True)
class Unsupported:
    """A processor that must run on the host.

    Attributes:
        reason: one sentence for a report.
        processor: the object.
    """

    reason: str
    processor: Any


Translated: TypeAlias = "Step | str | None"  # a step, why there is none, or None where the processor changes nothing


def number(value: int, frame: Frame) -> Tensor:
    """int64 []."""
    import torch

    return torch.tensor(value, dtype=torch.int64, device=frame.device)


def members(ids: Iterable[int], frame: Frame) -> Tensor:
    """bool [V]: true for `ids`; ids outside the vocabulary are nobody's."""
    import torch

    found = torch.zeros(frame.vocab, dtype=torch.bool)
    found[[token for token in ids if 0 <= token < frame.vocab]] = True
    return found.to(frame.device)


def outside(ids: Iterable[int], frame: Frame) -> str | None:
    """Why `ids` cannot be used as indices: transformers' own error for them is raised on the host."""
    wrong = [token for token in ids if not 0 <= token < frame.vocab]
    return f"names token {wrong[0]} of a vocabulary of {frame.vocab}" if wrong else None
