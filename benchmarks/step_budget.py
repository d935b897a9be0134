"""Where the time of one decoding step goes: the device time of each kernel, from the profiler's trace of replays."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

# What a kernel does, by its name: the first pattern that is found. Bytes are known by what is done, not by kernel.
_WHAT: tuple[tuple[str, str], ...] = (
    ("attention", r"flash|fmha|attn|attention|attend\b|softmax_warp|splitkv|decode_split|combine"),
    ("linear", r"\bproduct\b|gemm|gemv|nvjet|cutlass|cublas|splitk|rows?_|_rows?\b|linear|xmma|dot_kernel|matmul"),
    ("dequantise", r"dequant"),
    ("copy", r"memcpy|memset|copy|cat_|CatArray|index_copy|scatter"),
    ("choice of token", r"argmax|sampl|topk|sort|multinomial|ArgMax"),
)


def what(name: str) -> str:
    """The kind of work of a kernel of this name; "other" (norms, rotary, activations, residuals) for the rest."""
    return next((kind for kind, pattern in _WHAT if re.search(pattern, name, re.IGNORECASE)), "other")


def kernel_times(call: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """Launches and device microseconds of each kernel, by name, while `call` runs."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        call()
        torch.cuda.synchronize()
    return exclusive(
        (event.name, event.time_range.start, event.time_range.end)
        for event in trace.events()
        # Ranges that a program names are put on the device's timeline too, over the kernels in them.
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )


def exclusive(spans: Iterable[tuple[str, float, float]]) -> dict[str, tuple[int, float]]:
    """Number and time of kernels by name, of (name, start, end). Where one starts before another has ended, as
    dependent kernels of a programmatic launch do, which then wait, that time is the earlier one's."""
    found: dict[str, tuple[int, float]] = {}
    latest = 0.0
    for name, start, end in sorted(spans, key=lambda span: span[1]):
        count, total = found.get(name, (0, 0.0))
        found[name] = (count + 1, total + max(0.0, end - max(start, latest)))
        latest = max(latest, end)
    return found


def difference(
    long: dict[str, tuple[int, float]], short: dict[str, tuple[int, float]], steps: int
) -> list[dict[str, Any]]:
    """Per step and kernel, the longest first: what a run of `steps` more steps has more than the short one."""
    rows = []
    for name, (count, total) in long.items():
        before_count, before = short.get(name, (0, 0.0))
        if count > before_count and total > before:
            micro, launches = (total - before) / steps, (count - before_count) / steps
            rows.append({"kernel": short_name(name), "what": what(name), "launches": launches, "us": micro})
    return merged(sorted(rows, key=lambda row: -row["us"]))


def short_name(name: str) -> str:
    """Without arguments, template parameters and namespaces, 60 letters at most: rows name no path."""
    plain = re.sub(r"\(.*", "", re.sub(r"<.*", "", name.removeprefix("void "))).strip()
    return (plain.split("::")[-1] or name)[:60].replace("/", "|")


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one short name and kind of work, added."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        entry = found.setdefault((row["kernel"], row["what"]), {**row, "launches": 0.0, "us": 0.0})
        entry["launches"] += row["launches"]
        entry["us"] += row["us"]
    rounded = [{**row, "launches": round(row["launches"], 2), "us": round(row["us"], 2)} for row in found.values()]
    return sorted(rounded, key=lambda row: -row["us"])


def by_work(rows: list[dict[str, Any]], bytes_of: dict[str, int], read: float | None) -> list[dict[str, Any]]:
    """Time of each kind of work, and its share of the roofline where its bytes are known.

    Args:
        read: bytes/s of a stream that only reads, or None.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = found.setdefault(row["what"], {"what": row["what"], "launches": 0.0, "us": 0.0})
        entry["launches"] = round(entry["launches"] + row["launches"], 2)
        entry["us"] = round(entry["us"] + row["us"], 2)
    for kind, entry in found.items():
        if kind in bytes_of and read and entry["us"]:
            least = bytes_of[kind] / read * 1e6
            entry |= {"bytes": bytes_of[kind], "roofline_us": round(least, 1), "share": round(least / entry["us"], 3)}
    return sorted(found.values(), key=lambda entry: -entry["us"])
