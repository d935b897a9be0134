"""Whole models of well-known shapes, random weights: decoding, prefill, and where the time of one step goes.

Decoding is the wall clock of ``generate(n + 1) - generate(1)``, prefill and start-up taken off: in turn with the peer
over few tokens in the middle of the answer, and once over the whole answer, beside replays of our graph alone. The peer
is transformers' forward captured by hand in a CUDA graph (`hand_captured.py`); beside it ``generate()`` of plain
transformers, and transformers + bitsandbytes where that is installed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks import ceilings, first_use, host_time, models, step_budget, ties, timing
from benchmarks.case import Case, Context
from benchmarks.spread import paired_ratio, spread

PROMPT, ANSWER, PREFILL = 128, 512, 4096
_SOURCES = tuple(f"onegpu/{part}" for part in ("engine", "kernels", "nn", "convert"))
_SOURCES += tuple(f"benchmarks/{name}.py" for name in ("cases/model", "models", "hand_captured", "step_budget"))
_SOURCES += tuple(f"benchmarks/{name}.py" for name in ("host_time", "ties", "first_use"))
_TESTS = ("tests/engine/test_decoding_models.py::test_with_attention_of_ours",)
_QUANTISED = tuple(f"tests/nn/test_linear_{bits}bit.py::test_forward_and_gradient" for bits in (4, 8))


def cases() -> Iterator[Case]:
    """The most telling first: a budget of two minutes ends behind the decoding of every shape."""
    main, *others = "Llama-2-7B", "Mistral-7B", "Falcon-7B", "Qwen2.5-0.5B", "BLOOM-7B1"
    for kind, batch in (("bf16", 1), ("bf16", 16), ("nf4", 1), ("int8", 1)):
        yield _decode(main, kind, batch, main)
    for shape in others:
        yield _decode(shape, "bf16", 1, shape)
    for kind in models.KINDS:
        yield _case(main, f"{kind} budget of one step", partial(budget, main, kind), None, None, 4, f"{main} more")
        if kind != "bf16":
            yield _decode(main, kind, 16, f"{main} more")
    for shape in others:
        yield _decode(shape, "nf4", 1, f"{shape} more")
    for kind in models.KINDS:
        yield _case(main, f"{kind} first use", partial(fresh, main, kind), None, None, 40, "fresh process")
    for kind in models.KINDS:
        yield _case(main, f"{kind} prefill 1x{PREFILL}", partial(prefill, main, kind), None, None, 5, f"{main} prefill")


def _decode(shape: str, kind: str, batch: int, group: str) -> Case:
    # bf16 is held to the floors; a quantised model must at least beat the captured bf16 one.
    main = shape == "Llama-2-7B"
    bound, goal = (1.05 if main else 1.1, 0.95) if kind == "bf16" else (1.0, 0.5)
    measure = partial(decode, shape, kind, batch)
    return _case(shape, f"{kind} decode, batch {batch}", measure, bound, goal, 10 if main else 8, group)


def _case(
    shape: str,
    name: str,
    measure: Callable[[Context], dict[str, Any]],
    bound: float | None,
    goal: float | None,
    seconds: float,
    group: str,
) -> Case:
    tests = _TESTS if name.startswith("bf16") else _TESTS + _QUANTISED
    return Case("model", f"{shape} {name}", None, measure, _SOURCES, tests, bound, goal, seconds=seconds, group=group)


def decode(shape: str, kind: str, batch: int, context: Context) -> dict[str, Any]:
    """Milliseconds a step, ours beside the peers."""
    prompt, longest, few, compared = (8, 12, 4, 5) if context.tiny else (PROMPT, ANSWER, 24, 33)
    plain, ours = _plain(shape, context), _ours(shape, kind, context)
    captured, note = _captured(plain, _ids(plain, batch, prompt), prompt + longest + 1)
    if note and not context.tiny:
        few = 8  # the peer's steps then take ten times as long
    # As many positions as the longest answer will need: the memory and the graph stay the same from here on.
    long_prompt = _ids(plain, batch, prompt + longest - 11)
    first = _wall(partial(_generate, ours, long_prompt, 12), context)
    use = _first_use(ours)
    use["first_use_s"] = round(first - _wall(partial(_generate, ours, long_prompt, 12), context), 3)
    ids, middle = _ids(plain, batch, prompt), _ids(plain, batch, prompt + (longest - few) // 2)
    # The whole answer by the clock, less generate(1): the difference of short answers drowns in two prefills' noise.
    whole = longest * _span(ours, ids, few, context) / context.seconds
    short = whole < 0.45
    tokens = longest if context.tiny or short else longest // 2
    taken: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(5 if whole < 0.2 else 2):
        taken["peer"].append(_replays(captured, middle, few, context) * 1e3)
        taken["ours"].append(_span(ours, ids, tokens, context) * 1e3)
    taken["peer"].append(_replays(captured, middle, few, context) * 1e3)
    step = spread(taken["ours"])
    wall = step["median"]
    replay = _replay(ours, prompt + tokens // 2, min(tokens, 64), context)
    if batch == 1 and shape == "Llama-2-7B":
        use |= _host(ours, ids, min(tokens, 256), context)
    peer = "transformers forward, captured by hand, bf16" if not note else "transformers forward, static cache, bf16"
    peers = {peer: {"ms": spread(taken["peer"]), "ratio": paired_ratio(taken["ours"], taken["peer"][:-1])}}
    peers |= _eager_peers(plain, kind, ids, taken["ours"], context)
    costs = models.step_cost(ours, batch, prompt + longest // 2)
    row: dict[str, Any] = {
        "peer": peer,
        "ours": {
            "ms": step,
            "tokens_per_second": round(batch * 1e3 / step["median"], 1),
            "replay_ms": None if replay is None else round(replay, 4),
            "wall_over_replay": None if replay is None else round(wall / replay, 4),
            **use,
        },
        "theirs": peers[peer],
        "peers": peers,
        "ratio": peers[peer]["ratio"],
        "shape": {"batch": batch, "prompt": prompt, "tokens": tokens, "few": few},
        "bytes": sum(costs.values()),
        "flops": 2 * models.parameters(plain) * batch,
        "note": note,
    }
    if kind == "bf16":
        text, same = _generate(ours, ids, compared)[:, prompt:], captured.generate(ids, compared)
        row |= {"same_tokens": int((text == same).cumprod(1).sum(1).min()), "compared_tokens": compared}
        row["first_difference"] = ties.first_difference(plain, ids, text, same)
    return row | _share(row, context, step["median"] * 1e-3)


def _ids(model: Any, batch: int, length: int) -> Any:
    """A prompt, the same each time."""
    import torch

    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def _first_use(model: Any) -> dict[str, Any]:
    """What the report of the last call says."""
    report = model.generate.report
    seconds = {name: round(getattr(report, name), 3) for name in ("capture_s", "compile_s")}
    return {**seconds, "loop": str(report), "fused": report.fused}


def _captured_step(model: Any) -> Any:
    """The newest captured step of a model, or None."""
    steps = [slot.step for slot in model.generate.engine.slots._idle if slot.step is not None]
    return steps[-1] if steps else None


def _rewind(step: Any, position: int) -> None:
    for counter in (step.position, step.length, step.position_ids):
        if counter is not None:
            counter.fill_(position)


def _replay(model: Any, middle: int, steps: int, context: Context) -> float | None:
    """Milliseconds a replay of the model's newest captured step, around a position; None: there is none."""
    step, samples = _captured_step(model), []
    if context.device != "cuda" or step is None:
        return None

    def replays() -> None:
        for _ in range(steps):
            step()

    for _ in range(3):
        _rewind(step, middle - steps // 2)
        samples.append(_wall(replays, context) / steps * 1e3)
    return min(samples)


def _host(model: Any, ids: Any, tokens: int, context: Context) -> dict[str, Any]:
    """Host time of a token, and of handing its graph over."""
    step = _captured_step(model)
    if context.device != "cuda" or step is None:
        return {}
    launch = host_time.launch_us(step, lambda: _rewind(step, ids.shape[1]))
    return {"host_us": host_time.host_us(model, ids, step, tokens), "launch_us": launch}


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


def _generate(model: Any, ids: Any, count: int, eos: int | None = None) -> Any:
    import torch

    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=eos)


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
    """Seconds a step: ``generate(tokens + 1)`` less ``generate(1)``, by the tokens between them.

    The short call is the middle one of three: a prefill is the host's work, and differs by a tenth from call to call.
    """
    long = _wall(partial(_generate, model, ids, tokens + 1), context)
    short = sorted(_wall(partial(_generate, model, ids, 1), context) for _ in range(3))[1]
    return max(long - short, 1e-9) / tokens


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
        samples = [_span(model, ids, 2 if context.tiny else 4, context) * 1e3 for _ in ours[:2]]
        peers[name] = {"ms": spread(samples), "ratio": paired_ratio(ours[:2], samples)}
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


