"""The kernels of a model's generation, compiled in threads before they are asked for.

A model begins before its conversion with what that needs and with what its weights already tell of its generation, and
when it gets our ``generate`` with what else any request will need; the first request of a batch size with the rest,
beside its prefill. Attention to long prompts is begun by a first request that has one: earlier, its front end
would take Python's lock from requests that need none. What is guessed wrong here is compiled when it is launched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import skip_init

from onegpu.convert.quantized import find_targets, is_conv1d
from onegpu.convert.rules import quantize_linear
from onegpu.engine.fused_step import FusedStep, plan
from onegpu.formats.bitsandbytes import Settings
from onegpu.kernels import ahead, attention, decode_attention, few_rows, next_token, warmup  # noqa: F401 (they register)
from onegpu.kernels.decode_step import Matrix, Part
from onegpu.kernels.guard import architecture

# Rows of a prompt and of the step that a captured one is compared with: products have kernels by the number of rows,
# attention for few tiles and for a single query (unless it is the Hopper one).
_QUERIES = (128, 1)
_MOST = 4096  # tokens of all prompts; more run the same kernels
_MOST_ROWS = 1024  # of products
_PRODUCTS = {"linear_4bit": "4bit", "linear_int8": "int8"}  # by op: their format, as few_rows names it
_IMPLEMENTATION = "onegpu"  # of attention, as transformers knows it
_BLOCK = 64  # weights of a 4-bit scale, as `Linear4bit` makes them
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def begin(
    model: Any, batch: int = 1, prompt: int | None = None, keys: int | None = None, begun: bool = False
) -> bool:  # fmt: skip
    """Start compiling, and return at once. False, and nothing happens, for a model that is not on one GPU.

    Args:
        model: an optimised one.
        batch: rows of a step, padded. prompt: tokens of a prompt, None for any. keys: positions of the cache. With both
            known, what depends on them is compiled too, quantised products among it.
        begun: whether it was called for a single row of any prompt, as the model now is.
    """
    device = _device(model)
    if device is not None:
        # Where there is no memory to try an op in, the first call compiles what it needs.
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            ahead.start(_jobs(model, device, batch, prompt, keys, begun and batch == 1))
    return device is not None


def begin_conversion(model: Any, settings: Settings | None = None) -> None:
    """Start compiling, before a model is converted, what that will wait for, then what takes longest of the rest.

    Args:
        model: as transformers made it. If it then keeps its own attention, or gets another step than is foreseen here,
            the seconds of a thread are lost.
        settings: how it will be quantised, or None.
    """
    device = _device(model)
    if device is None:
        return
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        linears: list[Any] = []
        if settings is not None and not getattr(model, "is_quantized", False):
            targets, _ = find_targets(model, settings)
            linears = [model.get_submodule(target.name) for target in targets if target.kind == "linear"]
            ahead.start(_quantizing(linears, settings, device, model.dtype))
        if model.dtype == torch.float32:
            return
        if sizes := _heads(model):
            shapes = [("attention", {**sizes, "padded": False})]
            ahead.start(warmup.jobs(rows=_QUERIES, shapes=shapes, device=device, dtype=model.dtype))
        step = plan(model)
        if settings is not None and isinstance(step, FusedStep):
            step = foreseen(step, linears, settings)
        if isinstance(step, FusedStep) and step.serves(1):
            ahead.start(_step_jobs(step, 1))
        if settings is not None:
            ahead.start(_products(linears, settings, device, model.dtype))


def foreseen(step: FusedStep, linears: Iterable[Any], settings: Settings) -> FusedStep:
    """The step that a model will have once these layers are quantised. Its weights are on the meta device."""
    memory = {linear.weight.untyped_storage().data_ptr() for linear in linears}

    def matrix(old: Matrix | None) -> Any:
        if old is None or not all(part.weight.untyped_storage().data_ptr() in memory for part in old.parts):
            return old
        parts = tuple(_codes(part, old.columns, settings) for part in old.parts)
        return Matrix(settings.quant_type, old.columns, parts)

    old = step.structure
    layers = tuple(
        replace(layer, **{name: matrix(getattr(layer, name)) for name in ("qkv", "out", "up", "down")})
        for layer in old.layers
    )
    others = {name: matrix(getattr(old, name)) for name in ("head", "project_in", "project_out")}
    return FusedStep(replace(old, layers=layers, **others))


def _codes(part: Part, columns: int, settings: Settings) -> Part:
    """Rows of a matrix as they will be stored."""
    empty = partial(torch.empty, device="meta")
    if settings.bits == 8:
        weight = empty(part.rows, columns, dtype=torch.int8)
        return part._replace(weight=weight, scales=empty(part.rows))
    weight, blocks = empty(part.rows * columns // 2, 1, dtype=torch.uint8), part.rows * columns // _BLOCK
    if not settings.double_quant:
        return part._replace(weight=weight, scales=empty(blocks))
    codes = empty(blocks, dtype=torch.uint8)
    return part._replace(weight=weight, scales=codes, nested=empty(-(-blocks // 256)), offset=empty(()))


def _quantizing(linears: list[Any], settings: Settings, device: torch.device, dtype: torch.dtype) -> list[ahead.Job]:
    """What quantising such layers compiles; a kernel of int8 is one for each number of columns."""
    widths = dict.fromkeys(_size(linear)[1] for linear in linears)
    with ahead.collecting() as found:
        for k in list(widths) if settings.bits == 8 else list(widths)[:1]:
            quantize_linear(skip_init(nn.Linear, k, 16, bias=False, device=device, dtype=dtype), settings)
    return found


def _products(linears: list[Any], settings: Settings, device: torch.device, dtype: torch.dtype) -> list[ahead.Job]:
    """What such layers will compile, of a prompt first."""
    fmt, more = "int8", cast("dict[str, Any]", {})
    if settings.bits == 4:
        fmt, more = "4bit", {"quant_type": settings.quant_type, "nested": settings.double_quant}
    sizes = dict.fromkeys(map(_size, linears))
    return [job for m in _QUERIES for n, k in sizes for job in few_rows.jobs(fmt, m, device, dtype, n=n, k=k, **more)]


def _size(linear: Any) -> tuple[int, int]:
    """N and K of a layer."""
    n, k = linear.weight.shape
    return (k, n) if is_conv1d(linear) else (n, k)


def _step_jobs(step: FusedStep, batch: int, room: int = 128) -> list[ahead.Job]:
    """Its kernels; attention first, which takes twice as long as any other."""
    found, heads = step.structure, step.structure.layers[0].heads
    cache = torch.empty(batch, heads.kv, 1, heads.size, dtype=found.dtype, device=found.device)
    cache = cache.expand(-1, -1, room, -1)
    target = architecture(cache.get_device())
    kernels = sorted(step.kernels(batch, (cache, cache)), key=lambda kernel: kernel.name != "attend")
    return [partial(kernel.compile_ahead, target) for kernel in kernels]


def _device(model: Any) -> torch.device | None:
    """The one GPU that a model is on, in a dtype that kernels take."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or model.dtype not in _FLOATS:
        return None
    device = devices.pop()
    return device if device.type == "cuda" else None


