"""Products of few rows with 4-bit, int8 and 16-bit weights, beside cuBLAS in bfloat16 on the same machine.

Bounds and goals are those of an H100. fp4 and quantised scales are compared with plain nf4 instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.case import Case, Context, Sides

LLAMA2 = {"qkv": (12288, 4096), "o": (4096, 4096), "gate+up": (22016, 4096), "down": (4096, 11008)}  # (N, K)
OTHERS = {
    "Llama-3-8B gate+up": (28672, 4096), "Llama-3-8B down": (4096, 14336), "Mistral-7B qkv": (6144, 4096),
    "Qwen2.5-0.5B gate+up": (9728, 896), "Qwen2.5-0.5B down": (896, 4864),
    "Falcon-7B qkv": (4672, 4544), "Falcon-7B up": (18176, 4544), "Falcon-7B down": (4544, 18176),
}  # fmt: skip
# How many times as fast as cuBLAS: (bound, goal) by format and rows.
_FASTER = {
    ("nf4", 4): (1.8, 2.6), ("nf4", 8): (1.6, 2.4), ("nf4", 16): (1.6, 2.4), ("nf4", 64): (1.2, 1.9),
    ("int8", 1): (1.9, 2.0), ("int8", 16): (1.5, 1.9), ("int8", 64): (1.2, 1.6),
}  # fmt: skip
_NF4_ROW = {"qkv": (2.8, 3.3), "o": (1.9, 2.4), "gate+up": (3.2, 3.6), "down": (2.4, 3.0)}
_NEVER_SLOWER = 0.9  # up to 64 rows: past that the bound is what decoding the weights first would cost
_TABLE = (1, 4, 8, 16, 64)  # rows of the table that matters most: it comes first
_ROWS = {
    "nf4": (1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 33, 48, 64, 96, 128),
    "int8": (1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 33, 48, 64, 96, 128),
    "bf16": (1, 2, 3, 4, 5, 8),
}
_FORMATS = {"nf4": "4bit", "fp4": "4bit", "nested": "4bit", "int8": "int8", "bf16": "16bit"}
_OPS = {"4bit": "linear_4bit", "int8": "linear_int8", "16bit": "linear_16bit"}
_SHARED = tuple(
    f"onegpu/kernels/{name}"
    for name in (
        *("few_rows.py", "few_rows_table.py", "few_rows_common.cu", "few_rows_parts.cu", "few_rows_direct.cu"),
        *("few_rows_narrow.cu", "few_rows_resident.cu", "few_rows_stream.cu", "few_rows_stream.py"),
        *("few_rows_wide.cu", "few_rows_held.py", "few_rows_held.cu", "driver.py"),
    )
)
_TESTS = {
    "4bit": "tests/kernels/test_few_rows.py::test_the_products_of_the_table_on_a_gpu",
    "int8": "tests/kernels/test_few_rows.py::test_the_products_of_the_table_on_a_gpu",
    "16bit": "tests/kernels/test_linear_16bit.py::test_forward",
}


def cases() -> Iterator[Case]:
    """The table of nf4 and int8 first, then quantised scales, what else there is of rows, and other models' sizes."""
    for m in _TABLE:
        for kind in ("nf4", "int8"):
            for name in LLAMA2:
                yield _llama(kind, name, m)
    for kind, slower in (("nested", 1.05), ("fp4", 1.03)):
        for name in ("gate+up", "down"):
            for m in (1, 16, 64):
                yield _case(kind, name, LLAMA2[name], m, 1 / slower)
    for kind, rows in _ROWS.items():
        for name in LLAMA2:
            for m in rows:
                if kind == "bf16" or m not in _TABLE:
                    yield _llama(kind, name, m)
        for name, size in OTHERS.items():
            for m in (1, 4, 16, 64) if kind != "bf16" else (1, 4):
                yield _case(kind, name, size, m, _NEVER_SLOWER)


def _llama(kind: str, name: str, m: int) -> Case:
    never = _NEVER_SLOWER if m <= 64 else 0.5
    faster = _NF4_ROW[name] if (kind, m) == ("nf4", 1) else _FASTER.get((kind, m), (never, None))
    return _case(kind, name, LLAMA2[name], m, *faster)


def _case(kind: str, name: str, size: tuple[int, int], m: int, floor: float, goal: float | None = None) -> Case:
    fmt = _FORMATS[kind]
    return Case(
        "few_rows",
        f"{kind} {name} M={m}",
        prepare=partial(_prepare, kind, *size, m),
        sources=("benchmarks/cases/few_rows.py", f"onegpu/kernels/{_OPS[fmt]}.py", *_SHARED),
        tests=(_TESTS[fmt],),
        bound=1 / floor,
        goal=1 / goal if goal else None,
        seconds=0.5,
    )


def _prepare(kind: str, n: int, k: int, m: int, context: Context) -> Sides:
    import torch
    from torch.nn.functional import linear

    from onegpu.kernels import linear_4bit, linear_16bit, linear_int8

    if context.tiny:
        n, k = 64, 128
    x = torch.randn(m, k, device=context.device, dtype=torch.bfloat16)
    ours = _calls(kind, x, n, k, context)
    shape = {"m": m, "n": n, "k": k, "dtype": "bfloat16"}
    if kind == "int8":
        cost = linear_int8.cost(m, n, k, 2)
    else:
        cost = linear_16bit.cost(m, n, k, 2) if kind == "bf16" else linear_4bit.cost(m, n, k, 2, 64, kind == "nested")
    if kind in ("fp4", "nested"):
        return Sides(ours, {"nf4": _calls("nf4", x, n, k, context)}, *cost, linear_4bit.cost(m, n, k, 2, 64)[0], shape)
    dense = [torch.randn(n, k, device=context.device, dtype=torch.bfloat16) for _ in range(context.copies(2 * n * k))]
    peers = {"cuBLAS bf16": [partial(linear, x, w) for w in dense]}
    return Sides(ours, peers, *cost, linear_16bit.cost(m, n, k, 2)[0], shape)


def _calls(kind: str, x: Any, n: int, k: int, context: Context) -> list[Callable[[], Any]]:
    """One call for each copy of random weights: every byte is a pair of 4-bit codes."""
    import torch

    from onegpu.kernels.linear_4bit import Packed4bit, linear_4bit
    from onegpu.kernels.linear_16bit import linear_16bit
    from onegpu.kernels.linear_int8 import linear_int8

    device, made = context.device, []
    for _ in range(context.copies({"int8": n * k, "bf16": 2 * n * k}.get(kind, n * k // 2))):
        if kind == "bf16":
            made.append(partial(linear_16bit, x, torch.randn(n, k, device=device, dtype=x.dtype)))
        elif kind == "int8":
            codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
            made.append(partial(linear_int8, x, codes, torch.rand(n, device=device)))
        else:
            codes = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, device=device)
            blocks = n * k // 64
            packed = Packed4bit(codes, torch.rand(blocks, device=device), 64, "fp4" if kind == "fp4" else "nf4", (n, k))
            if kind == "nested":
                packed = packed._replace(
                    absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
                    nested_absmax=torch.rand(-(-blocks // 256), device=device),
                    offset=torch.rand((), device=device),
                )
            made.append(partial(linear_4bit, x, packed))
    return made
