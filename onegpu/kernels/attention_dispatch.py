"""What serves an attention on a GPU: the Hopper kernels, cuDNN where it was measured faster, the portable kernels.

What was settled for tensors of one layout is kept, so that the next call costs a look-up and a launch.
"""

from __future__ import annotations

from typing import Any

import torch

from onegpu.errors import bad_argument
from onegpu.kernels import ahead
from onegpu.kernels.attention_definition import Gradients, Options, backward, forward, forward_fake
from onegpu.kernels.library import has_triton

IMPLEMENTATIONS = ("auto", "definition", "portable", "hopper", "cudnn")
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_DIM = 256  # of the kernels

# Where cuDNN, through torch's SDPA, was measured faster than the Hopper kernels on an H100 (torch 2.11, Triton 3.6;
# rows of benchmarks/cases/attention.py and attention_sweep.py): (backward, head dim, causal): lengths. What was not
# measured is not here. A backward gets our log-sum-exp, which is natural as cuDNN's is. Backwards past 128 are portable
# otherwise: cuDNN won by far at 512 and 4096, and what it takes at 1024, 2048 and 8192 is in line with those.
CUDNN: dict[tuple[bool, int, bool], tuple[int, ...]] = {
    (False, 64, True): (512,),
    (False, 64, False): (512,),
    (False, 128, False): (512,),
    (False, 192, True): (4096,),
    (False, 192, False): (4096,),
    **{(True, d, causal): (512, 1024, 2048, 4096, 8192) for d in (192, 256) for causal in (True, False)},
}

_CUDNN_ELEMENTS = 1 << 25  # of q, in the smallest of those measurements; its 80 microseconds of host time are hidden
_ready: dict[tuple[Any, ...], Any] = {}  # by layout, what `attention_hopper` made


def _key(tensors: tuple[torch.Tensor | None, ...], rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that what is launched depends on, beside addresses."""
    key: list[Any] = []
    low = 0  # what the addresses are beyond a multiple of 16
    if rest[3] is not None or rest[4] is not None or rest[5] is not None or rest[6] is not None:
        tensors, rest = (*tensors, *rest[3:7]), rest[:3] + rest[7:]
    for x in tensors:
        if x is None:
            key.append(None)
        else:
            key += x.shape, x.stride(), x.dtype
            low = low << 4 | x.data_ptr() & 15
    return *key, low, tensors[0].get_device(), rest  # type: ignore[union-attr]


def plain(*tensors: torch.Tensor) -> bool:
    """Whether nothing watches ops: CUDA tensors without a subclass, no tracing, no mode, no function transform."""
    for x in tensors:
        if type(x) is not torch.Tensor or not x.is_cuda:
            return False
    watched = torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None
    return not watched and not torch.compiler.is_compiling()


def _keep(key: tuple[Any, ...], made: Any) -> None:
    if ahead.active():
        return
    if len(_ready) >= 1024:  # lengths that change from step to step
        _ready.clear()
    _ready[key] = made


def _rows(rest: tuple[Any, ...]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of queries and of keys, ranges or ends."""
    return (rest[3], rest[4]) if rest[5] is None else (rest[5], rest[6])


def _for_cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, widest: int, backward: bool
) -> bool:  # fmt: skip
    """Whether cuDNN serves: 16 bits, dense, as many keys as queries, causal or full, head dims to widest; grouped heads
    in a backward only.
    """
    if k.shape != v.shape or q.ndim != 4 or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or not (backward or q.shape[2] == k.shape[2]):
        return False
    dense = all(x is None for x in options[3:7])
    return dense and options.left < 0 and options.right <= 0 and q.shape[-1] % 8 == 0 and q.shape[-1] <= widest


def _cudnn_is_faster(q: torch.Tensor, options: Options, backward: bool) -> bool:
    lengths = CUDNN.get((backward, q.shape[-1], options.right == 0), ())
    return q.shape[1] in lengths and q.numel() >= _CUDNN_ELEMENTS and torch.backends.cuda.cudnn_sdp_enabled()


