"""The kernels of a model's generation, compiled in threads before they are asked for.

A model that gets our ``generate`` begins with what any request will need, the first request of a batch size with the
rest, beside its prefill. What is guessed wrong here is compiled when it is launched, as anything else is.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch

from onegpu.engine.fused_step import FusedStep, plan
from onegpu.kernels import ahead, attention, decode_attention, next_token, warmup  # noqa: F401 (they register)
from onegpu.kernels.guard import architecture

# Queries: attention has a kernel for a single one (in the step that a captured one is compared with), one for few tiles
# and one for many.
_QUERIES = (1, 128, 1024)
_MOST = 4096  # tokens of all prompts; more run the same kernels
_MOST_ROWS = 1024  # of products
_IMPLEMENTATION = "onegpu"  # of attention, as transformers knows it
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def begin(model: Any, batch: int = 1, prompt: int | None = None, keys: int | None = None) -> None:
    """Start compiling, and return at once. Nothing happens for a model that is not on one GPU.

    Args:
        model: an optimised one.
        batch: rows of a step, padded. prompt: tokens of a prompt, None for any. keys: positions of the cache. With both
            known, what depends on them is compiled too, quantised products among it.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or model.dtype not in _FLOATS or (device := devices.pop()).type != "cuda":
        return
    # Where there is no memory to try an op in, the first call compiles what it needs.
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        _begin(model, device, batch, prompt, keys)


def _begin(model: Any, device: torch.device, batch: int, prompt: int | None, keys: int | None) -> None:
    dtype = model.dtype
    lengths = _QUERIES if prompt is None else (1, max(1, min(prompt, _MOST // batch)))
    for kind, sizes, rows in _shapes(model, batch):  # attention takes longest: first
        warmup.begin(rows=lengths if rows is None else (rows,), shapes=[(kind, sizes)], device=device, dtype=dtype)
    step = plan(model)
    fused = isinstance(step, FusedStep) and step.serves(batch)
    if keys is None:  # products are tried on memory of their size: not before the model is used
        small = {(k, *sorted(s.items())): (k, s) for k, s in _of_modules(model) if k.endswith(("_norm", "_mlp"))}
        warmup.begin(rows=(1,), shapes=small.values(), device=device, dtype=dtype)
    else:
        many = min(batch * lengths[-1], _MOST_ROWS)
        warmup.begin(rows=(batch, many), shapes=_of_modules(model), device=device, dtype=dtype)
        sizes = _attention(model)
        if sizes and not fused:
            window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None) or 0
            sizes |= {"keys": keys, "window": window}
            warmup.begin(rows=(batch,), shapes=[("decode_attention", sizes)], device=device, dtype=dtype)
    if isinstance(step, FusedStep) and fused:
        heads = step.structure.layers[0].heads
        cache = torch.empty(batch, heads.kv, 128, heads.size, dtype=dtype, device=device)
        target = architecture(cache.get_device())
        ahead.start(partial(kernel.compile_ahead, target) for kernel in step.kernels(batch, (cache, cache)))


def ops(model: Any) -> list[warmup.Shape]:
    """The ops of a prefill and of a step that no module of the model tells of, with their sizes."""
    return [(kind, sizes) for kind, sizes, _ in _shapes(model, 1)]


def _of_modules(model: Any) -> list[warmup.Shape]:
    return [shape for m in model.modules() if hasattr(m, "warmup_shapes") for shape in m.warmup_shapes()]


def _shapes(model: Any, batch: int) -> list[tuple[str, dict[str, Any], int | None]]:
    """Ops, their sizes, and their rows (None: of a prompt)."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    found: list[tuple[str, dict[str, Any], int | None]] = []
    if sizes := _attention(model):
        kv = sizes.pop("kv_heads")
        found.append(("attention", {**sizes, "heads_kv": kv, "d_v": sizes["d"], "batch": batch}, None))
    return [*found, *(("next_token", {"vocab": vocab, "pads": pads}, batch) for pads in (False, True))]


def _attention(model: Any) -> dict[str, Any]:
    """Heads and their size, where attention goes through transformers' interface to ours; else nothing."""
    config = model.config.get_text_config(decoder=True)
    heads, width = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    if not heads or not width or getattr(config, "_attn_implementation", None) != _IMPLEMENTATION:
        return {}
    return {
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "d": getattr(config, "head_dim", None) or width // heads,
    }
