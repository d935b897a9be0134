"""A decoding step of Llama-2-7B's shape in five kernels a layer, beside the same step with ordinary launches.

The budget times each kind of kernel by itself, in a chain over all layers, so that every launch finds other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks import ceilings, timing
from benchmarks.case import Case, Context, Sides
from benchmarks.spread import spread

_MODELS = {
    "Llama-2-7B": {
        "layers": 32,
        "width": 4096,
        "inner": 11008,
        "heads": 32,
        "kv": 32,
        "size": 128,
        "vocabulary": 32000,
    },
    "Llama-3-8B": {
        "layers": 32,
        "width": 4096,
        "inner": 14336,
        "heads": 32,
        "kv": 8,
        "size": 128,
        "vocabulary": 128256,
    },
    "Mistral-7B": {"layers": 32, "width": 4096, "inner": 14336, "heads": 32, "kv": 8, "size": 128, "vocabulary": 32000},
}
_LLAMA = "Llama-2-7B"
_TINY = {"layers": 1, "width": 64, "inner": 64, "heads": 1, "kv": 1, "size": 64, "vocabulary": 70}
_SOURCES = tuple(
    f"onegpu/{name}"
    for name in (
        "engine/fused_step.py", "kernels/few_rows_common.cu", "kernels/decode_step_common.cu",
        "kernels/decode_step_input.cu",
        "kernels/decode_step_product.cu", "kernels/decode_step_single.cu", "kernels/decode_step_bulk.cu",
        "kernels/decode_step_attention.cu",
        "kernels/decode_step_cuda.py", "kernels/decode_step_layouts.py",
    )
)  # fmt: skip
_TESTS = "tests/engine/test_fused_step.py::test_a_chain_replayed_a_thousand_times_reads_only_what_it_wrote"
_WITHOUT = "ordinary launches"


def cases() -> Iterator[Case]:
    """Formats, most wanted first; a format's cases share its weights. Of Llama-2-7B unless a name says another."""
    wanted = {
        "nf4": [(1, 128), (1, 512), (1, 4096), (4, 512), (8, 512), (16, 128), (16, 512)],
        "fp4": [(1, 128), (1, 512), (1, 4096), (16, 128)],
        "int8": [(1, 128), (1, 512), (1, 4096), (16, 128)],
        "16bit": [(1, 128), (1, 512), (1, 4096), (16, 128), (16, 512)],
    }
    for form, sizes in wanted.items():
        common = _common(form)
        for rows, cache in sizes:
            name = f"{form}, batch {rows}, cache {cache}"
            yield Case("fused_step", name, prepare=partial(_prepare, _LLAMA, form, rows, cache), **common)
        yield Case("fused_step", f"{form} budget of one step", measure=partial(_budget, form, 512), **common)
    for model in ("Llama-3-8B", "Mistral-7B"):
        name = f"{model} 16bit, batch 1, cache 128"
        yield Case("fused_step", name, prepare=partial(_prepare, model, "16bit", 1, 128), **_common(model))


def _common(group: str) -> dict[str, Any]:
    sources = ("benchmarks/cases/fused_step.py", *_SOURCES)
    return {"sources": sources, "tests": (_TESTS,), "group": group, "seconds": 2.0}


def _prepare(model: str, form: str, rows: int, cache: int, context: Context) -> Sides:
    import torch

    from onegpu.engine.fused_step import FusedStep
    from onegpu.kernels.decode_step import cost

    found, cache = _structure(model, form, context), 32 if context.tiny else cache
    ids, at = torch.ones(rows, 1, dtype=torch.int64, device=context.device), _position(cache, context)
    memory = _caches(found, rows, cache, context)
    calls = [partial(FusedStep(found, pdl), ids, at, at, memory) for pdl in (True, False)]
    shape = {"rows": rows, "cache": cache, "dtype": "bfloat16", "weights": form}
    costs = [cost(matrix, rows) for matrix in found.matrices()]
    in_cache = 2 * rows * cache * found.layers[0].heads.kv * found.layers[0].heads.size * 2 * len(found.layers)
    moved, flops = sum(cost[0] for cost in costs) + in_cache, sum(cost[1] for cost in costs)
    return Sides([calls[0]], {_WITHOUT: [calls[1]]}, moved, flops, shape=shape)


def _budget(form: str, cache: int, context: Context) -> dict[str, Any]:
    import torch

    from onegpu.engine.fused_step import FusedStep

    found, cache = _structure(_LLAMA, form, context), 32 if context.tiny else cache
    memory, at = _caches(found, 1, cache, context), _position(cache, context)
    ids = torch.ones(1, 1, dtype=torch.int64, device=context.device)
    rounds = 3 if context.tiny else timing.ROUNDS

    def micro(call: Callable[[], Any]) -> dict[str, Any]:
        samples = timing.alternate({"ours": timing.Side([call], context.device)}, rounds)["ours"]
        return spread([seconds * 1e6 for seconds in samples])

    whole, work = micro(partial(FusedStep(found), ids, at, at, memory)), []
    for what, (launches, moved, call) in _kinds(found, memory, at, cache, context).items():
        entry = {"what": what, "launches": launches, "us": micro(call)["median"]}
        if context.ceilings.get("read"):
            entry["share"] = round(ceilings.roofline(context.ceilings, moved, 0, "read", "bf16") * 1e6 / entry["us"], 3)
        work.append(entry)
    idle = max(0.0, round(whole["median"] - sum(entry["us"] for entry in work), 1))
    fields = {"peer": None, "theirs": None, "peers": {}, "ratio": None}
    launches = sum(entry["launches"] for entry in work) + 1
    return {**fields, "ours": {"us": whole}, "work": work, "idle_us": idle, "launches": launches}


