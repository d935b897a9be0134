"""A call of ``generate``: what of it our loop serves, with which memory, and how it went."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.stopping_criteria import MaxLengthCriteria

from onegpu.engine import prepare
from onegpu.engine.cache import unsupported
from onegpu.engine.decoding import Decoding
from onegpu.engine.fingerprint import fingerprint, runs_python
from onegpu.engine.slots import Slot, Slots, padded_batch
from onegpu.errors import bad_argument
from onegpu.kernels import ahead

_WORKSPACE = 2 * (32 << 20)  # of cuBLAS, for torch's stream and the graph's, as large as torch makes them on Hopper
_KNOWN = frozenset(
    {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "inputs_embeds"}
)


@dataclass
class Run:
    """How the last ``generate()`` went.

    Attributes:
        loop: "captured", "eager" or "transformers". reason: why not the better one.
        steps: forwards after the prefill.
        capture_s: seconds of this call spent capturing. compile_s: seconds of this call, of those and of the prefill's,
            in which it waited for kernels to be compiled (once for a machine: they are kept on disk) and loaded.
        fused: whether a step is kernels of ours from end to end, instead of the model's forward.
    """

    loop: str
    reason: str | None = None
    steps: int = 0
    capture_s: float = 0.0
    compile_s: float = 0.0
    fused: bool = False

    def __str__(self) -> str:
        words = {"captured": "onegpu's loop, one CUDA graph a step", "eager": "onegpu's loop, steps in Python"}
        text = words.get(self.loop, "transformers' loop on the same model") + (", five kernels a layer" * self.fused)
        return f"generate(): {text}" + (f" ({self.reason})" if self.reason else "")


@dataclass
class Engine:
    """What one model keeps between calls.

    Attributes:
        capture: "auto" captures on CUDA devices; "never" does not; "emulate" runs the captured step's function
            uncaptured, on any device.
        fuse: take the fused step (`onegpu.engine.fused_step`) where there is one; False once one was wrong.
        prepared: for which batches, on which device and in which dtype, kernels were compiled ahead; device and dtype
            alone: for a single row, when the model got our ``generate``.
    """

    capture: str = "auto"
    slots: Slots = field(default_factory=Slots)
    last: Run | None = None
    refusals: dict[Any, str] = field(default_factory=dict)
    fuse: bool = True
    prepared: set[Any] = field(default_factory=set)

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        return Engine(self.capture, fuse=self.fuse)

    def __reduce__(self) -> tuple[Any, ...]:
        return Engine, (self.capture,)

    def prepare(self, request: Request, slot: Slot) -> None:
        """Have kernels compiled, beside the prefill, that no request needed before."""
        key = slot.batch, request.device, request.model.dtype
        if key not in self.prepared:
            self.prepared.add(key)
            begun = key[1:] in self.prepared
            prepare.begin(request.model, slot.batch, int(request.columns), slot.capacity, begun)


class Request:
    """One call of ``generate``, as transformers prepared it.

    Raises (on making):
        UnservedError: transformers' loop has to do it.
    """

    def __init__(self, engine: Engine, model: Any, input_ids: Any, prepared: dict[str, Any]) -> None:
        self.engine, self.model = engine, model
        self.config = prepared["generation_config"]
        self.processors, self.stopping = prepared["logits_processor"], prepared["stopping_criteria"]
        self.streamer = prepared["streamer"]
        self.kwargs: dict[str, Any] = prepared["model_kwargs"]
        self.cache = self.kwargs.get("past_key_values")
        self._check(input_ids)
        self.prompt = input_ids
        self.rows, self.columns = input_ids.shape
        self._check_cache()
        limits = (c.max_length for c in self.stopping if type(c) is MaxLengthCriteria)
        self.max_length = math.ceil(min(limits, default=0))
        self.device = input_ids.device
        self.run = Run("eager")

    def _check(self, input_ids: torch.Tensor) -> None:
        config, kwargs = self.config, self.kwargs
        unknown = {name for name, value in kwargs.items() if name not in _KNOWN and value is not None}
        reasons = {
            "the cache is switched off": not kwargs.get("use_cache", True),
            unsupported(self.cache) or "": unsupported(self.cache) is not None,
            f"{', '.join(sorted(unknown))} is passed": bool(unknown),
            "attentions or hidden states are asked for": (
                config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states)
            ),
            f"cache_implementation={config.cache_implementation!r}": config.cache_implementation
            not in (None, "dynamic"),
            "the inputs are on another device than the model": input_ids.device != self.model.device
            and not hasattr(self.model, "hf_device_map"),
            "no maximum length is given": not any(type(c) is MaxLengthCriteria for c in self.stopping),
            "the prompt has no token": input_ids.ndim != 2
            or (not input_ids.numel() and kwargs.get("inputs_embeds") is None),
        }
        for reason, holds in reasons.items():
            if holds:
                raise UnservedError(reason)

    def _check_cache(self) -> None:
        """Name a cache of other sequences, which torch would complain of somewhere in the model."""
        held = {layer.keys.shape[0] for layer in self.cache.layers if layer.is_initialized and layer.keys.numel()}
        if held - {self.rows}:
            why = f"holds {held.pop()} sequences, the prompt has {self.rows}"
            raise bad_argument("past_key_values", self.cache, why, "Pass the cache of these sequences, or leave it out")

    def mask(self) -> torch.Tensor:
        """[B, n]: the real ones of all tokens up to the prompt's end, those in the cache among them."""
        mask: torch.Tensor | None = self.kwargs.get("attention_mask")
        if mask is not None:
            return mask
        embeds = self.kwargs.get("inputs_embeds")
        given = embeds.shape[1] if embeds is not None else self.columns
        length = int(getattr(self.config, "_mask_length", None) or given + self.cache.get_seq_length())
        ones: torch.Tensor = self.prompt.new_ones(self.rows, length)
        return ones

    def roll(self) -> None:
        """Rows padded on the right become rows padded on the left: then the last column is each row's last token."""
        mask = self.kwargs.get("attention_mask")
        embeds = self.kwargs.get("inputs_embeds")
        # The last question is the device's; it saves ten kernels, each of which would be loaded for the first call.
        if (
            mask is None
            or embeds is not None
            or mask.shape != self.prompt.shape
            or self.cache.get_seq_length()
            or bool(mask[:, -1].all())
        ):
            self.ids = self.prompt
            return
        columns = torch.arange(self.columns, device=self.device)
        shift = (self.columns - 1 - (columns * mask.bool()).amax(1)) * mask.any(1)
        where = (columns - shift[:, None]) % self.columns
        self.ids = self.prompt.gather(1, where)
        mask = self.kwargs["attention_mask"] = mask.gather(1, where)
        positions = self.kwargs.get("position_ids")
        if positions is not None and positions.shape == where.shape:
            self.kwargs["position_ids"] = positions.gather(1, where)

    def final_length(self) -> int:
        """Positions in the cache at the end."""
        return self.mask().shape[1] + max(self.max_length - int(self.columns), 1)

    def prefill_bytes(self) -> int:
        """About what the widest layer takes for the prompt, and what cuBLAS sets aside on a GPU, in bytes."""
        config = self.model.config.get_text_config()
        wide = 6 * config.hidden_size + 3 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
        tokens = min(self.columns, self.config.prefill_chunk_size or self.columns)
        workspace = _WORKSPACE if self.device.type == "cuda" else 0
        return int(self.rows * tokens * wide * self.model.dtype.itemsize) + workspace

    def may_capture(self) -> bool:
        """Whether a captured step is worth trying; if not, ``run.reason`` says why."""
        engine, model = self.engine, self.model
        on_gpu = self.device.type == "cuda"
        if engine.capture == "never" or not (on_gpu or engine.capture == "emulate"):
            self.run.reason = "capturing is switched off" if on_gpu else f"no graphs on {self.device.type}"
        elif torch.is_autocast_enabled(self.device.type):
            self.run.reason = "autocast is on"
        elif model.training:
            self.run.reason = "the model is in training mode"
        else:
            self.run.reason = runs_python(model)
            if self.run.reason is None:
                self.fingerprint = fingerprint(model)
                self.run.reason = engine.refusals.get(self.fingerprint)
        return self.run.reason is None


