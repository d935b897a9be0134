"""Attention alone, forward and backward, beside torch's cuDNN and FlashAttention-2; windows, padding and packing beside
the same work on dense tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.case import Case, Context, Sides

# (B, H, S, D, causal): (floor, goal), as speed over cuDNN
FORWARD = {
    (4, 32, 4096, 128, True): (1.05, 1.15),
    (4, 32, 4096, 128, False): (1.0, 1.06),
    (1, 32, 16384, 128, True): (1.0, 1.12),
    (4, 64, 4096, 64, True): (0.93, 1.08),
    (4, 64, 4096, 64, False): (0.93, 1.08),
    (16, 32, 512, 128, True): (1.0, 1.15),
}
BACKWARD = {
    (4, 32, 4096, 128, True): (1.0, 1.15),
    (4, 32, 4096, 128, False): (0.97, 1.15),
    (1, 32, 16384, 128, True): (0.95, 1.1),
    (4, 64, 4096, 64, True): (0.95, 1.1),
    (4, 64, 4096, 64, False): (1.05, 1.1),
}
DISPATCHED = [(4, 64, 4096, 64, True), (4, 64, 4096, 64, False), (16, 32, 512, 128, True)]  # what cuDNN may serve
DISPATCHED_BACKWARD = [(4, 64, 4096, 64, True), (4, 64, 4096, 64, False), (1, 32, 16384, 128, True)]
DIMS = (72, 80, 96, 192, 256)  # floor 1.3 times FlashAttention-2
BACKWARD_DIMS = (72, 96, 192, 256)  # 72 and 96 in boxes of 128 columns, 192 and 256 by the portable kernels
IN_TURNS = [(4, 32, 4096, 128, True), (4, 32, 4096, 128, False), (4, 64, 4096, 64, True), (4, 64, 4096, 64, False)]
HALF = (*[2048] * 8, *[1024] * 8, *[512] * 16)  # 32 rows of 2048 of which half is padding
_FILES = ("attention", "attention_definition", "attention_dispatch", "attention_triton", "attention_triton_backward",
          "attention_hopper", "attention_sm90", "attention_sm90_few", "attention_sm90_parts", "attention_sm90_backward",
          "attention_sm90_rows", "attention_sm90_steps", "hopper")  # fmt: skip
KERNELS = tuple(f"onegpu/kernels/{name}.py" for name in _FILES)
_SOURCES = ("benchmarks/cases/attention.py", *KERNELS)
TESTS = ("tests/kernels/test_attention.py::test_padded_and_packed_are_unpadded_on_gpu",)


def cases() -> Iterator[Case]:
    make = partial(Case, "attention", sources=_SOURCES, tests=TESTS, ceiling="read", seconds=2)
    for shape, (floor, goal) in FORWARD.items():
        prepare = partial(_dense, shape, "cuDNN", own=True)
        yield make(f"forward {_name(*shape)}", prepare=prepare, bound=1 / floor, goal=1 / goal)
    for shape, (floor, goal) in BACKWARD.items():
        prepare = partial(_dense_backward, shape, own=True)
        yield make(f"backward {_name(*shape)}", prepare=prepare, bound=1 / floor, goal=1 / goal)
    for shape in IN_TURNS:
        yield make(f"deterministic backward {_name(*shape)}", prepare=partial(_in_turns, shape))
    for d in BACKWARD_DIMS:
        for causal in (True, False):
            shape = (4, 4096 // d, 4096, d, causal)
            yield make(f"backward {_name(*shape)}", prepare=partial(_dense_backward, shape))
    for shape in DISPATCHED:
        yield make(f"dispatch forward {_name(*shape)}", prepare=partial(_dense, shape, "cuDNN"), bound=1.0)
    for shape in DISPATCHED_BACKWARD:
        yield make(f"dispatch backward {_name(*shape)}", prepare=partial(_dense_backward, shape), bound=1.0)
    for d in DIMS:
        for causal in (True, False):
            shape = (4, 4096 // d, 4096, d, causal)
            yield make(f"forward {_name(*shape)}", prepare=partial(_dense, shape, "FlashAttention-2"), bound=1 / 1.3)
    yield make("window 1024 of 16384", prepare=_window, bound=1 / 0.85, goal=1 / 0.95)
    yield make("packed, lengths 512 and 2048", prepare=_packed, bound=1 / 0.85, goal=1 / 0.95)
    yield make("half padding, 32 x 2048", prepare=_padded, bound=1.15, goal=1.05)


def _name(batch: int, heads: int, length: int, d: int, causal: bool) -> str:
    return f"D{d} {'causal' if causal else 'full'} B{batch} H{heads} S{length}"


def _inputs(context: Context, *shape: int, count: int = 3) -> Any:
    import torch

    return [torch.randn(shape, device=context.device, dtype=torch.bfloat16) for _ in range(count)]


def _small(context: Context, shape: tuple[int, int, int, int, bool]) -> tuple[int, int, int, int, bool]:
    return (1, 2, 64, shape[3], shape[4]) if context.tiny else shape


def backends(context: Context) -> dict[str, Any]:
    """Torch's backends by name; on a CPU there is one."""
    from torch.nn.attention import SDPBackend

    if context.device != "cuda":
        return {"math": SDPBackend.MATH}
    return {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}


