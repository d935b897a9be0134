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
from onegpu.engine.warpers import split
from onegpu.errors import SamplingError
from onegpu.kernels.next_token import Shape, State, take, take_candidates

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Sampler", "Unsupported"]

_default_generator_lock = threading.Lock()


class Sampler:
    """What stands between a step's logits and its tokens; made by `plan`.

    Attributes:
        key: a graph that captured one sampler serves another with the same key, after `copy_from`.
        generator: on a GPU, when sampling: to be registered with the graph before capture. Else None.
        out: int64 [3, B], updated in place by each step, to be copied to the host in one piece:
            the token; 1 once the row is finished (the host may write a 1 here, too, between steps);
            1 once a probability was NaN (see `raise_if_invalid`).
        shown: None, or a ring of copies of `out`, which each step adds to: see `onegpu.kernels.next_token.State`.
    """

    def __init__(
        self, steps: list[Step], frame: Frame, eos: Tensor, pad: Tensor | None, *, do_sample: bool, scores: bool
    ) -> None:
        import torch

        self.generator: torch.Generator | None = None
        self.out = torch.zeros(3, frame.batch, dtype=torch.int64, device=frame.device)
        self.shown: Tensor | None = None
        self._steps, self._rows, self._eos, self._pad = steps, frame.rows, eos, pad
        self._do_sample, self._scores = do_sample, scores
        # Before this point transformers' scores are computed; the shape is part of drawing a token from them.
        whole = scores or not do_sample
        self._before, self._shape, self._candidates = (steps, Shape(), 0) if whole else split(steps, frame.vocab)
        # One number a token, so that the same one is drawn among all and among candidates.
        self._noise = torch.empty(frame.batch, frame.vocab, device=frame.device) if do_sample else None
        self._start = self._reserved = self._advance = 0
        if do_sample and frame.device.type == "cuda":
            self.generator = torch.Generator(frame.device)
            self._draw()
            self._advance = self.generator.get_offset()
        self.key: Hashable = (
            (frame.batch, frame.vocab, str(frame.device), do_sample, scores, pad is None, len(eos)),
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
        with torch.inference_mode(False):  # else a later request without inference mode could not write to the tensors
            steps = translate_all(processors, frame)
            if isinstance(steps, Unsupported):
                return steps
            eos = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
            pad = None if pad_token_id is None else torch.tensor(pad_token_id, dtype=torch.int64, device=device)
            return cls(steps, frame, eos, pad, do_sample=do_sample, scores=scores)

    def copy_from(self, other: Sampler) -> None:
        """Takes over a sampler with the same `key`, and its place in a request, in the memory that a graph captured."""
        assert self.key == other.key
        for mine, its in zip(self._steps, other._steps, strict=True):
            mine.copy_from(its)
        self._rows, self._start, self._reserved = other._rows, other._start, other._reserved
        self.out.copy_(other.out)
        if self.generator is not None and other.generator is not None:
            self.generator.set_state(other.generator.get_state())
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
        self.out[1, self._rows :].fill_(1)
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
        import torch

        scores = logits
        if self._before or self._scores:
            scores = logits.to(torch.float32, copy=self._scores)
        for step in self._before:
            scores = step(scores, Text(history, lengths))
        state = State(self._eos, self._pad, self.out, history, lengths, self.shown)
        if self._candidates:
            values, ids = torch.topk(scores, self._candidates, dim=-1, sorted=False)
            take_candidates(values, ids, self._draw(), self._shape, state)
        else:
            take(scores, self._draw() if self._do_sample else None, self._shape.temperature, state)
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

    def _draw(self) -> Tensor:
        assert self._noise is not None
        return self._noise.exponential_(1, generator=self.generator)


def _default_generator(device: Any) -> Any:
    import torch

    return torch.cuda.default_generators[device.index]
