"""The decoding step in five kernels a layer (four of Falcon) of other models' shapes: share of what their bytes allow.

Falcon-7B: LayerNorm, 71 query heads on one key head, attention and MLP of one input. BLOOM-7B1: biases, ALiBi, heads
in turn. Gemma-2-9B: norms around everything, heads of 256, softcaps, a window of 4096 in every other layer. The output
heads of the last two are large: 2.1 and 1.8 GB in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.case import Case, Context, Sides
from benchmarks.cases import fused_step

_SHAPES: dict[str, dict[str, Any]] = {
    "Falcon-7B": {"layers": 32, "width": 4544, "inner": 18176, "heads": (71, 1, 64), "vocabulary": 65024},
    "BLOOM-7B1": {"layers": 30, "width": 4096, "inner": 16384, "heads": (32, 32, 128), "vocabulary": 250880},
    "Gemma-2-9B": {"layers": 42, "width": 3584, "inner": 14336, "heads": (16, 8, 256), "vocabulary": 256000},
}
_TEST = "tests/engine/test_fused_models.py::test_the_kernels_are_the_definitions[{}-{}]"
_LIKE = {"Falcon-7B": "falcon-7b", "BLOOM-7B1": "bloom", "Gemma-2-9B": "gemma2"}  # name -> what the test calls it
_SOURCES = ("benchmarks/cases/fused_structures.py", *fused_step._SOURCES)


def cases() -> Iterator[Case]:
    """Formats of each model, which share its embedding."""
    for name in _SHAPES:
        for form in ("nf4", "int8", "16bit"):
            yield Case(
                "fused_structures", f"{name}, {form}", prepare=partial(_prepare, name, form), sources=_SOURCES,
                tests=(_TEST.format(_LIKE[name], form),), group=f"{name} {form}", seconds=3.0,
            )  # fmt: skip


def _prepare(name: str, form: str, context: Context) -> Sides:
    import torch

    from onegpu.engine.fused_step import FusedStep
    from onegpu.kernels.decode_step import cost

    found, cache = _structure(name, form, context), 32 if context.tiny else 512
    one = {"device": context.device}
    ids, at = torch.ones(1, 1, dtype=torch.int64, **one), torch.tensor([cache], **one)
    heads = found.layers[0].heads
    shape = (2, 1, heads.kv, cache + 8, heads.size)
    memory = [tuple(torch.randn(shape, **one).to(found.dtype)) for _ in found.layers]
    ours, ordinary = (partial(FusedStep(found, pdl), ids, at, at, memory) for pdl in (True, False))
    costs = [cost(matrix, 1) for matrix in found.matrices()]
    moved = sum(c[0] for c in costs) + 4 * cache * heads.kv * heads.size * len(found.layers)
    sizes = {"rows": 1, "cache": cache, "dtype": "bfloat16", "weights": form}
    return Sides([ours], {fused_step._WITHOUT: [ordinary]}, moved, sum(c[1] for c in costs), shape=sizes)


def _structure(name: str, form: str, context: Context) -> Any:
    """Random weights of the shape; the head is the embedding, in bfloat16."""
    import torch

    from onegpu.engine.fused_structure import PARALLEL, SEQUENTIAL, Layer, Structure
    from onegpu.kernels.decode_step import Heads, Matrix, Norm, Part

    s = {**_SHAPES[name], **({"layers": 1, "width": 128, "inner": 64, "vocabulary": 70} if context.tiny else {})}
    query, kv, size = (s["heads"][0] // s["heads"][1], 1, 64) if context.tiny else s["heads"]
    one, bloom, gemma = {"device": context.device}, name.startswith("BLOOM"), name.startswith("Gemma")

    def vector(n: int) -> Any:
        return torch.rand(n, **one).to(torch.bfloat16)

    def norm() -> Norm:
        width = s["width"]
        return Norm("rms", vector(width), 1e-6, one=1.0) if gemma else Norm("layer", vector(width), 1e-5, vector(width))

    def matrix(*rows: int, columns: int) -> Matrix:
        return Matrix(form, columns, tuple(part(n, columns) for n in rows))

    def part(n: int, k: int) -> Part:
        bias = vector(n) if bloom else None
        if form == "16bit":
            return Part(n, torch.empty(n, k, dtype=torch.bfloat16, **one).normal_(0, 0.02), bias)
        if form == "int8":
            codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, **one)
            return Part(n, codes, bias, torch.rand(n, **one) * 0.05)
        codes = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, **one)
        return Part(n, codes, bias, torch.rand(n * k // 64, **one) * 0.05)

    def layer(index: int) -> Layer:
        first, qkv = norm(), [query * size, kv * size, kv * size]
        norms = (first, norm(), norm(), norm()) if gemma else (first, None, norm() if bloom else first, None)
        heads = Heads(query, kv, size, size**-0.5, inv_freq=inv_freq, grouped=not gemma)
        if bloom:
            heads = heads._replace(inv_freq=None, slopes=torch.rand(query, **one) * 0.1)
        if gemma:
            heads = heads._replace(cap=50.0, window=None if index % 2 else 4096)
        up = [s["inner"]] * (1 + gemma)
        return Layer(
            SEQUENTIAL if bloom or gemma else PARALLEL, norms,
            matrix(*(qkv if gemma else [sum(qkv)]), columns=s["width"]), heads,
            matrix(s["width"], columns=query * size), matrix(*up, columns=s["width"]), gemma,
            "gelu_tanh" if bloom or gemma else "gelu", matrix(s["width"], columns=s["inner"]),
        )  # fmt: skip

    inv_freq = 1e4 ** (-torch.arange(0, size, 2, **one) / size)
    table = torch.empty(s["vocabulary"], s["width"], dtype=torch.bfloat16, **one).normal_(0, 0.02)
    head = Matrix("16bit", s["width"], (Part(s["vocabulary"], table),))
    layers = tuple(map(layer, range(s["layers"])))
    return Structure(
        table, layers, norm(), head, scale=60.0 if gemma else 1.0, embedding_norm=norm() if bloom else None,
        cap=30.0 if gemma else 0.0,
    )  # fmt: skip