def by_cudnn() -> list[str]:
    """The entries of `CUDNN` in words, for ``onegpu env``."""
    return [
        f"{'backward' if back else 'forward'} D{d} {'causal' if causal else 'full'}, S {', '.join(map(str, lengths))}"
        for (back, d, causal), lengths in CUDNN.items()
    ]


def implementation(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, backward: bool = False,
    deterministic: bool = False,
) -> str:  # fmt: skip
    """What serves these inputs on a GPU: the name that was asked for, or the best for "auto"."""
    name = options.implementation
    kernels = has_triton() and q.dtype in _KERNEL_DTYPES and max(q.shape[-1], v.shape[-1]) <= _MAX_HEAD_DIM
    kernels = kernels and options.scale > 0 and q.numel() > 0 and v.numel() > 0
    if name == "definition" or (name == "auto" and not kernels):
        return "definition"
    hopper = cudnn = measured = False
    if kernels and name in ("auto", "hopper", "cudnn"):
        from onegpu.kernels import attention_hopper

        measured = attention_hopper.serves(q, k, v)
        hopper = measured and attention_hopper.serves(q, k, v, backward=backward)
        cudnn = _for_cudnn(q, k, v, options, 256 if measured else 128, backward) and not deterministic
    if name == "auto":
        if measured and cudnn and _cudnn_is_faster(q, options, backward):
            return "cudnn"
        return "hopper" if hopper else "portable"
    if backward and not {"hopper": hopper, "cudnn": cudnn}.get(name, kernels):
        return "portable"  # head dims past 128, and cuDNN where the same bits on every run are asked for
    if not {"hopper": hopper, "cudnn": cudnn}.get(name, kernels):
        fix = "Leave it out. Kernels take 16-bit (portable also float32) inputs, head dims to 256 and a positive scale"
        raise bad_argument("implementation", name, "cannot serve these inputs", fix)
    return name


def readable(x: torch.Tensor) -> torch.Tensor:
    """What the kernels read: the head dim side by side, rows that begin on 16 bytes; a copy where it is not so.

    Rows elsewhere would be loaded two bytes at a time, and what Triton 3.6 made of that was wrong on an H100.
    """
    *outer, last = x.stride()
    on_16_bytes = x.data_ptr() % 16 == 0
    for n, stride in zip(x.shape, outer, strict=False):
        on_16_bytes = on_16_bytes and (n == 1 or stride % 8 == 0)
    return x if last == 1 and on_16_bytes else x.clone(memory_format=torch.contiguous_format)


def padded(x: torch.Tensor) -> torch.Tensor:
    """With zeros behind each head, to a multiple of 8 columns: products and sums of both are the same."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 8))


def again(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rest: tuple[Any, ...]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What was settled for such tensors, with these; None where nothing was."""
    ready = _ready.get(_key((q, k, v), rest))
    return None if ready is None else ready(q, k, v, *_rows(rest))