def _torch(backend: Any, q: Any, k: Any, v: Any, causal: bool) -> Any:
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    with sdpa_kernel(backend):
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)


def serves(call: Callable[[], Any]) -> bool:
    try:
        call()
    except RuntimeError as error:  # cuDNN, for some head dims and releases
        print(f"left out: {error}")
        return False
    return True


def implementation(own: bool, context: Context) -> str | None:
    """Our own kernels by name on Hopper, where "auto" may call cuDNN."""
    import torch

    hopper = context.device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    return "hopper" if own and hopper else None


def _dense(shape: tuple[int, int, int, int, bool], first: str, context: Context, own: bool = False) -> Sides:
    from onegpu.kernels.attention import attention, cost

    batch, heads, length, d, causal = _small(context, shape)
    moved, flops = cost(batch, length, length, heads, heads, d, d, 2, causal=causal)
    sets = [_inputs(context, batch, length, heads, d) for _ in range(min(context.copies(moved), 4))]
    peers = {}
    for name, backend in sorted(backends(context).items(), key=lambda item: item[0] != first):
        calls = [partial(_torch, backend, *tensors, causal) for tensors in sets]
        if serves(calls[0]):
            peers[name] = calls
    how = implementation(own, context)
    ours = [partial(attention, *tensors, causal=causal, implementation=how) for tensors in sets]
    sizes = {"batch": batch, "heads": heads, "length": length, "d": d, "causal": causal}
    return Sides(ours, peers, moved, flops, shape=sizes)


def _dense_backward(shape: tuple[int, int, int, int, bool], context: Context, own: bool = False) -> Sides:
    import torch

    from onegpu.kernels.attention import cost

    batch, heads, length, d, causal = _small(context, shape)
    moved, flops = cost(batch, length, length, heads, heads, d, d, 2, causal=causal, backward=True)
    given, ours = _own_backward(context, batch, heads, length, d, causal, implementation(own, context) or "auto")
    grad, _, q, k, v = given[:5]
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    aten, up = torch.ops.aten, grad.transpose(1, 2)
    if context.device == "cuda":
        peers = {}
        flash = aten._scaled_dot_product_flash_attention(*turned, 0.0, causal)
        if serves(partial(aten._scaled_dot_product_cudnn_attention, *turned, None, True, 0.0, causal)):
            cudnn = aten._scaled_dot_product_cudnn_attention(*turned, None, True, 0.0, causal)
            given = up, *turned, *cudnn[:2], *cudnn[6:8], None, *cudnn[2:6], 0.0, causal
            theirs = partial(aten._scaled_dot_product_cudnn_attention_backward, *given)
            peers |= {"cuDNN": [theirs]} if serves(theirs) else {}
        given = up, *turned, *flash[:6], 0.0, causal, *flash[6:8]
        peers["FlashAttention-2"] = [partial(aten._scaled_dot_product_flash_attention_backward, *given)]
    else:
        flash = aten._scaled_dot_product_flash_attention_for_cpu(*turned, 0.0, causal)
        given = up, *turned, *flash, 0.0, causal
        peers = {"CPU": [partial(aten._scaled_dot_product_flash_attention_for_cpu_backward, *given)]}
    sizes = {"batch": batch, "heads": heads, "length": length, "d": d, "causal": causal}
    return Sides([ours], peers, moved, flops, shape=sizes)