def _jobs(
    model: Any, device: torch.device, batch: int, prompt: int | None, keys: int | None, begun: bool
) -> list[ahead.Job]:  # fmt: skip
    """What is compiled, in this order: what the first short request needs, then what others do."""
    dtype = model.dtype

    def jobs(rows: tuple[int, ...], shapes: Iterable[warmup.Shape]) -> list[ahead.Job]:
        return warmup.jobs(rows=rows, shapes=shapes, device=device, dtype=dtype)

    lengths = _QUERIES if prompt is None else (max(1, min(prompt, _MOST // batch)), 1)
    outside: list[ahead.Job] = []  # NVRTC's come first: it leaves Python's lock to the others
    found: list[ahead.Job] = []
    tokens: list[ahead.Job] = []  # the choice of one, when all else of a prefill is done
    later: list[ahead.Job] = []
    step = plan(model)
    fused = isinstance(step, FusedStep) and step.serves(batch)
    for kind, sizes, rows in _shapes(model, batch):  # of Triton's, attention takes longest: first
        if rows is None:
            if not begun or lengths[0] > _QUERIES[0]:
                found += jobs(lengths, [(kind, sizes | {"padded": False})])
            if batch > 1:
                later += jobs(lengths, [(kind, sizes | {"padded": True})])
        elif not begun:
            tokens += jobs((rows,), [(kind, sizes)])
    if keys is None:  # products are not tried on memory of their size before the model is used
        unlike = {(k, *sorted(s.items())): (k, s) for k, s in _of_modules(model)}.values()
        found += jobs((1,), [(kind, sizes) for kind, sizes in unlike if kind not in _PRODUCTS])
        for kind, sizes in unlike:
            if kind in _PRODUCTS:
                outside += [job for n in lengths for job in few_rows.jobs(_PRODUCTS[kind], n, device, dtype, **sizes)]
    else:
        found += jobs((batch, min(batch * lengths[0], _MOST_ROWS)), _of_modules(model))
        sizes = _attention(model)
        if sizes and not fused:
            window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None) or 0
            found += jobs((batch,), [("decode_attention", sizes | {"keys": keys, "window": window})])
    if isinstance(step, FusedStep) and fused and (keys or not begun):  # another attention where a cache has much room
        outside += _step_jobs(step, batch, keys or 128)
    return outside + found + tokens + later


def ops(model: Any) -> list[warmup.Shape]:
    """The ops of a prefill and of a step that no module of the model tells of, with their sizes."""
    return [(kind, sizes) for kind, sizes, _ in _shapes(model, 1)]


def _of_modules(model: Any) -> list[warmup.Shape]:
    return [shape for m in model.modules() if hasattr(m, "warmup_shapes") for shape in m.warmup_shapes()]


def _shapes(model: Any, batch: int) -> list[tuple[str, dict[str, Any], int | None]]:
    """Ops, their sizes, and their rows (None: of a prompt)."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    found: list[tuple[str, dict[str, Any], int | None]] = []
    if _attention(model):
        found.append(("attention", _heads(model) | {"batch": batch}, None))
    return [*found, *(("next_token", {"vocab": vocab, "pads": pads}, batch) for pads in (False, True))]


def _attention(model: Any) -> dict[str, Any]:
    """Heads and their size, where attention goes through transformers' interface to ours; else nothing."""
    sizes, config = _heads(model), model.config.get_text_config(decoder=True)
    if not sizes or getattr(config, "_attn_implementation", None) != _IMPLEMENTATION:
        return {}
    return {"heads": sizes["heads"], "kv_heads": sizes["heads_kv"], "d": sizes["d"]}


def _heads(model: Any) -> dict[str, Any]:
    """Heads and their size, where a config tells them."""
    config = model.config.get_text_config(decoder=True)
    heads, width = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    if not isinstance(heads, int) or not isinstance(width, int) or heads < 1:
        return {}
    kv = getattr(config, "num_key_value_heads", None) or heads
    d = getattr(config, "head_dim", None) or width // heads
    if not isinstance(kv, int) or heads % kv or not isinstance(d, int) or d < 1:
        return {}
    return {"heads": heads, "heads_kv": kv, "d": d, "d_v": d}