def fresh(shape: str, kind: str, context: Context) -> dict[str, Any]:
    """The first `generate()` of a process, without kernels on disk and with them."""
    found = first_use.measure(shape, kind, context.device, context.tiny)
    seconds = spread([found["filled"]["first_use_s"]])
    return {
        "peer": None, "ours": {"seconds": seconds, **found}, "theirs": None, "peers": {}, "ratio": None,
        "shape": {"batch": 1, "prompt": first_use.PROMPT, "tokens": first_use.ANSWER},
    }  # fmt: skip


def budget(shape: str, kind: str, context: Context) -> dict[str, Any]:
    """Device time of every kernel of a step at batch 1, and what its kind of work could take at least."""
    import torch

    prompt, steps = (8, 2) if context.tiny else (PROMPT, 32)
    ours = _ours(shape, kind, context)
    ids = torch.randint(3, ours.config.vocab_size, (1, prompt), device=context.device)
    _generate(ours, ids, steps + 1)  # compiles and captures
    replay = _replay(ours, prompt + steps // 2, steps, context)
    step = _span(ours, ids, steps, context) * 1e6 if replay is None else replay * 1e3
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
    row |= {"idle_us": max(0.0, round(step - busy, 1)), "launches": round(sum(k["launches"] for k in kernels), 1)}
    return row
