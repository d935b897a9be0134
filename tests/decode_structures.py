"""Random decoder structures, as `onegpu.engine.fused_structure` reads them, for tests of the step's kernels."""

from __future__ import annotations

from typing import Any

import torch

from onegpu import functional
from onegpu.engine.fused_structure import SEQUENTIAL, Layer, Structure
from onegpu.kernels.decode_step import Heads, Matrix, Norm, Part

SIZES: dict[str, Any] = {"width": 128, "inner": 192, "query": 4, "kv": 2, "size": 32, "vocabulary": 70, "layers": 2}


def matrix(
    form: str,
    rows: tuple[int, ...],
    columns: int,
    dtype: torch.dtype,
    bias: bool = True,
    nested: bool = False,
    seed: int = 0,
) -> Matrix:
    """Random, with a part for each of `rows`; form as in `Matrix`, or "transposed"."""
    g = torch.Generator().manual_seed(seed)
    parts = []
    for n in rows:
        w = torch.randn(n, columns, generator=g) * columns**-0.5
        b = torch.randn(n, generator=g).mul(0.1).to(dtype) if bias else None
        if form in ("16bit", "transposed"):
            parts.append(Part(n, w.to(dtype) if form == "16bit" else w.to(dtype).t().contiguous(), b))
        elif form == "int8":
            codes, maxima, _ = functional.int8_vectorwise_quant(w.half())
            parts.append(Part(n, codes, b, maxima))
        else:
            packed, state = functional.quantize_4bit(w, quant_type=form, compress_statistics=nested, blocksize=64)
            stored = state.packed(packed)
            parts.append(Part(n, stored.weight, b, stored.absmax, stored.nested_absmax, stored.offset))
    if form == "transposed":
        return Matrix("16bit", columns, tuple(parts), transposed=True)
    return Matrix(form, columns, tuple(parts))


def structure(
    form: str = "16bit",
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = True,
    nested: bool = False,
    norms: bool = False,
    rotated: int | None = None,
    window: int | None = None,
    act: str = "silu",
    **sizes: int,
) -> Structure:
    """A random model; sizes override `SIZES`. rotated: values of a head that turn, all by default."""
    s = {**SIZES, **sizes}
    g = torch.Generator().manual_seed(1)
    gain = lambda n: (torch.rand(n, generator=g) + 0.5).to(dtype)  # noqa: E731
    norm = lambda: Norm("rms", gain(s["width"]), 1e-5)  # noqa: E731
    rotated = s["size"] if rotated is None else rotated
    inv_freq = 100.0 ** (-torch.arange(0, rotated, 2) / rotated) if rotated else None
    layers = []
    for i in range(s["layers"]):
        make = lambda rows, k, seed, i=i: matrix(form, rows, k, dtype, bias, nested, 10 * i + seed)  # noqa: E731
        heads = Heads(s["query"], s["kv"], s["size"], s["size"] ** -0.5, window, inv_freq, 1.0)
        if norms:
            heads = heads._replace(q_gain=gain(s["size"]), k_gain=gain(s["size"]), eps=1e-6)
        q, kv = s["query"] * s["size"], s["kv"] * s["size"]
        layers.append(
            Layer(
                SEQUENTIAL, (norm(), None, norm(), None), make((q, kv, kv), s["width"], 1), heads,
                make((s["width"],), q, 2), make((s["inner"],) * 2, s["width"], 3), True, act,
                make((s["width"],), s["inner"], 4),
            )
        )  # fmt: skip
    table = torch.randn(s["vocabulary"], s["width"], generator=g).to(dtype)
    head = matrix("16bit", (s["vocabulary"],), s["width"], dtype, False)
    return Structure(table, tuple(layers), norm(), head)


def caches(found: Structure, rows: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random keys and values for each layer."""
    heads, g = found.layers[0].heads, torch.Generator().manual_seed(2)
    make = lambda: torch.randn(rows, heads.kv, length, heads.size, generator=g).to(found.dtype)  # noqa: E731
    return [(make(), make()) for _ in found.layers]


def moved(value: Any, device: str, made: dict[int, Any] | None = None) -> Any:
    """A structure, or whatever it is made of, on another device; what is one object stays one."""
    made = {} if made is None else made
    if id(value) not in made:
        made[id(value)] = _moved(value, device, made)
    return made[id(value)]


def _moved(value: Any, device: str, made: dict[int, Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        items = [moved(item, device, made) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if hasattr(value, "__dataclass_fields__"):
        return type(value)(**{name: moved(getattr(value, name), device, made) for name in value.__dataclass_fields__})
    return value
