"""Attention of a decoding step over a full cache, beside torch's own backends."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.case import Case, Context, Sides

# (batch, query heads, key heads, queries, head dim, cache), the most that the ratio to cuDNN may be, and what it should
SHAPES: dict[str, tuple[tuple[int, int, int, int, int, int], float | None, float | None]] = {
    "GQA 32:8, cache 32768": ((1, 32, 8, 1, 128, 32768), 1.0, 0.85),
    "MHA 32, cache 4096": ((1, 32, 32, 1, 128, 4096), 1.0, 0.85),
    "GQA 32:8, cache 4096, batch 16": ((16, 32, 8, 1, 128, 4096), 1.0, 0.95),
    "GQA 32:8, cache 4096": ((1, 32, 8, 1, 128, 4096), None, None),
    "MHA 32, cache 512": ((1, 32, 32, 1, 128, 512), None, None),
    "MQA 71:1 of 64, cache 4096, batch 4": ((4, 71, 1, 1, 64, 4096), None, None),
}


def cases() -> Iterator[Case]:
    for name, (shape, bound, goal) in SHAPES.items():
        yield Case(
            "decode_attention",
            name,
            prepare=partial(_prepare, shape),
            sources=(
                "benchmarks/cases/decode_attention.py",
                "onegpu/kernels/decode_attention.py",
                "onegpu/kernels/decode_attention_triton.py",
                "onegpu/kernels/decode_attention_cuda.py",
                "onegpu/kernels/decode_attention.cu",
                "onegpu/kernels/decode_step_common.cu",
                "onegpu/kernels/few_rows_common.cu",
                "onegpu/kernels/driver.py",
            ),
            tests=("tests/kernels/test_decode_attention.py::test_benchmarked_shapes_on_a_gpu",),
            bound=bound,
            goal=goal,
            seconds=2,
        )


def _prepare(shape: tuple[int, ...], context: Context) -> Sides:
    import torch

    from onegpu.kernels.decode_attention import cost, decode_attention

    b, h, h_kv, t, d, keys = shape
    if context.tiny:
        keys = 64
    make = {"device": context.device, "dtype": torch.bfloat16}
    q = torch.randn(b, h, t, d, **make)
    length = torch.full((b,), keys, dtype=torch.int32, device=context.device)
    copies = context.copies(4 * b * h_kv * keys * d)
    caches = [[torch.randn(b, h_kv, keys, d, **make) for _ in range(2)] for _ in range(copies)]
    ours = [partial(decode_attention, q, k, v, length) for k, v in caches]
    bytes_, flops = cost(b, h, h_kv, t, keys, d, d, 2)
    names = ("cuDNN", "flash") if context.device == "cuda" else ("math",)
    peers = {name: [partial(_torch, name, q, k, v) for k, v in caches] for name in names}
    sizes = dict(zip(("b", "h", "h_kv", "t", "d", "keys"), (b, h, h_kv, t, d, keys), strict=True))
    return Sides(ours, peers, bytes_, flops, shape={**sizes, "dtype": "bfloat16"})


def _torch(backend: str, q: Any, k: Any, v: Any) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    kinds = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    with sdpa_kernel(kinds[backend]):
        return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