def _own_backward(
    context: Context, batch: int, heads: int, length: int, d: int, causal: bool, how: str
) -> tuple[list[Any], Callable[..., Any]]:
    """Arguments of the backward op, and the call with them."""
    import torch

    q, k, v, grad = _inputs(context, batch, length, heads, d, count=4)
    options = (d**-0.5, -1, 0 if causal else -1, None, None, None, None, length, length, how)
    out, lse = torch.ops.onegpu.attention_forward(q, k, v, *options)
    given = [grad, None, q, k, v, out, lse, False, *options]
    return given, partial(torch.ops.onegpu.attention_backward, *given)


def _in_turns(shape: tuple[int, int, int, int, bool], context: Context) -> Sides:
    """The same bits on every run, beside sums in any order, both by our own kernels."""
    import torch

    from onegpu.kernels.attention import cost

    batch, heads, length, d, causal = _small(context, shape)
    moved, flops = cost(batch, length, length, heads, heads, d, d, 2, causal=causal, backward=True)
    given, free = _own_backward(context, batch, heads, length, d, causal, implementation(True, context) or "auto")
    given[7] = True
    ours = partial(torch.ops.onegpu.attention_backward, *given)
    sizes = {"batch": batch, "heads": heads, "length": length, "d": d, "causal": causal}
    return Sides([ours], {"in any order": [free]}, moved, flops, shape=sizes)


def _window(context: Context) -> Sides:
    """Beside as many queries that all see 1024 keys and no others."""
    from onegpu.kernels.attention import attention, cost

    length, window, heads = (64, 16, 2) if context.tiny else (16384, 1024, 32)
    q, k, v = _inputs(context, 1, length, heads, 128)
    moved, flops = cost(1, length, window, heads, heads, 128, 128, 2)
    ours = [partial(attention, q, k, v, causal=True, window=(window - 1, 0))]
    dense = [partial(attention, q, k[:, :window], v[:, :window])]
    return Sides(ours, {"dense, same work": dense}, moved, flops, shape={"length": length, "window": window})


def _ragged(context: Context, lengths: tuple[int, ...], heads: int) -> tuple[list[Any], Any, int, int]:
    """Packed q, k and v of these lengths, their ends, bytes and FLOPs."""
    import torch

    from onegpu.kernels.attention import cost

    tensors = _inputs(context, sum(lengths), heads, 128)
    ends = torch.tensor((0, *lengths), device=context.device).cumsum(0, dtype=torch.int32)
    moved, flops = map(sum, zip(*(cost(1, n, n, heads, heads, 128, 128, 2, causal=True) for n in lengths), strict=True))
    return tensors, ends, moved, flops


def _packed(context: Context) -> Sides:
    """Beside a dense batch of lengths 1024 with the same number of products."""
    from onegpu.kernels.attention import attention

    unit, heads = (16, 2) if context.tiny else (512, 32)
    lengths = (*[4 * unit] * 4, *[unit] * 16)
    tensors, ends, moved, flops = _ragged(context, lengths, heads)
    options = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 4 * unit, "max_seqlen_k": 4 * unit}
    ours = [partial(attention, *tensors, causal=True, **options)]
    dense = [partial(attention, *_inputs(context, 20, 2 * unit, heads, 128), causal=True)]
    return Sides(ours, {"dense, same work": dense}, moved, flops, shape={"lengths": f"4 x {4 * unit}, 16 x {unit}"})


def _padded(context: Context) -> Sides:
    """Right-aligned rows in place, beside the same tokens packed."""
    import torch

    from onegpu.kernels.attention import attention

    lengths, heads = (tuple(n // 32 for n in HALF), 2) if context.tiny else (HALF, 32)
    packed, ends, moved, flops = _ragged(context, lengths, heads)
    longest = max(lengths)
    rows = torch.tensor([(longest - n, n) for n in lengths], dtype=torch.int32, device=context.device)
    padded = _inputs(context, len(lengths), longest, heads, 128)
    ours = [partial(attention, *padded, causal=True, q_range=rows, k_range=rows)]
    options = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}
    peer = [partial(attention, *packed, causal=True, **options)]
    return Sides(ours, {"packed": peer}, moved, flops, shape={"rows": len(lengths), "length": longest})
