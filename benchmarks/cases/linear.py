"""Products with quantised weights at the shapes of Llama-2-7B's layers, beside cuBLAS in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.case import Case, Context, Sides

SHAPES = {"qkv": (12288, 4096), "o": (4096, 4096), "gate+up": (22016, 4096), "down": (4096, 11008)}  # (N, K)
ROWS = (1, 4, 16, 64)
_SOURCES = {
    "nf4": ("onegpu/kernels/linear_4bit.py", "onegpu/kernels/quant_4bit_triton.py"),
    "int8": ("onegpu/kernels/linear_int8.py", "onegpu/kernels/quant_int8_triton.py"),
}
_SHARED = ("benchmarks/cases/linear.py", "onegpu/kernels/linear_few_rows_triton.py", "onegpu/kernels/driver.py")
_TESTS = {
    "nf4": ("tests/kernels/test_linear_few_rows_triton.py::test_on_a_gpu",),
    "int8": ("tests/kernels/test_linear_few_rows_triton.py::test_on_a_gpu",),
}


def cases() -> Iterator[Case]:
    for kind in ("nf4", "int8"):
        for name, (n, k) in SHAPES.items():
            for m in ROWS:
                yield Case(
                    "linear",
                    f"{kind} {name} M={m}",
                    prepare=partial(_prepare, kind, n, k, m),
                    sources=(*_SOURCES[kind], *_SHARED),
                    tests=_TESTS[kind],
                    seconds=2,
                )


def _prepare(kind: str, n: int, k: int, m: int, context: Context) -> Sides:
    import torch
    from torch.nn.functional import linear

    from onegpu.kernels import linear_4bit, linear_int8

    if context.tiny:
        n, k = 64, 128
    make = {"device": context.device, "dtype": torch.bfloat16}
    x = torch.randn(m, k, **make)
    if kind == "nf4":
        bytes_, flops = linear_4bit.cost(m, n, k, 2, 64)
        ours = _nf4(x, n, k, context.copies(n * k // 2), context.device)
    else:
        bytes_, flops = linear_int8.cost(m, n, k, 2)
        ours = _int8(x, n, k, context.copies(n * k), context.device)
    dense = [torch.randn(n, k, **make) for _ in range(context.copies(2 * n * k))]
    cublas = [partial(linear, x, w) for w in dense]
    shape = {"m": m, "n": n, "k": k, "dtype": "bfloat16"}
    return Sides(ours, {"cuBLAS bf16": cublas}, bytes_, flops, 2 * (n * k + m * (n + k)), shape)


def _nf4(x: Any, n: int, k: int, copies: int, device: str) -> list[Any]:
    """Random codes: every byte is a pair of them."""
    import torch

    from onegpu.kernels.linear_4bit import Packed4bit, linear_4bit

    made = []
    for _ in range(copies):
        codes = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, device=device)
        absmax = torch.rand(n * k // 64, device=device) * 0.05
        made.append(partial(linear_4bit, x, Packed4bit(codes, absmax, 64, "nf4", (n, k))))
    return made


def _int8(x: Any, n: int, k: int, copies: int, device: str) -> list[Any]:
    import torch

    from onegpu.kernels.linear_int8 import linear_int8

    made = []
    for _ in range(copies):
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        made.append(partial(linear_int8, x, codes, torch.rand(n, device=device)))
    return made
