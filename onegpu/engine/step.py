"""One decoding step over a slot's memory, with nothing in it that changes from token to token but values on the device.

So it can be captured once and replayed for every token: positions, masks and the token itself are read from tensors
that the step itself moves on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from onegpu.engine.cache import Pair, StepCache, StepLayer, fill_ring, read_ring
from onegpu.engine.capture import Graph, NotCapturableError, Plain
from onegpu.engine.fused_step import Fused
from onegpu.engine.slots import Slot
from onegpu.nn.attention_context import decode_step

_PASSED_ON = (bool, int, float, str, type(None))  # arguments of a forward that are the same for every token


class Start:
    """Where decoding begins: what the prefill left.

    Attributes:
        length: positions in the cache. mask: int64 or bool [B, length], real tokens. position_ids: [B, 1] of the next
        token. sliding: each sliding layer and its content. rows: B. gaps: whether padding stands between real tokens.
    """

    def __init__(self, cache: Any, mask: torch.Tensor, position_ids: torch.Tensor | None, gaps: bool) -> None:
        self.gaps = gaps
        self.rows, self.length = mask.shape
        self.mask, self.position_ids = mask, position_ids
        self.sliding: dict[int, tuple[Any, Any, Any, int]] = {
            index: (layer, layer.keys, layer.values, layer.cumulative_length)
            for index, layer in enumerate(cache.layers)
            if isinstance(layer, DynamicSlidingWindowLayer)
        }


class StaticStep:
    """A step of ``model`` over ``slot``'s memory.

    Args:
        inputs: what transformers would call the model with for one token: its tensors are replaced by static ones.
        start: where the first request over this memory begins.
        logits: float32 [B, V], for the result.
        captured: as a CUDA graph; else the same function runs each time (tests on the CPU).
        fuse: take the fused step where the model and the masks have one.

    Attributes:
        input_ids: int64 [B, 1]: write the token here. logits: read here.
        chosen: int64 [3, B]: what a sampler of B rows may take as its `out`, which writes the token there.
        fused: the fused step, or None: the model's own forward runs.
        samplers: captured samplers over ``logits``, by their key.

    Raises:
        NotCapturableError: with the reason.
    """

    def __init__(
        self,
        model: Any,
        slot: Slot,
        inputs: dict[str, Any],
        start: Start,
        logits: torch.Tensor,
        captured: bool,
        fuse: bool = False,
    ) -> None:
        self.slot, self.gaps = slot, start.gaps
        device = inputs["input_ids"].device
        self.device = device
        with torch.inference_mode(False):
            self.chosen = torch.zeros(3, slot.batch, dtype=torch.long, device=device)
            self.input_ids = self.chosen[0, :, None]
            # Of the cache, and from 16 bytes on, as kernels like it, of each row's text: one launch moves all on.
            self._places = torch.zeros(2 + slot.batch, dtype=torch.long, device=device)
            self.position = self._places[:1]
            self._slots: dict[int, torch.Tensor] = {}  # ring length -> position % length
            self.position_ids = None
            if inputs.get("position_ids") is not None:
                if inputs["position_ids"].ndim != 2:
                    raise NotCapturableError("the model has several positions for a token")
                self.position_ids = self._places[2:, None]
            # Of each row's keys, for attention of ours: where the first real one is, and how many places there are.
            self.first = torch.zeros(slot.batch, dtype=torch.int32, device=device)
            self.length = torch.ones(slot.batch, dtype=torch.int32, device=device)
            self.cache = StepCache(self._layers(start))
            memory = [(layer.keys, layer.values) for layer in self.cache.layers]
            placed = self.position_ids is not None
            self.fused = Fused.make(model, slot.batch, start.mask, memory, placed) if fuse else None
            self.mask: Any = None
            self._masks: list[tuple[Any, ...]] = []
            if self.fused is None:
                self.mask, self._masks = self._make_masks(model, inputs, start)
        self.arguments = self._arguments(inputs)
        self.model: Any = model
        self.logits = logits
        self.samplers: dict[Any, Any] = {}
        self.pool = torch.cuda.graph_pool_handle() if captured else None
        # At the last position, not where decoding is: a number that the model took to the host would then be wrong, and
        # the comparison with an ordinary step shows it.
        self.load(start, at=slot.capacity - 1)
        with torch.inference_mode(False), torch.no_grad():
            self._run: Graph | Plain
            self._run = Graph(self._step, device, self.pool, warm=True) if captured else Plain(self._step)

    def load(self, start: Start, at: int | None = None) -> None:
        """Begin a request: positions, masks, rings. ``at``: another position than the first one behind the prompt."""
        position = start.length if at is None else at
        self.position.fill_(position)
        self.length.fill_(position)
        self.first[: start.rows].copy_(start.mask.to(torch.int32).argmax(1))
        if self.position_ids is not None:
            assert start.position_ids is not None
            self.position_ids[: start.rows].copy_(start.position_ids)
        if self.fused is not None:
            self.fused.load(start.mask)
        for mask, size, hidden, seen in self._masks:
            mask.fill_(hidden)
            held = min(start.length, size)
            where = torch.arange(start.length - held, start.length, device=self.device) % size
            real = start.mask[:, start.length - held :].to(torch.bool)
            flat = mask.view(mask.shape[0], size)
            flat[: start.rows, where] = torch.where(real, seen, hidden).to(mask.dtype)
        for index, (layer, keys, values, length) in start.sliding.items():
            now = layer.keys, layer.values, layer.cumulative_length
            layer.keys, layer.values, layer.cumulative_length = keys, values, length
            fill_ring(self._ring(index), layer)
            layer.keys, layer.values, layer.cumulative_length = now
        for pair in self.slot.full:
            if pair is not None:  # what an earlier request left there is hidden, but NaN times nothing is NaN
                for tensor in pair:
                    tensor[:, :, start.length :].zero_()

    def __call__(self) -> torch.Tensor:
        """Run the model on ``input_ids``: writes the cache, moves positions on; returns ``logits``."""
        self._run()
        return self.logits

    @property
    def again(self) -> bool:
        """Whether steps can be captured again, in little time: fused ones, until `release`."""
        return self.fused is not None and self.fused.step is not None

    def capture(self, run: Callable[[], None], generators: tuple[Any, ...], behind: bool) -> Callable[[], None]:
        """``run``, which has run before, as one launch where steps are.

        Args:
            generators: whose random numbers it draws. behind: with a step in front of it (see `again`).
        """
        launch = partial(self._step, run) if behind else run
        return launch if self.pool is None else Graph(launch, self.device, self.pool, generators)

    def release(self) -> None:
        """Let go of the model: graphs do not need it."""
        if self.pool is not None:
            self.model = None
            if self.fused is not None:
                self.fused.release()

    def finish(self, cache: Any, length: int, rows: int) -> None:
        """Show transformers' ``cache`` what the steps wrote: its first ``length`` positions."""
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, DynamicSlidingWindowLayer):
                read_ring(self._ring(index), layer, length, rows)
            else:
                layer.show(length)

    def _step(self, then: Callable[[], None] | None = None) -> None:
        if self.fused is not None:
            memory = [(layer.keys, layer.values) for layer in self.cache.layers]
            self.fused(self.input_ids, self.position, self.position_ids, memory, self.logits)
        else:
            self._forward()
        if then is not None:
            then()  # a kernel of ours that follows another of ours begins before that has ended
        self._places.add_(1)

    def _forward(self) -> None:
        for size, slot in self._slots.items():
            torch.remainder(self.position, size, out=slot)
        for mask, size, _, seen in self._masks:
            mask.view(mask.shape[0], size).index_fill_(1, self._slot_of(size), seen)
        self.length.add_(1)
        # Attention of ours then needs no mask, but it knows only where a row begins.
        ranges = decode_step(self.first, self.length, keys=self.slot.capacity)
        with contextlib.nullcontext() if self.gaps else ranges:
            output = self.model(**self.arguments, return_dict=True)
        self.logits.copy_(output.logits[:, -1])

    def _layers(self, start: Start) -> list[StepLayer]:
        layers = []
        for index, pair in enumerate(self.slot.full):
            sliding = index in start.sliding
            if sliding:
                layer, keys, values, _ = start.sliding[index]
                if keys is None or values is None:
                    raise NotCapturableError("a layer of the cache is not used")
                pair = self.slot.make(keys, values, min(layer.sliding_window, self.slot.capacity))
            elif pair is None:
                raise NotCapturableError("a layer of the cache is not used")
            if pair[0].device != self.device:
                raise NotCapturableError("the model is spread over several devices")
            layers.append(StepLayer(*pair, self.position, self._slot_of(pair[0].shape[2]), sliding))
        return layers

    def _slot_of(self, size: int) -> torch.Tensor:
        if size >= self.slot.capacity:
            return self.position
        return self._slots.setdefault(size, torch.zeros_like(self.position))

    def _ring(self, index: int) -> Pair:
        layer = self.cache.layers[index]
        return layer.keys, layer.values

    def _make_masks(self, model: Any, inputs: dict[str, Any], start: Start) -> tuple[Any, list[tuple[Any, ...]]]:
        """The mask argument, and (tensor, keys, hidden, seen) of each tensor in it."""
        slot = self.slot
        two = torch.zeros(slot.batch, slot.capacity, dtype=torch.long, device=self.device)
        two[: start.rows, : start.length] = start.mask
        if _wants_plain_mask(model.config):
            return two, [(two, slot.capacity, 0, 1)]
        from transformers.masking_utils import create_masks_for_generate

        make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
        self.position.fill_(start.length)
        made = make(
            config=model.config,
            inputs_embeds=torch.empty(slot.batch, 1, 0, dtype=model.dtype, device=self.device),
            attention_mask=two[:, : start.length + 1],
            past_key_values=self.cache,
            position_ids=None,
        )
        parts = made if isinstance(made, dict) else {"": made}
        masks = {}
        for name, part in parts.items():
            if part is None or part.ndim != 4 or part.shape[1:3] != (1, 1):
                raise NotCapturableError(f"attention {model.config._attn_implementation!r} takes no mask of ours")
            # Made here for its form only: a ring's order is ours.
            seen, hidden = (True, False) if part.dtype == torch.bool else (0.0, torch.finfo(part.dtype).min)
            mask = torch.full((slot.batch, 1, 1, part.shape[3]), hidden, dtype=part.dtype, device=self.device)
            masks[name] = (mask, part.shape[3], hidden, seen)
        argument = {name: mask[0] for name, mask in masks.items()} if isinstance(made, dict) else masks[""][0]
        return argument, list(masks.values())

    def _arguments(self, inputs: dict[str, Any]) -> dict[str, Any]:
        ours = {"input_ids": self.input_ids, "past_key_values": self.cache, "attention_mask": self.mask}
        if self.position_ids is not None:
            ours["position_ids"] = self.position_ids
        for name, value in inputs.items():
            if name not in ours and not isinstance(value, _PASSED_ON):
                raise NotCapturableError(f"the model is given {name}, which may change from token to token")
        return {**{name: value for name, value in inputs.items() if name != "return_dict"}, **ours}


def _wants_plain_mask(config: Any) -> bool:
    """Whether the model makes ALiBi's bias of its mask, which then must be [B, keys]."""
    return bool(getattr(config, "alibi", False)) or config.model_type == "bloom"