def forward_cuda(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The op on CUDA tensors."""
    return again(q, k, v, rest) or _settle_forward(q, k, v, *rest)


def _settle_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = Options(*rest)
    if options.implementation == "definition":
        return forward(q, k, v, *rest)
    if q.shape[-1] % 8 or v.shape[-1] % 8:
        out, lse = forward_cuda(padded(q), padded(k), padded(v), *rest)
        return out[..., : v.shape[-1]].contiguous(), lse
    read = readable(q), readable(k), readable(v)
    if not (read[0] is q and read[1] is k and read[2] is v):
        return forward_cuda(*read, *rest)  # the copies' layout may be settled
    name = implementation(q, k, v, options)
    if name == "definition":
        return forward(q, k, v, *rest)
    if name == "cudnn":
        turned = (x.transpose(1, 2) for x in (q, k, v))
        made = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *turned, None, True, 0.0, options.right == 0, scale=options.scale
        )
        return made[0].transpose(1, 2).contiguous(), made[1].reshape(q.shape[0], q.shape[2], q.shape[1])
    if name == "hopper":
        from onegpu.kernels import attention_hopper

        ready = attention_hopper.forward(q, k, v, *rest[:-2])
        _keep(_key((q, k, v), rest), ready)
        return ready(q, k, v, *_rows(rest))
    from onegpu.kernels import attention_triton

    out, lse = forward_fake(q, k, v)
    attention_triton.forward(q, k, v, out, lse, *rest[:-2])
    return out, lse


def backward_cuda(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, deterministic: bool, *rest: Any,
) -> Gradients:  # fmt: skip
    """The gradients on CUDA tensors."""
    key = (*_key((q, k, v, grad, grad_lse), rest), deterministic)
    ready = _ready.get(key)
    if ready is None:
        return _settle_backward(key, grad, grad_lse, q, k, v, out, lse, deterministic, *rest)
    gradients = _gradients(q, k, v, rest[5] is not None)
    ready(grad, grad_lse, q, k, v, out, lse, gradients, *_rows(rest))
    return gradients


def _gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: bool) -> Gradients:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if packed:  # the kernels write the rows of sequences only
        for x in (dq, dk, dv):
            x.zero_()
    return dq, dk, dv


def _settle_backward(
    key: tuple[Any, ...], grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, deterministic: bool, *rest: Any,
) -> Gradients:  # fmt: skip
    options = Options(*rest)
    if options.implementation == "definition":
        return backward(grad, grad_lse, q, k, v, out, lse, deterministic, *rest)
    if q.shape[-1] % 8 or v.shape[-1] % 8:
        wide = [padded(x) for x in (q, k, v, out)]
        made = backward_cuda(padded(grad), grad_lse, wide[0], wide[1], wide[2], wide[3], lse, deterministic, *rest)
        dq, dk, dv = (x[..., : like.shape[-1]].contiguous() for x, like in zip(made, (q, k, v), strict=True))
        return dq, dk, dv
    read = readable(grad), readable(q), readable(k), readable(v)
    name = implementation(*read[1:], options, True, deterministic)
    if name == "hopper":
        from onegpu.kernels import attention_hopper

        read = attention_hopper.for_tma(read[0]), *read[1:]
    dlse = None if grad_lse is None else grad_lse.contiguous()
    if dlse is not grad_lse or any(x is not y for x, y in zip(read, (grad, q, k, v), strict=True)):
        return backward_cuda(read[0], dlse, *read[1:], out, lse, deterministic, *rest)  # the copies' may be settled
    if name == "definition":
        return backward(grad, grad_lse, q, k, v, out, lse, deterministic, *rest)
    if name == "cudnn" and grad_lse is None:
        turned = (x.transpose(1, 2) for x in (grad, q, k, v, out))
        seed = lse.new_empty(1, dtype=torch.int64)  # of a dropout that there is not
        n = q.shape[1]
        made = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *turned, lse[..., None], seed, seed, None, None, None, n, n, 0.0, options.right == 0, scale=options.scale
        )
        dq, dk, dv = (x.transpose(1, 2).contiguous() for x in made)
        return dq, dk, dv
    gradients = _gradients(q, k, v, options.cu_seqlens_q is not None)
    if name == "hopper":
        given = (out, lse, gradients, *rest[:-1])
        ready = attention_hopper.backward(grad, grad_lse, q, k, v, *given, deterministic=deterministic)
        ready(grad, grad_lse, q, k, v, out, lse, gradients, *_rows(rest))
        _keep(key, ready)
    else:
        from onegpu.kernels import attention_triton_backward

        attention_triton_backward.backward(grad, grad_lse, q, k, v, out, lse, gradients, *rest[:-1])
    return gradients
