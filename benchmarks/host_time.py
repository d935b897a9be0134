"""Host time of a token: the loop of `generate` with everything in it but the model's part of the step.

The step's graph is replaced by nothing while the loop runs, so that the device is never what a token waits for; its
choice of a token, the copy to the host and the event behind it are real. Where the loop still waits for the device,
that time is taken off. What handing the step's graph to the driver costs is measured by itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

_NEVER = 1e6  # seconds


class _Ignore:
    """A streamer that does nothing."""

    def put(self, value: Any) -> None:
        """Takes the tokens."""

    def end(self) -> None:
        """Takes the end."""


class _Clock:
    """When the prefill was over, and for how long the loop waited since then."""

    def __init__(self, synchronize: Any) -> None:
        self.began = self.waited = 0.0
        self._synchronize = synchronize

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        from onegpu.engine.decoding import Decoding
        from onegpu.engine.stops import Readback

        prefill, pop = Decoding._prefill, Readback.pop

        def stamped(decoding: Any) -> None:
            prefill(decoding)
            self._synchronize()
            self.began, self.waited = time.perf_counter(), 0.0

        def waiting(readback: Any) -> Any:
            event = readback._waiting[0].event
            if event is not None:
                start = time.perf_counter()
                while not event.query():
                    pass
                self.waited += time.perf_counter() - start
            return pop(readback)

        Decoding._prefill, Readback.pop = stamped, waiting  # type: ignore[method-assign]
        try:
            yield
        finally:
            Decoding._prefill, Readback.pop = prefill, pop  # type: ignore[method-assign]


def host_us(model: Any, ids: Any, step: Any, tokens: int, repeats: int = 5) -> dict[str, float]:
    """Microseconds a token of the loop, for the ways to generate that differ in what the host has to see.

    Args:
        model: one of ours, which has generated with ``step`` from prompts like ``ids`` [B, n].
        step: its captured step. tokens: so many, in the longer of two calls whose difference is taken.
    """
    import torch

    on_gpu = ids.device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else _nothing
    run, clock, few = step._run, _Clock(synchronize), max(tokens // 16, 12)
    draws, step._run = dict(step.samplers), _nothing
    step.samplers.update({key: draw._replace(behind=None) for key, draw in draws.items()})
    try:
        never = int(step.logits[0].argmin())  # a token that is not among the best, with logits that stay as they are
        draw = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
        ways: dict[str, dict[str, Any]] = {
            "greedy": {},
            "eos": {"eos_token_id": never},
            "eos, max_time": {"eos_token_id": never, "max_time": _NEVER},
            "eos, streamer": {"eos_token_id": never, "streamer": _Ignore()},
            "eos, sampled": {"eos_token_id": never, **draw},
        }
        found = {}
        for name, settings in ways.items():
            call = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, **settings}

            def taken(count: int, call: dict[str, Any] = call) -> float:
                model.generate(ids, max_new_tokens=count, **call)
                return time.perf_counter() - clock.began - clock.waited

            with clock.running():
                taken(few)  # captures its choice of a token
                pairs = [(taken(tokens), taken(few)) for _ in range(repeats)]
            if not any(slot.step is step for slot in model.generate.engine.slots._idle):
                raise RuntimeError(f"generate() took another step than the one given, for {name}")
            long, short = (min(side) for side in zip(*pairs, strict=True))  # the machine's other work only adds
            found[name] = round((long - short) / (tokens - few) * 1e6, 1)
    finally:
        step._run = run
        step.samplers.update(draws)
    return found


def launch_us(step: Any, rewind: Any, launches: int = 8, repeats: int = 5) -> float:
    """Microseconds until the step's graph is handed over, the least of some; ``rewind()`` keeps it in its memory."""
    import torch

    on_gpu = step.device.type == "cuda"
    samples = []
    for _ in range(repeats):
        rewind()
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(launches):
            step()
        samples.append((time.perf_counter() - start) / launches * 1e6)
    return round(min(samples), 1)


def _nothing() -> None:
    """In the place of the step's graph, or of a wait."""
