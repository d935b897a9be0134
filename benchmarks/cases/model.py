"""Whole models of well-known shapes, random weights: decoding, prefill, and where the time of one step goes.

Decoding is the wall clock of ``generate(n + 1) - generate(1)``, n tokens, prefill and start-up taken off. The peer is
transformers' forward captured by hand in a CUDA graph (`hand_captured.py`); beside it ``generate()`` of plain
transformers, and transformers + bitsandbytes where that is installed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks import ceilings, models, step_budget, timing
from benchmarks.case import Case, Context
from benchmarks.spread import paired_ratio, spread

PROMPT, PREFILL = 128, 4096
_SOURCES = tuple(f"onegpu/{part}" for part in ("engine", "kernels", "nn", "convert"))
_SOURCES += tuple(f"benchmarks/{name}.py" for name in ("cases/model", "models", "hand_captured", "step_budget"))
_TESTS = tuple(f"tests/nn/test_linear_{bits}bit.py::test_forward_and_gradient" for bits in (4, 8))
_ROUNDS = 3


def cases() -> Iterator[Case]:
    for shape in models.SHAPES:
        main = shape == "Llama-2-7B"
        for kind in models.KINDS if main else ("bf16", "nf4"):
            for batch in (1, 16) if main else (1,):
                # bf16 is held to the floors; a quantised model must at least beat the captured bf16 one.
                bound = (1.05 if main else 1.1) if kind == "bf16" else 1.0
                measure = partial(decode, shape, kind, batch)
                yield _case(shape, f"{kind} decode, batch {batch}", measure, bound, 0.95 if kind == "bf16" else 0.5, 10)
            if main:
                yield _case(shape, f"{kind} prefill 1x{PREFILL}", partial(prefill, shape, kind), None, None, 5)
                yield _case(shape, f"{kind} budget of one step", partial(budget, shape, kind), None, None, 4)


def _case(
    shape: str,
    name: str,
    measure: Callable[[Context], dict[str, Any]],
    bound: float | None,
    goal: float | None,
    seconds: float,
) -> Case:
    return Case("model", f"{shape} {name}", None, measure, _SOURCES, _TESTS, bound, goal, seconds=seconds, group=shape)


def decode(shape: str, kind: str, batch: int, context: Context) -> dict[str, Any]:
    """Milliseconds a step, ours beside the peers."""
    import torch

    start = time.perf_counter()
    prompt = 8 if context.tiny else PROMPT
    plain, ours = _plain(shape, context), _ours(shape, kind, context)
    ids = torch.randint(3, plain.config.vocab_size, (batch, prompt), device=context.device)
    first = _wall(partial(_generate, ours, ids, 3), context)
    again = _wall(partial(_generate, ours, ids, 3), context)
    rough = max(_span(ours, ids, 8, context), 1e-5)
    left = context.seconds - (time.perf_counter() - start)
    tokens = 4 if context.tiny else _tokens(left, rough)
    captured, note = _captured(plain, ids, prompt + tokens + 1)
    _generate(ours, ids, tokens + 1)
    runs = {"ours": partial(_span, ours, ids), "peer": partial(_replays, captured, ids)}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(2 if context.tiny else _ROUNDS):
        for name in list(runs)[:: 1 if round_ % 2 == 0 else -1]:
            taken[name].append(runs[name](tokens, context) * 1e3)
    text = _generate(ours, ids, tokens + 1)[:, prompt:]
    same = int((text == captured.generate(ids, tokens + 1)).cumprod(1).sum(1).min()) if kind == "bf16" else None
    peer = "transformers forward, captured by hand, bf16" if not note else "transformers forward, static cache, bf16"
    costs = models.step_cost(ours, batch, prompt + tokens // 2)
    peers = {peer: {"ms": spread(taken["peer"]), "ratio": paired_ratio(taken["ours"], taken["peer"])}}
    peers |= _eager_peers(plain, kind, ids, taken["ours"], context)
    row: dict[str, Any] = {
        "peer": peer,
        "ours": {
            "ms": spread(taken["ours"]),
            "tokens_per_second": round(batch * 1e3 / spread(taken["ours"])["median"], 1),
            "first_use_s": round(first - again, 3),
            "loop": str(getattr(ours.generate, "report", "transformers' own")),
        },
        "theirs": peers[peer],
        "peers": peers,
        "ratio": peers[peer]["ratio"],
        "shape": {"batch": batch, "prompt": prompt, "tokens": tokens},
        "bytes": sum(costs.values()),
        "flops": 2 * models.parameters(plain) * batch,
        "same_tokens": same,
        "note": note,
    }
    return row | _share(row, context, spread(taken["ours"])["median"] * 1e-3)


def _tokens(seconds: float, step: float) -> int:
    """Tokens a measurement: at best the issue's 512, else what the time allows of ours and a peer that is as slow."""
    return next((n for n in (512, 256, 128, 64) if n * step * 2 * (_ROUNDS + 1) < seconds), 32)


def _share(row: dict[str, Any], context: Context, seconds: float) -> dict[str, Any]:
    least = ceilings.roofline(context.ceilings, row["bytes"], row["flops"], "read")
    if least is None:
        return {}
    return {"roofline_ms": round(least * 1e3, 3), "share": round(least / seconds, 3), "ceiling": "read"}


