"""The loop: prefill, then a token a step, until every row is done.

Tokens come to the host one step late where the step is captured: the next one is under way by then. What stops a row
on the host (stop strings, a user's criteria, time) is applied to the token that was one too many: it is dropped, or
becomes padding, as it would have been in transformers' loop.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerationMixin

from onegpu.engine.capture import NotCapturableError
from onegpu.engine.sampling import Sampler, Unsupported
from onegpu.engine.slots import Slot
from onegpu.engine.step import Start, StaticStep
from onegpu.engine.stops import Readback, Ring, Stops
from onegpu.errors import KernelError

_WORTH_CAPTURING = 8  # steps to come

_Launch = tuple[Callable[[], None], list[torch.Tensor | None]]  # and the scores that it makes


class _Draw(NamedTuple):
    """A sampler's choice as it is launched: alone, and behind a step in the same launch, where there is that.

    ring: what it writes to for the host, if a request that the host had to look at made it.
    """

    sampler: Sampler
    ring: Ring | None
    alone: _Launch
    behind: _Launch | None


class Decoding:
    """One request, from prompt to result.

    Args:
        request: a :class:`onegpu.engine.loop.Request`.
        slot: memory that the request's cache lies in.
        static: whether to try the captured step.
    """

    def __init__(self, request: Any, slot: Slot, static: bool) -> None:
        self.request, self.slot, self.static = request, slot, static
        self.model, self.cache, self.config = request.model, request.cache, request.config
        self.rows, self.run = request.rows, request.run
        self.columns = request.columns  # tokens in ``history`` so far
        self.stops = Stops(request)
        self.scores: list[torch.Tensor] = []
        self.raw: list[torch.Tensor] = []
        self.readback = Readback(request.device)
        self.start_length = 0
        self._draw: _Draw | None = None
        self._drawn: list[torch.Tensor | None] | None = None  # the scores, where the last step chose as well
        self._next: dict[str, Any] | None = None  # the next call's arguments but for the token, where they are known
        self.keeps = request.config.return_dict_in_generate
        self.history, self.lengths = self._history()
        # Without autograd's part in every op; what outlives the call has to be an ordinary tensor.
        lasting = self.keeps or getattr(self.cache, "_is_user_defined", False) or static
        self._lighter = contextlib.nullcontext() if lasting else torch.inference_mode()

    def result(self) -> Any:
        """Run it; returns what ``generate`` returns."""
        self._prefill()
        with self.model._optimize_model_for_decode():
            step = self._known_step() if self.static else None
            self.sampler.begin(max(self.request.max_length - self.columns, 1))
            open_steps: deque[int] = deque()
            end: int | None = None
            while end is None:
                self._pick(step)
                open_steps.append(self.columns)
                last = self.columns >= self.request.max_length
                late = 0 if last or step is None else 1
                while end is None and len(open_steps) > late:
                    end = self._settle(open_steps.popleft(), step)
                if end is None and last:
                    end = self.columns
                if end is None:
                    step = self._advance(step)
        return self._finish(end, step)

    def _history(self) -> tuple[torch.Tensor, torch.Tensor]:
        slot, device = self.slot, self.request.device
        with torch.inference_mode(False):
            if slot.history is None:
                slot.history = torch.zeros(slot.batch, slot.capacity + 1, dtype=torch.long, device=device)
            if slot.lengths is None:
                slot.lengths = torch.zeros(slot.batch, dtype=torch.long, device=device)
        history, lengths = slot.history[: self.rows], slot.lengths[: self.rows]
        history[:, : self.columns] = self.request.ids
        lengths.fill_(self.columns)
        return history, lengths

    def _prefill(self) -> None:
        """Run the prompt; plan the sampler, whose tables need the vocabulary's size."""
        kwargs = self.request.kwargs
        output = self.model._prefill(self.request.ids, self.config, kwargs)
        self.kwargs = self.model._update_model_kwargs_for_generation(output, kwargs, is_encoder_decoder=False)
        self.logits = output.logits[:, -1].to(self.request.device, torch.float32, copy=True)
        del output
        eos, pad = self.config._eos_token_tensor, self.config._pad_token_tensor
        stops_at_eos = self.stops.eos
        plan = {
            "do_sample": bool(self.config.do_sample),
            "eos_token_ids": eos.flatten().tolist() if eos is not None and stops_at_eos else (),
            "pad_token_id": int(pad) if pad is not None and self.stops.pads else None,
            "batch": self.rows,
            "vocab_size": self.logits.shape[-1],
            "max_length": self.request.max_length,
            "device": self.request.device,
        }
        wants = bool(self.keeps and self.config.output_scores)
        self.host_processors = None
        sampler = Sampler.plan(self.request.processors, scores=wants, **plan)
        if isinstance(sampler, Unsupported):
            self.host_processors = self.request.processors
            sampler = Sampler.plan([], **plan)
            assert isinstance(sampler, Sampler)
        self.sampler = sampler

    def _known_step(self) -> StaticStep | None:
        """The slot's captured step, ready for this request; None if there is none that is still right."""
        step: StaticStep | None = self.slot.step
        if step is None or self.slot.fingerprint != self.request.fingerprint:
            self.slot.step = None
            return None
        start = self._start()
        if start is None:
            return None
        if step.gaps != start.gaps or (step.fused is not None and not step.fused.takes(start.mask)):
            self.slot.step = None  # made anew for this mask; a fused step takes no gaps, the model's own forward any
            return None
        step.load(start)
        step.logits[: self.rows].copy_(self.logits)
        self._capture_sampler(step)
        self.run.loop, self.run.fused = "captured", step.fused is not None
        return step

    def _start(self) -> Start | None:
        """None: the cache is not what the masks say, and only an ordinary step can tell."""
        length = self.cache.get_seq_length()
        mask = self.kwargs.get("attention_mask")
        mask = self.request.prompt.new_ones(self.rows, length) if mask is None else mask[:, :-1]
        to_come = self.request.max_length - self.columns
        if mask.shape[1] != length or length + to_come > self.slot.capacity or not self.slot.owns(self.cache):
            self.static, self.run.reason = False, "the cache is not as long as the mask"
            return None
        positions = self.kwargs.get("position_ids")
        if positions is not None and positions.ndim != 2:
            self.static, self.run.reason = False, "the model has several positions for a token"
            return None
        if positions is not None:
            positions = positions[:, -1:].expand(self.rows, 1)
        self.start_length = length
        gaps = self.kwargs.get("attention_mask") is not None and _has_gaps(mask)
        return Start(self.cache, mask, positions, gaps)

    def _pick(self, step: StaticStep | None) -> None:
        """Choose the next tokens by the logits at hand."""
        scores: torch.Tensor | None
        if self.keeps and self.config.output_logits:
            self.raw.append(self._logits(step).clone())
        if self._draw is not None:
            run, kept = self._draw.alone
            if self._drawn is None:
                run()  # it hands the tokens to the step as well
            scores = (self._drawn or kept)[0]
            self._drawn = None
        elif self.host_processors is not None:
            seen = self.history[:, : self.columns].contiguous()
            scores = self.host_processors(seen, self._logits(step).clone())
            self.sampler.step(scores, self.history, self.lengths)
        else:
            scores = self.sampler.step(self._logits(step), self.history, self.lengths)
        if step is not None and self._draw is None:
            step.input_ids[: self.rows, 0].copy_(self.sampler.out[0])
        if self.keeps and self.config.output_scores:
            assert scores is not None
            self.scores.append(scores.clone())  # they may lie in a buffer of the next step
        self.columns += 1
        self.stops.remind(self.columns, self.history)
        if self.stops.looks:
            ring = None if self._draw is None else self._draw.ring
            self.readback.push(self.sampler.out, None if ring is None else ring.at(self.columns))

    def _logits(self, step: StaticStep | None) -> torch.Tensor:
        return self.logits if step is None else step.logits[: self.rows]

    def _advance(self, step: StaticStep | None) -> StaticStep | None:
        """Run the model on the tokens chosen last."""
        self.run.steps += 1
        if step is not None:
            if self._draw is not None and self._draw.behind is not None:
                run, self._drawn = self._draw.behind  # one launch: the device idles between two of them
                run()
            else:
                step()
            return step
        inputs = self._inputs()
        made: tuple[StaticStep, Start] | None = None
        if self.static and self.request.max_length - self.columns >= _WORTH_CAPTURING:
            made = self._make_step(inputs)
        with self._lighter:
            output = self.model(**inputs, return_dict=True)
        self._count(output, inputs)
        self.logits = output.logits[:, -1].to(self.request.device, torch.float32)
        return None if made is None else self._check_step(*made)

    def _inputs(self) -> dict[str, Any]:
        """What the model is called with for the token chosen last."""
        if self._next is not None:
            return {**self._next, "input_ids": self.sampler.out[0][:, None].clone()}
        seen = self.history[:, : self.columns]
        inputs: dict[str, Any] = self.model.prepare_inputs_for_generation(seen, next_sequence_length=1, **self.kwargs)
        return inputs

    def _count(self, output: Any, inputs: dict[str, Any]) -> None:
        """Lengthen mask and positions: by hand where transformers' preparation does no more than that."""
        if self._next is None:
            self.kwargs = self.model._update_model_kwargs_for_generation(output, self.kwargs, is_encoder_decoder=False)
            tensors = {name for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            mask, positions = (self.kwargs.get(name) for name in ("attention_mask", "position_ids"))
            if not _plainly_prepared(self.model) or tensors - {"input_ids", "attention_mask", "position_ids"}:
                return
            if positions is not None and positions.ndim != 2:
                return
            self._next = {**inputs, "attention_mask": mask}
            if positions is not None:
                self._next["position_ids"] = positions[:, -1:]
            return
        if (mask := self._next.get("attention_mask")) is not None:
            self._next["attention_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=-1)
        if (positions := self._next.get("position_ids")) is not None:
            self._next["position_ids"] = positions + 1

    def _make_step(self, inputs: dict[str, Any]) -> tuple[StaticStep, Start] | None:
        """Capture the step that comes next; None, with the reason noted, if that cannot be done."""
        began, fuse = time.perf_counter(), self.request.engine.fuse
        try:
            start = self._start()
            if start is None:
                return None
            with torch.inference_mode(False):
                logits = self.logits.new_zeros(self.slot.batch, self.logits.shape[-1])
            captured = self.request.device.type == "cuda"
            step = StaticStep(self.model, self.slot, inputs, start, logits, captured, fuse)
        except (NotCapturableError, KernelError) as error:
            if fuse:
                self.request.engine.fuse = False  # a compiler is missing, say; the model's own forward is tried next
            elif isinstance(error, KernelError):
                raise
            else:
                self._refuse(str(error))
            return None
        finally:
            self.run.capture_s += time.perf_counter() - began
        return step, start

    def _refuse(self, reason: str) -> None:
        self.static, self.run.reason = False, reason
        self.request.engine.refusals[self.request.fingerprint] = reason

    def _check_step(self, step: StaticStep, start: Start) -> StaticStep | None:
        """Compare a new step with the ordinary one that was just made: a model may have kept a number on the host."""
        began, expected = time.perf_counter(), self.logits
        newest = [t[:, :, start.length] for pair in self.slot.full if pair is not None for t in pair]
        ordinary = [t.clone() for t in newest]
        step.load(start)
        step.input_ids[: self.rows, 0].copy_(self.sampler.out[0])
        got = step()[: self.rows]
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 5e-2
        spread = expected.amax() - expected.amin()
        right = (got - expected).abs().amax() <= tolerance * spread.clamp(min=1e-3)  # not so for NaN
        if bool(~right & expected.isfinite().all()):
            for memory, kept in zip(newest, ordinary, strict=True):
                memory.copy_(kept)
            if step.fused is not None:
                self.request.engine.fuse = False  # the next step is the model's own
                return None
            self._refuse("the captured step's logits are not those of an ordinary step")
            return None
        step.logits[: self.rows].copy_(expected)
        self.slot.step, self.slot.fingerprint = step, self.request.fingerprint
        self._capture_sampler(step)
        step.release()
        self.run.loop, self.run.reason, self.run.fused = "captured", None, step.fused is not None
        self.run.capture_s += time.perf_counter() - began
        return step

    def _capture_sampler(self, step: StaticStep) -> None:
        """Give the sampler a graph over the step's logits, or take an earlier one that does the same."""
        if self.host_processors is not None:
            return
        sampler, rows, history, lengths = self.sampler, self.rows, self.history, self.lengths
        self._draw = step.samplers.get(sampler.key)
        if self._draw is not None:
            self._draw.sampler.copy_from(sampler)
            self.sampler = self._draw.sampler
            if self._draw.ring is not None:
                self._draw.ring.begin(self.sampler.out)
            return
        if rows == self.slot.batch:
            sampler.out = step.chosen.copy_(sampler.out)
        ring = Ring.make(sampler.out) if self.stops.looks else None
        sampler.shown = None if ring is None else ring.shown
        sampler.rehearse(step.logits[:rows], history, lengths)
        generators = () if sampler.generator is None else (sampler.generator,)

        def launch(behind: bool) -> _Launch:
            kept: list[torch.Tensor | None] = [None]

            def run() -> None:
                kept[0] = sampler.step(step.logits[:rows], history, lengths)
                if sampler.out is not step.chosen:
                    step.input_ids[:rows, 0].copy_(sampler.out[0])

            return step.capture(run, generators, behind), kept

        self._draw = _Draw(sampler, ring, launch(False), launch(True) if step.again else None)
        step.samplers[sampler.key] = self._draw

    def _settle(self, columns: int, step: StaticStep | None) -> int | None:
        """Look at the tokens of the step that made ``columns`` columns; returns ``columns`` if it was the last."""
        if not self.stops.looks:
            return None
        out = self.readback.pop()
        if any(out[2]):
            self.sampler.raise_if_invalid(torch.tensor(out))
        if self.stops.brief:
            return None if 0 in out[1] and not self.stops.late() else columns
        done, newly = self.stops(out, columns, self.history, tuple(self.scores[: columns - self.request.columns]))
        if done:
            return columns
        if newly is not None and self.stops.pads:
            self.sampler.out[1].masked_fill_(newly.to(self.request.device), 1)
            if self.columns > columns:  # the token under way is one too many for these rows
                late = self.history[:, columns : self.columns]
                late.masked_fill_(newly.to(late.device)[:, None], int(self.config._pad_token_tensor))
                if step is not None:
                    step.input_ids[: self.rows, 0].copy_(late[:, -1])
        return None

    def _finish(self, end: int, step: StaticStep | None) -> Any:
        made = end - self.request.columns
        self.sampler.end(made)
        if self.config.do_sample and not self.stops.looks:
            self.sampler.raise_if_invalid(self.sampler.out.cpu())
        if step is not None:
            length = self.start_length + made - 1
            step.finish(self.cache, length, self.rows)
        if self.request.streamer is not None:
            self.request.streamer.end()
        sequences = self.history[:, :end].clone()
        sequences[:, : self.request.columns] = self.request.prompt
        if not self.keeps:
            return sequences
        fields: dict[str, Any] = {"sequences": sequences, "past_key_values": self.cache}
        fields["scores"] = tuple(self.scores[:made]) if self.config.output_scores else None
        fields["logits"] = tuple(self.raw[:made]) if self.config.output_logits else None
        return GenerateDecoderOnlyOutput(**fields)


def _has_gaps(mask: torch.Tensor) -> bool:
    """Whether a row of [B, n] has padding behind its first real token."""
    real = mask.to(torch.int32)
    count = real.sum(1)
    return bool(((count != mask.shape[1] - real.argmax(1)) & (count > 0)).any())


def _plainly_prepared(model: Any) -> bool:
    """Whether ``prepare_inputs_for_generation`` is transformers' general one."""
    name = "prepare_inputs_for_generation"
    return getattr(type(model), name) is getattr(GenerationMixin, name) and name not in model.__dict__
