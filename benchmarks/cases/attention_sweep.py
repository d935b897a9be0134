"""The sweep of attention: our own kernels beside torch's three backends, over the length with as many tokens, and over
the batch. Nothing is judged; the rows are what dispatch is chosen from, and what the plots show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from benchmarks.case import Case, Context, Sides
from benchmarks.cases import attention as dense

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
TOKENS = 16384  # batch x length, but for the longest
BATCHES = (1, 2, 4, 8, 16)
KINDS = ((128, 16, 16, True), (64, 32, 32, True), (128, 32, 8, True), (128, 16, 16, False), (64, 32, 32, False))
_SOURCES = ("benchmarks/cases/attention_sweep.py", *dense.KERNELS)


class Shape(NamedTuple):
    batch: int
    heads: int
    heads_kv: int
    length: int
    d: int
    causal: bool

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.heads_kv else f"{self.heads}:{self.heads_kv}"
        return f"D{self.d} {'causal' if self.causal else 'full'} B{self.batch} H{heads} S{self.length}"


def cases() -> Iterator[Case]:
    """Lengths first, both directions of one shape after the other."""
    make = partial(Case, "attention", sources=_SOURCES, tests=dense.TESTS, ceiling="read", seconds=0.7)
    for d, heads, heads_kv, causal in KINDS:
        for length in LENGTHS:
            shape = Shape(max(1, TOKENS // length), heads, heads_kv, length, d, causal)
            yield make(f"sweep forward {shape}", prepare=partial(_forward, shape))
            yield make(f"sweep backward {shape}", prepare=partial(_backward, shape))
    for batch in BATCHES:
        shape = Shape(batch, 32, 32, 2048, 128, True)
        yield make(f"batches forward {shape}", prepare=partial(_forward, shape))
        yield make(f"batches backward {shape}", prepare=partial(_backward, shape))


def _small(context: Context, shape: Shape) -> Shape:
    return (
        shape._replace(batch=1, heads=4, heads_kv=4 * shape.heads_kv // shape.heads, length=64)
        if context.tiny
        else shape
    )


def _inputs(context: Context, shape: Shape) -> list[Any]:
    """q, k, v and the gradient of the output, ``[B, S, H, D]``."""
    import torch

    make = partial(torch.randn, device=context.device, dtype=torch.bfloat16)
    heads = (shape.heads, shape.heads_kv, shape.heads_kv, shape.heads)
    return [make(shape.batch, shape.length, n, shape.d) for n in heads]


def _backends(context: Context) -> dict[str, Any]:
    from torch.nn.attention import SDPBackend

    return dense.backends(context) | ({"memory-efficient": SDPBackend.EFFICIENT_ATTENTION} if _on_gpu(context) else {})


def _on_gpu(context: Context) -> bool:
    return context.device == "cuda"


def _sizes(shape: Shape) -> dict[str, Any]:
    return dict(shape._asdict())


def _sdpa(backend: Any, q: Any, k: Any, v: Any, shape: Shape) -> Any:
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    grouped = {"enable_gqa": True} if shape.heads != shape.heads_kv else {}
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=shape.causal, **grouped)


def _forward(shape: Shape, context: Context) -> Sides:
    from onegpu.kernels.attention import attention, cost

    shape = _small(context, shape)
    sizes = (shape.batch, shape.length, shape.length, shape.heads, shape.heads_kv, shape.d, shape.d)
    moved, flops = cost(*sizes, 2, causal=shape.causal)
    sets = [_inputs(context, shape)[:3] for _ in range(min(context.copies(moved), 4))]
    peers = {}
    for name, backend in _backends(context).items():
        calls = [partial(_sdpa, backend, *tensors, shape) for tensors in sets]
        if dense.serves(calls[0]):
            peers[name] = calls
    how = dense.implementation(True, context)
    ours = [partial(attention, *tensors, causal=shape.causal, implementation=how) for tensors in sets]
    return Sides(ours, peers, moved, flops, shape=_sizes(shape))


def _backward(shape: Shape, context: Context) -> Sides:
    """Ours by its op, the peers by torch's: what autograd calls, without its bookkeeping."""
    import torch

    from onegpu.kernels.attention import cost

    shape = _small(context, shape)
    sizes = (shape.batch, shape.length, shape.length, shape.heads, shape.heads_kv, shape.d, shape.d)
    moved, flops = cost(*sizes, 2, causal=shape.causal, backward=True)
    q, k, v, grad = _inputs(context, shape)
    how = dense.implementation(True, context) or "auto"
    length = shape.length
    options = (shape.d**-0.5, -1, 0 if shape.causal else -1, None, None, None, None, length, length, how)
    out, lse = torch.ops.onegpu.attention_forward(q, k, v, *options)
    ours = partial(torch.ops.onegpu.attention_backward, grad, None, q, k, v, out, lse, False, *options)
    turned = [x.transpose(1, 2) for x in (grad, q, k, v)]
    peers: dict[str, list[Callable[[], Any]]] = {}
    for name, backend in _backends(context).items():
        # What the public function refuses (grouped heads, for one) is not asked of the op below it.
        if not dense.serves(partial(_sdpa, backend, q, k, v, shape)):
            continue
        made: list[Callable[[], Any]] = []
        if dense.serves(lambda name=name, made=made: made.append(_PEERS[name](*turned, shape.causal))) and (
            dense.serves(made[0])
        ):
            peers[name] = made
    return Sides([ours], peers, moved, flops, shape=_sizes(shape))


def _cudnn(up: Any, q: Any, k: Any, v: Any, causal: bool) -> Callable[[], Any]:
    from torch import ops

    made = ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)
    given = (up, q, k, v, *made[:2], *made[6:8], None, *made[2:6], 0.0, causal)
    return partial(ops.aten._scaled_dot_product_cudnn_attention_backward, *given)


def _flash(up: Any, q: Any, k: Any, v: Any, causal: bool) -> Callable[[], Any]:
    from torch import ops

    made = ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    given = (up, q, k, v, *made[:6], 0.0, causal, *made[6:8])
    return partial(ops.aten._scaled_dot_product_flash_attention_backward, *given)


def _efficient(up: Any, q: Any, k: Any, v: Any, causal: bool) -> Callable[[], Any]:
    from torch import ops

    made = ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
    given = (up, q, k, v, None, *made, 0.0, [True, True, True, False], causal)
    return partial(ops.aten._scaled_dot_product_efficient_attention_backward, *given)


def _math(up: Any, q: Any, k: Any, v: Any, causal: bool) -> Callable[[], Any]:
    """On a CPU, where the "math" backend has no backward op of its own: torch's flash attention for the CPU."""
    from torch import ops

    made = ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    given = (up, q, k, v, *made, 0.0, causal)
    return partial(ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, *given)


_PEERS = {"cuDNN": _cudnn, "FlashAttention-2": _flash, "memory-efficient": _efficient, "math": _math}
