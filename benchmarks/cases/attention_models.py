"""Attention in whole models: forwards of two 7B shapes beside transformers' own, over batch and padding; and what
attention needs in memory beyond its inputs and outputs, over the length of a sequence."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks import models
from benchmarks.case import Case, Context
from benchmarks.spread import paired_ratio, spread

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
BATCHES = (1, 2, 4)
PADDED = ((8, 2048), (16, 256))
SHARES = (0, 30, 50)  # percent
_HEADS, _DIM = 8, 128
_FILES = ("kernels", "nn/attention.py", "nn/attention_mask.py", "nn/attention_context.py", "convert")
_SOURCES = ("benchmarks/cases/attention_models.py", *(f"onegpu/{name}" for name in _FILES))
_TESTS = ("tests/nn/test_attention.py::test_on_a_gpu_ranges_and_packing",)


def cases() -> Iterator[Case]:
    """Llama first: its cases share a model, as Falcon's do."""
    make = partial(Case, "attention_model", sources=_SOURCES, tests=_TESTS)
    for batch in BATCHES:
        measure = partial(dense, "Llama-2-7B", ("sdpa", "eager"), batch)
        name = f"Llama-2-7B batch {batch} x 4096"
        yield make(name, measure=measure, bound=1 / 1.02, goal=1 / 1.1, seconds=4 * batch, group="Llama-2-7B attention")
        measure = partial(dense, "Llama-2-7B", ("sdpa",), batch, ours="optimize")
        name = f"Llama-2-7B by optimize() batch {batch} x 4096"
        yield make(name, measure=measure, bound=1 / 1.02, goal=1 / 1.1, seconds=2 * batch, group="Llama-2-7B attention")
    for batch, length in PADDED:
        for share in SHARES:
            for who, ours in ((" by optimize()", {"ours": "optimize"}), ("", {})):
                measure = partial(padded, "Llama-2-7B", batch, length, share, **ours)
                name = f"Llama-2-7B{who} batch {batch} x {length}, {share} % padding"
                seconds = 6 if batch == 8 else 3
                yield make(name, measure=measure, bound=1.0, seconds=seconds, group="Llama-2-7B attention")
    for batch in BATCHES:
        # sdpa takes twice eager's time there: once is enough.
        measure = partial(dense, "Falcon-7B", ("eager", "sdpa") if batch == 1 else ("eager",), batch)
        name = f"Falcon-7B batch {batch} x 4096"
        yield make(
            name,
            measure=measure,
            bound=1 / 3.5,
            goal=1 / 4.5,
            seconds=8 if batch == 1 else 4 * batch,
            group="Falcon-7B attention",
        )
    for length in LENGTHS:
        bound = 1 / 20 if length == LENGTHS[-1] else None
        yield make(f"memory, length {length}", measure=partial(memory, length), bound=bound, seconds=2)


def _model(shape: str, attention: str, context: Context) -> Any:
    """A model of this attention, "onegpu" or a name of transformers', or one after `onegpu.optimize`; all of one shape
    have the same weights."""
    import onegpu
    from onegpu.convert.attention_rule import UseAttention
    from onegpu.convert.optimize import State
    from onegpu.convert.report import Report

    if "plain" not in context.kept:
        context.kept["plain"] = models.plain(shape, context.device, context.tiny)
    if attention not in context.kept:
        plain = context.kept["plain"]
        made = copy.deepcopy(plain, {id(parameter): parameter for parameter in plain.parameters()})
        if attention == "optimize":
            onegpu.optimize(made)
        elif attention == "onegpu":
            report = Report("optimize")  # attention alone: `optimize` changes norms and MLPs too
            UseAttention().apply(made, None, State(), False, report)
            if len(report.swapped) != made.config.num_hidden_layers:
                raise RuntimeError(f"not every layer is converted: {report}")
        else:  # Falcon reads it at every forward, and has no setter
            made.config._attn_implementation_internal = attention
        context.kept[attention] = made
    return context.kept[attention]


