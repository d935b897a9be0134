"""Logits in, the next token out, within a captured step: no host, no shape that depends on data, all state in place.

**Random numbers.** A token is drawn as ``argmax(p / q)`` with q from the exponential distribution, which is how
`torch.multinomial` draws one; so the same state of the generator gives the same token. On the CPU the numbers come from
torch's default generator. On a GPU each sampler has a generator of its own, because graphs that share one would
overwrite each other's place in the stream; it takes up the default generator's stream where `begin` finds it. Either
way `torch.manual_seed(s)` before `generate` gives the same text again, and where the logits are transformers' the text
is too (on a GPU only for a batch without rows that fill it up: the numbers are spread over all rows).
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from onegpu.engine.processors import translate_all
from onegpu.engine.steps import Frame, Step, Text, Unsupported
from onegpu.errors import SamplingError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Sampler", "Unsupported"]

_MOST_CANDIDATES = 4096  # behind a longer top-k, sorting them is no quicker than sorting the vocabulary
_default_generator_lock = threading.Lock()


class Sampler:
    """What stands between a step's logits and its tokens; made by `plan`.

    Attributes:
        key: a graph that captured one sampler serves another with the same key, after `copy_from`.
        generator: on a GPU, when sampling: to be registered with the graph before capture. Else None.
        out: int64 [3, B], updated in place by each step, to be copied to the host in one piece:
            the token; 1 once the row is finished (the host may write a 1 here, too, between steps);
            1 once a probability was NaN (see `raise_if_invalid`).
    """

    def __init__(
        self, steps: list[Step], frame: Frame, eos: Tensor, pad: Tensor | None, *, do_sample: bool, scores: bool
    ) -> None:
        import torch

        self.generator: torch.Generator | None = None
        self.out = torch.zeros(3, frame.batch, dtype=torch.int64, device=frame.device)
        self._steps, self._frame, self._eos, self._pad = steps, frame, eos, pad
        self._do_sample, self._scores = do_sample, scores
        self._narrow_from = None if scores or not do_sample else _narrow_from(steps, frame.vocab)
        # The same tokens are chosen among all and among candidates: each id has its own random number.
        self._noise = torch.empty(frame.batch, frame.vocab, device=frame.device) if do_sample else None
        self._start = self._reserved = self._advance = 0
        if do_sample and frame.device.type == "cuda":
            self.generator = torch.Generator(frame.device)
            self._draw()
            self._advance = self.generator.get_offset()
        self.key: Hashable = (
            (frame.batch, frame.rows, frame.vocab, str(frame.device), do_sample, scores, pad is None, len(eos)),
            tuple(step.key for step in steps),
        )

    @classmethod
    def plan(
        cls,
        processors: Iterable[Any],
        *,
        do_sample: bool,
        eos_token_ids: Sequence[int],
        pad_token_id: int | None,
        batch: int,
        vocab_size: int,
        max_length: int,
        device: Any,
        rows: int | None = None,
        scores: bool = False,
    ) -> Sampler | Unsupported:
        """A sampler that does what `processors` and then transformers' own loop would do.

        Args:
            processors: the `LogitsProcessorList` as transformers prepared it.
            do_sample: whether to draw; else the highest score is taken.
            eos_token_ids: tokens that finish a row.
            pad_token_id: what a finished row gets; None leaves its tokens as they come.
            batch: rows of a step.
            vocab_size: width of the logits.
            max_length: the longest a row gets, prompt included.
            device: where the logits are.
            rows: how many of the rows are real; the rest begin finished. None: all.
            scores: whether `step` returns the processed scores.

        Returns:
            the sampler, or `Unsupported` if one of the processors has to run on the host.
        """
        import torch

        rows = batch if rows is None else rows
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        frame = Frame(batch, rows, vocab_size, max_length, device)
        steps = translate_all(processors, frame)
        if isinstance(steps, Unsupported):
            return steps
        eos = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
        pad = None if pad_token_id is None else torch.tensor(pad_token_id, dtype=torch.int64, device=device)
        return cls(steps, frame, eos, pad, do_sample=do_sample, scores=scores)

    def copy_from(self, other: Sampler) -> None:
        """Takes over the values of a sampler with the same `key`, in the memory that a graph has captured."""
        assert self.key == other.key
        for mine, its in zip(self._steps, other._steps, strict=True):
            mine.copy_from(its)
        self._eos.copy_(other._eos)
        if self._pad is not None and other._pad is not None:
            self._pad.copy_(other._pad)

    def begin(self, max_steps: int) -> None:
        """Starts a request: no row is finished but those that fill up the batch.

        Args:
            max_steps: how many steps there can be. On a GPU so much of the default generator's stream is reserved, so
                that no other thread uses the same numbers; `end` gives back the rest.
        """
        self.out.zero_()
        self.out[1, self._frame.rows :].fill_(1)
        if self.generator is None:
            return
        default = _default_generator(self.generator.device)
        with _default_generator_lock:
            self._start = default.get_offset()
            self._reserved = self._start + max_steps * self._advance
            self.generator.manual_seed(default.initial_seed())
            self.generator.set_offset(self._start)
            default.set_offset(self._reserved)

    def end(self, steps: int) -> None:
        """Ends a request of which `steps` steps counted: what comes next draws what it would behind transformers' loop.

        If something else has drawn from the default generator since `begin`, it is left where it is.
        """
        if self.generator is None:
            return
        default = _default_generator(self.generator.device)
        with _default_generator_lock:
            if default.get_offset() == self._reserved and default.initial_seed() == self.generator.initial_seed():
                default.set_offset(self._start + steps * self._advance)

    def rehearse(self, logits: Tensor, history: Tensor, lengths: Tensor) -> None:
        """Runs a step that leaves no trace: what a kernel's first call loads or allocates, before a capture."""
        import torch

        generator = self.generator or torch.default_generator
        state, out = generator.get_state(), self.out.clone()
        self.step(logits, history.clone(), lengths.clone())
        self.out.copy_(out)
        generator.set_state(state)

    def step(self, logits: Tensor, history: Tensor, lengths: Tensor) -> Tensor | None:
        """Chooses the next token of each row and writes it to `out`, `history` and `lengths`.

        Args:
            logits: [B, V], of any float dtype; not changed.
            history: int64 [B, L], L > max_length. ``history[b, :lengths[b]]`` is what transformers would have as
                ``input_ids[b]``, left padding included. The token is written behind it.
            lengths: int64 [B]; 1 is added to each, finished rows too (they get the pad token, as in transformers).

        Returns:
            float32 [B, V], the scores behind all processors, if the plan asked for them.
        """
        text = Text(history, lengths)
        scores = None
        if self._narrow_from is not None:
            token = self._among_candidates(logits, text, self._narrow_from)
        elif not (self._steps or self._do_sample or self._scores):
            token = logits.argmax(dim=-1)  # of the 16-bit numbers: making them float32 changes no order
        else:
            scores = logits.float()
            for step in self._steps:
                scores = step(scores, text)
            token = self._choose(scores)
        self._record(token, text)
        return scores if self._scores else None

    def raise_if_invalid(self, out: Tensor) -> None:
        """Raises what `torch.multinomial` raises, for a copy of `out` on the host.

        Raises:
            SamplingError: a probability was NaN (also a `RuntimeError`).
        """
        if out[2].any():
            rows = ", ".join(map(str, out[2].nonzero().flatten().tolist()))
            fix = "Check the weights and the dtype (float16 overflows early), or pass remove_invalid_values=True."
            raise SamplingError(f"the probability tensor contains inf or nan in batch row {rows}. {fix}")

    def _choose(self, scores: Tensor) -> Tensor:
        if not self._do_sample:
            return scores.argmax(dim=-1)
        return self._race(scores, self._draw())

    def _among_candidates(self, logits: Tensor, text: Text, first: int) -> Tensor:
        """The steps from `first` on, and the choice, on the few highest scores only."""
        import torch

        scores = logits if first == 0 else logits.float()
        for step in self._steps[:first]:
            scores = step(scores, text)
        count = _candidates(self._steps[first:], self._frame.vocab)
        assert count is not None
        values, ids = torch.topk(scores, count, dim=-1, sorted=False)
        # Ascending, and among equals in the order of their ids: as a stable sort of the whole row would have them.
        ids, order = ids.sort(dim=-1)
        values, order = values.gather(1, order).float().sort(dim=-1, stable=True)
        ids = ids.gather(1, order)
        for step in self._steps[first:]:
            assert step.narrow is not None
            values = step.narrow(values, **step.numbers)
        return ids.gather(1, self._race(values, self._draw().gather(1, ids))[:, None])[:, 0]

    def _race(self, scores: Tensor, noise: Tensor) -> Tensor:
        probabilities = scores.softmax(dim=-1)
        self.out[2].logical_or_(probabilities[:, 0].isnan())  # one NaN makes the whole row NaN
        return probabilities.div_(noise).argmax(dim=-1)

    def _draw(self) -> Tensor:
        assert self._noise is not None
        return self._noise.exponential_(1, generator=self.generator)

    def _record(self, token: Tensor, text: Text) -> None:
        import torch

        tokens, finished, _ = self.out
        if self._pad is not None:
            token = torch.where(finished != 0, self._pad, token)
        tokens.copy_(token)
        if len(self._eos):
            finished.logical_or_((token[:, None] == self._eos).any(dim=1))
        # A step may run past the end before the host has seen it: the last column takes that token.
        place = text.lengths.clamp(max=text.history.shape[1] - 1)
        text.history.scatter_(1, place[:, None], token[:, None])
        text.lengths.add_(1)


def _narrow_from(steps: list[Step], vocab: int) -> int | None:
    """The step from which on candidates are enough: the first of a run up to the end that has a top-k in it.

    Before the top-k itself only a temperature may stand in the run, which keeps the order of the scores.
    """
    first = len(steps)
    while first and steps[first - 1].narrow is not None:
        first -= 1
    for number in range(first, len(steps)):
        if "top_k" in steps[number].numbers:
            before = number
            while before > first and "temperature" in steps[before - 1].numbers:
                before -= 1
            return before if _candidates(steps[before:], vocab) is not None else None
    return None


def _candidates(steps: list[Step], vocab: int) -> int | None:
    """How many of the highest scores the steps need: twice the top-k, because scores may be equal to the last of it.

    Beyond that, equals are dropped: where hundreds of scores are all the k-th highest, k and some are kept. None where
    that is no shortcut.
    """
    top_k = next(int(step.numbers["top_k"]) for step in steps if "top_k" in step.numbers)
    count = max(2 * top_k, 128)
    return count if count <= min(_MOST_CANDIDATES, vocab // 2) else None


def _default_generator(device: Any) -> Any:
    import torch

    return torch.cuda.default_generators[device.index]