def _kinds(
    found: Any, memory: list[Any], at: Any, cache: int, context: Context
) -> dict[str, tuple[int, int, Callable[[], Any]]]:
    """Kind of kernel -> launches a step, bytes of all of them, all of them."""
    import torch

    from onegpu.kernels import decode_step as ops

    heads, one = found.layers[0].heads, {"device": context.device}
    split = 1
    if context.device == "cuda":
        from onegpu.kernels.decode_step_cuda import splits

        split = splits(torch.cuda.current_device(), 1, heads.kv)
    h, qkv, logits = (torch.randn(1, n, **one) for n in (found.width, heads.width, found.head.rows))
    act = torch.randn(1, found.inner, **one).to(found.dtype)
    values = torch.randn(1, heads.query, split, heads.size, **one).to(found.dtype)
    attended = ops.Attended(values, torch.rand(1, heads.query, split, 2, **one) + 1)

    def stream(norm: Any) -> Any:
        return ops.Stream(h, found.dtype, norm)

    def each(call: Callable[[Any, Any], Any]) -> Callable[[], None]:
        return lambda: [call(*pair) for pair in zip(found.layers, memory, strict=True)] and None

    calls: dict[str, tuple[Any, Callable[[Any, Any], Any]]] = {
        "norm, q, k, v": (lambda x: x.qkv, lambda x, _: ops.product(stream(x.norms[0]), x.qkv, "store", qkv)),
        "output of attention, residual": (lambda x: x.out, lambda x, _: ops.product(attended, x.out, "add", h)),
        "norm, gate, up, activation": (
            lambda x: x.up, lambda x, _: ops.product(stream(x.norms[2]), x.up, "gated", act, act=x.act),
        ),
        "down, residual": (lambda x: x.down, lambda x, _: ops.product(act, x.down, "add", h)),
    }  # fmt: skip
    made = {}
    for what, (matrix, call) in calls.items():
        made[what] = len(found.layers), sum(ops.cost(matrix(x), 1)[0] for x in found.layers), each(call)
    in_cache = 4 * cache * heads.kv * heads.size * len(found.layers)
    attend = each(lambda x, pair: ops.attend(qkv, x.heads, *pair, at, at, None, attended))
    made["rotary embedding, cache, attention"] = len(found.layers), in_cache, attend
    head = partial(ops.product, stream(found.norm), found.head, "store", logits)
    made["norm, head"] = 1, ops.cost(found.head, 1)[0], head
    return made


def _position(cache: int, context: Context) -> Any:
    import torch

    return torch.tensor([cache], device=context.device)


def _caches(found: Any, rows: int, cache: int, context: Context) -> list[Any]:
    import torch

    heads = found.layers[0].heads
    shape = (2, rows, heads.kv, cache + 8, heads.size)
    return [tuple(torch.randn(shape, device=context.device).to(found.dtype)) for _ in found.layers]


def _structure(model: str, form: str, context: Context) -> Any:
    """Random weights of the shape, in bfloat16 but for the layers' products."""
    if (model, form) in context.kept:
        return context.kept[model, form]
    import torch

    from onegpu.engine.fused_structure import SEQUENTIAL, Layer, Structure
    from onegpu.kernels.decode_step import Heads, Matrix, Norm, Part

    s, device = (_TINY if context.tiny else _MODELS[model]), context.device

    def part(n: int, k: int, kind: str) -> Any:
        if kind == "16bit":
            return Part(n, torch.empty(n, k, dtype=torch.bfloat16, device=device).normal_(0, 0.02), None)
        if kind == "int8":
            codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
            return Part(n, codes, None, torch.rand(n, device=device) * 0.05)
        codes = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, device=device)
        return Part(n, codes, None, torch.rand(n * k // 64, device=device) * 0.05)

    def matrix(rows: tuple[int, ...], k: int, kind: str = form) -> Any:
        return Matrix(kind, k, tuple(part(n, k, kind) for n in rows))

    norm = Norm("rms", torch.ones(s["width"], dtype=torch.bfloat16, device=device), 1e-5)
    inner, inv_freq = s["heads"] * s["size"], 1e4 ** (-torch.arange(0, s["size"], 2, device=device) / s["size"])
    heads = Heads(s["heads"], s["kv"], s["size"], s["size"] ** -0.5, None, inv_freq)
    layers = tuple(
        Layer(
            SEQUENTIAL, (norm, None, norm, None), matrix((inner, *(s["kv"] * s["size"],) * 2), s["width"]), heads,
            matrix((s["width"],), inner), matrix((s["inner"],) * 2, s["width"]), True, "silu",
            matrix((s["width"],), s["inner"]),
        )
        for _ in range(s["layers"])
    )  # fmt: skip
    table = torch.empty(s["vocabulary"], s["width"], dtype=torch.bfloat16, device=device).normal_(0, 1)
    made = Structure(table, layers, norm, matrix((s["vocabulary"],), s["width"], "16bit"))
    context.kept[model, form] = made
    return made