def _forwards(
    shape: str, ours: str, peers: tuple[str, ...], inputs: dict[str, Any], context: Context
) -> dict[str, Any]:
    """Milliseconds of a forward, all logits, by events around it: host time that the device waits for is in it."""
    import torch

    deadline = time.perf_counter() + context.seconds

    def forward(model: Any) -> None:
        with torch.inference_mode():
            model(**inputs, use_cache=False)

    calls = {name: partial(forward, _model(shape, name, context)) for name in (ours, *peers)}
    for call in calls.values():
        call()  # whatever is set up once
    peaks = {name: _peak(call, context) for name, call in calls.items()}
    ms: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(3 if context.tiny else 7):
        for name in list(calls)[:: 1 if round_ % 2 == 0 else -1]:
            ms[name].append(_milliseconds(calls[name], context))
        if round_ >= 2 and time.perf_counter() > deadline:
            break
    found: dict[str, Any] = {name: {"ms": spread(ms[name]), "peak_bytes": peaks[name]} for name in calls}
    mine = found.pop(ours)
    others = {
        f"transformers, {name}": fields | {"ratio": paired_ratio(ms[ours], ms[name])} for name, fields in found.items()
    }
    peer = f"transformers, {peers[0]}"
    return {"peer": peer, "ours": mine, "theirs": others[peer], "peers": others, "ratio": others[peer]["ratio"]}


def _milliseconds(call: Callable[[], Any], context: Context) -> float:
    if context.device != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    import torch

    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))


def dense(shape: str, peers: tuple[str, ...], batch: int, context: Context, ours: str = "onegpu") -> dict[str, Any]:
    """A batch of full rows."""
    import torch

    length = 16 if context.tiny else 4096
    ids = torch.randint(3, _model(shape, ours, context).config.vocab_size, (batch, length), device=context.device)
    row = _forwards(shape, ours, peers, {"input_ids": ids}, context)
    return {**row, "shape": {"batch": batch, "length": length, "padding": 0}}


def padded(shape: str, batch: int, length: int, share: int, context: Context, ours: str = "onegpu") -> dict[str, Any]:
    """Rows of lengths spread evenly around the mean, padded on the left; the mask is given without padding too."""
    import torch

    length = 16 if context.tiny else length
    cut = torch.linspace(0, 2 * share / 100, batch).mul(length).round().long().clamp(max=length - 1)
    mask = (torch.arange(length) >= cut[:, None]).long().to(context.device)
    ids = torch.randint(3, _model(shape, ours, context).config.vocab_size, (batch, length), device=context.device)
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    row = _forwards(shape, ours, ("sdpa",), inputs, context)
    return {**row, "shape": {"batch": batch, "length": length, "padding": share}}


def _peak(call: Callable[[], Any], context: Context) -> int:
    """Bytes a call needs at most beyond what was there; 0 where they are not counted."""
    if context.device != "cuda":
        call()
        return 0
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before: int = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


def memory(length: int, context: Context) -> dict[str, Any]:
    """Bytes beyond inputs, output and (in training) gradients, causal, 16 bits, 8 heads of 128."""
    import torch

    from onegpu.kernels.attention import attention

    length = 64 if context.tiny else length
    shape = (1, length, _HEADS, _DIM)
    q, k, v = (torch.randn(shape, device=context.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    hidden = torch.ones(length, length, dtype=torch.bool, device=context.device).triu(1)
    bias = torch.zeros(length, length, dtype=q.dtype, device=context.device).masked_fill_(hidden, float("-inf"))
    del hidden

    def eager() -> Any:
        """As transformers' models write it."""
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
        scores = queries @ keys.transpose(2, 3) * _DIM**-0.5 + bias
        return (torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ values).transpose(1, 2).contiguous()

    def inference(forward: Callable[[], Any]) -> None:
        with torch.no_grad():
            forward()

    def training(forward: Callable[[], Any]) -> None:
        torch.autograd.grad(forward(), (q, k, v), upstream)

    upstream, each = torch.randn_like(q), q.numel() * q.element_size()
    found: dict[str, dict[str, int]] = {"onegpu": {}, "eager": {}}
    for name, forward in (("onegpu", lambda: attention(q, k, v, causal=True)), ("eager", eager)):
        inference(forward)  # whatever is set up once
        training(forward)
        found[name]["bytes"] = max(_peak(partial(inference, forward), context) - each, 0)
        found[name]["training_bytes"] = max(_peak(partial(training, forward), context) - 4 * each, 0)
    row: dict[str, Any] = {"peer": "eager", "ours": found["onegpu"], "theirs": found["eager"], "ratio": None}
    row |= {"peers": {"eager": found["eager"]}, "shape": {"length": length, "heads": _HEADS, "d": _DIM}}
    if context.device != "cuda":
        return {**row, "note": "bytes are counted on a GPU only"}
    row["ratio"] = spread([found["onegpu"]["bytes"] / found["eager"]["bytes"]])
    row["training_ratio"] = spread([found["onegpu"]["training_bytes"] / found["eager"]["training_bytes"]])
    return row