def _plain(shape: str, context: Context) -> Any:
    if "plain" not in context.kept:
        context.kept["plain"] = models.plain(shape, context.device, context.tiny)
    return context.kept["plain"]


def _ours(shape: str, kind: str, context: Context) -> Any:
    """One optimised model at a time, beside the plain one."""
    if kind not in context.kept:
        plain = _plain(shape, context)
        for other in set(context.kept) - {"plain"}:
            del context.kept[other]
        gc.collect()
        context.kept[kind] = models.ours(plain, kind)
    return context.kept[kind]


def _generate(model: Any, ids: Any, count: int) -> Any:
    import torch

    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)


def _wall(call: Callable[[], Any], context: Context) -> float:
    """Wall clock of a call, the device's work included."""
    import torch

    if context.device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if context.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _span(model: Any, ids: Any, tokens: int, context: Context) -> float:
    """Seconds a step: ``generate(tokens + 1)`` less ``generate(1)``, by the tokens between them."""
    long = _wall(partial(_generate, model, ids, tokens + 1), context)
    return max(long - _wall(partial(_generate, model, ids, 1), context), 1e-9) / tokens


def _captured(model: Any, ids: Any, length: int) -> tuple[Any, str | None]:
    """The hand-captured peer; not captured, and why, where transformers' forward waits for the host."""
    from benchmarks.hand_captured import HandCaptured

    made = HandCaptured(model, len(ids), length)
    try:
        made.capture(ids)
    except RuntimeError as error:
        return made, f"transformers' forward cannot be captured ({type(error).__name__})"
    return made, None


def _replays(captured: Any, ids: Any, tokens: int, context: Context) -> float:
    """Seconds a step of the peer, over the same positions."""
    captured.start(ids)

    def steps() -> None:
        for _ in range(tokens):
            captured.step()

    return _wall(steps, context) / tokens


def _eager_peers(plain: Any, kind: str, ids: Any, ours: list[float], context: Context) -> dict[str, Any]:
    """`generate()` as it comes, few tokens: each takes tens of milliseconds."""
    sides = {"transformers generate, bf16": plain}
    if kind != "bf16" and context.device == "cuda" and find_spec("bitsandbytes") is not None:
        sides[f"transformers + bitsandbytes generate, {kind}"] = models.bitsandbytes(plain, kind)
    peers = {}
    for name, model in sides.items():
        _span(model, ids, 2, context)
        samples = [_span(model, ids, 2 if context.tiny else 8, context) * 1e3 for _ in ours]
        peers[name] = {"ms": spread(samples), "ratio": paired_ratio(ours, samples)}
    return peers


def prefill(shape: str, kind: str, context: Context) -> dict[str, Any]:
    """One forward over a whole prompt, logits of the last position."""
    import torch

    length = 16 if context.tiny else PREFILL
    plain, ours = _plain(shape, context), _ours(shape, kind, context)
    ids = torch.randint(3, plain.config.vocab_size, (1, length), device=context.device)

    def forward(model: Any) -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    peer = "transformers, sdpa, bf16"
    sides = {"ours": timing.Side([partial(forward, ours)], context.device, capture=False)}
    sides[peer] = timing.Side([partial(forward, plain)], context.device, capture=False)
    taken = timing.alternate(sides, 3 if context.tiny else 7, time.perf_counter() + context.seconds)
    ms = {name: [s * 1e3 for s in samples] for name, samples in taken.items()}
    theirs = {"ms": spread(ms[peer]), "ratio": paired_ratio(ms["ours"], ms[peer])}
    costs = models.step_cost(ours, 1, length)
    flops = 2 * models.parameters(plain) * length + models.attention_flops(plain, length)
    row: dict[str, Any] = {
        "peer": peer, "ours": {"ms": spread(ms["ours"])}, "theirs": theirs, "peers": {peer: theirs},
        "ratio": theirs["ratio"], "shape": {"batch": 1, "prompt": length}, "bytes": costs["linear"], "flops": flops,
    }  # fmt: skip
    return row | _share(row, context, spread(ms["ours"])["median"] * 1e-3)


def budget(shape: str, kind: str, context: Context) -> dict[str, Any]:
    """Device time of every kernel of a step at batch 1, and what its kind of work could take at least."""
    import torch

    prompt, steps = (8, 2) if context.tiny else (PROMPT, 32)
    ours = _ours(shape, kind, context)
    ids = torch.randint(3, ours.config.vocab_size, (1, prompt), device=context.device)
    step = _span(ours, ids, steps, context) * 1e6
    row: dict[str, Any] = {"peer": None, "ours": {"us": spread([step])}, "shape": {"batch": 1, "prompt": prompt}}
    if context.device != "cuda":
        return {**row, "kernels": [], "work": [], "note": "kernels are traced on a GPU only"}
    long = step_budget.kernel_times(partial(_generate, ours, ids, steps + 1))
    short = step_budget.kernel_times(partial(_generate, ours, ids, 1))
    kernels = step_budget.difference(long, short, steps)
    costs = models.step_cost(ours, 1, prompt + steps // 2)
    work = step_budget.by_work(kernels, costs, context.ceilings.get("read"))
    busy = sum(entry["us"] for entry in work)
    row |= {"kernels": kernels[:40], "work": work, "busy_us": round(busy, 1), "bytes": sum(costs.values())}
    row |= {"idle_us": round(step - busy, 1), "launches": round(sum(k["launches"] for k in kernels), 1)}
    return row