class UnservedError(Exception):
    """transformers' own loop has to serve this call; the message says why. Never reaches the user."""


def decode(engine: Engine, model: Any, input_ids: torch.Tensor, prepared: dict[str, Any]) -> Any:
    """What transformers' ``_sample`` does, on our cache and steps.

    Args:
        prepared: generation_config, logits_processor, stopping_criteria, streamer, model_kwargs.

    Raises:
        UnservedError: before anything was done. MemoryBudgetError: the cache does not fit.
    """
    request = Request(engine, model, input_ids, prepared)
    engine.last = request.run
    request.roll()
    static = request.may_capture()
    batch = padded_batch(request.rows) if static else request.rows
    slot = engine.slots.lease(request.cache, request.rows, batch, request.final_length(), request.prefill_bytes())
    slot.begin(request.device)
    kept = False
    waited = ahead.waited()
    try:
        if static and slot.step is None and request.device.type == "cuda":
            engine.prepare(request, slot)
        result = Decoding(request, slot, static).result()
        kept = bool(request.config.return_dict_in_generate) or getattr(request.cache, "_is_user_defined", False)
    finally:
        request.run.compile_s = ahead.waited() - waited
        slot.end(request.device)
        if kept:
            engine.slots.lend(slot, request.cache)
        else:
            engine.slots.give_back(slot)
    return result
