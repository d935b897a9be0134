"""Plots of single ops over one of their sizes: attention over the length, products of few rows over the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, read_rows

Points = list[list[Any]]
_COLORS = {"onegpu": "#1f6f8b", "cuDNN": "#d1495b", "FlashAttention-2": "#edae49", "memory-efficient": "#8d6a9f"}
_FORMATS = {"nf4": "#1f6f8b", "int8": "#d1495b", "bf16": "#8d8d8d"}
_GREY = "#4d4d4d"


def sweep_points(results: Path = RESULTS) -> Points:
    """``[direction and kind of attention, [[length, side, TFLOP/s], …]]`` of the sweep over lengths."""
    panels: dict[str, list[list[Any]]] = {}
    for file in sorted(results.glob("*/attention.jsonl")):
        for row in read_rows(file):
            word, _, case = row["case"].partition(" ")
            if word != "sweep":
                continue
            kind = " ".join(part for part in case.split() if not (part[0] in "BS" and part[1:].isdigit()))
            for side, fields in {"onegpu": row["ours"], **row["peers"]}.items():
                speed = round(row["flops"] / fields["us"]["median"] / 1e6, 1)
                name = f"{kind}\n{row['environment']['device']}"
                panels.setdefault(name, []).append([row["shape"]["length"], side, speed])
    forward_first = sorted(panels.items(), key=lambda panel: (not panel[0].startswith("forward"), panel[0]))
    return [[name, sorted(points)] for name, points in forward_first]


def draw_sweep(points: Points, figure: Any) -> None:
    """TFLOP/s over a logarithmic length, one panel for each kind of attention."""
    rows = 1 if len(points) < 4 else 2
    columns = -(-len(points) // rows)
    figure.set_size_inches(max(6.4, 1.8 * columns), 0.6 + 2.2 * rows)
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False)
    _lines(panels, points, _COLORS, figure)
    for row in panels:
        row[0].set_ylabel("TFLOP/s", fontsize=7)
        for axes in row:
            axes.set_ylim(0)
    for axes in panels[-1]:
        axes.set_xlabel("length", fontsize=7)


def few_rows_points(results: Path = RESULTS) -> Points:
    """``[matrix, [[rows, format, times as fast as cuBLAS in bfloat16], …]]``, for matrices measured at many sizes."""
    panels: dict[str, list[list[Any]]] = {}
    for file in sorted(results.glob("*/few_rows.jsonl")):
        for row in read_rows(file):
            kind, _, matrix = row["case"].rpartition(" M=")[0].partition(" ")
            if row["peer"] != "cuBLAS bf16" or kind not in _FORMATS:
                continue
            sizes = row["shape"]
            name = f"{matrix}, {sizes['n']} x {sizes['k']}\n{row['environment']['device']}"
            panels.setdefault(name, []).append([sizes["m"], kind, round(1 / row["ratio"]["median"], 2)])
    # A line of two or three sizes says nothing that the table does not.
    return [[name, sorted(points)] for name, points in panels.items() if len({point[0] for point in points}) > 4]


def draw_few_rows(points: Points, figure: Any) -> None:
    """How many times as fast as cuBLAS over a logarithmic number of rows; the grey line is cuBLAS."""
    figure.set_size_inches(6.4, 0.6 + 2.2 * -(-len(points) // 2))
    panels = figure.subplots(-(-len(points) // 2), min(len(points), 2), sharex=True, sharey=True, squeeze=False)
    _lines(panels, points, _FORMATS, figure)
    for row in panels:
        row[0].set_ylabel("times as fast as cuBLAS, bf16", fontsize=7)
        for axes in row:
            axes.axhline(1, color=_GREY, linewidth=0.6)
            axes.set_ylim(0)
    for axes in panels[-1]:
        axes.set_xlabel("rows of x", fontsize=7)


def _lines(panels: Any, points: Points, colors: dict[str, str], figure: Any) -> None:
    """One panel for each entry of `points`, one line a side, the sizes on a logarithmic axis of base 2."""
    sizes = sorted({value[0] for _, values in points for value in values})
    handles: dict[str, Any] = {}
    for axes, (name, values) in zip(panels.flat, points, strict=False):
        for side in sorted({value[1] for value in values}, key=lambda side: [*colors, side].index(side)):
            line = [(at, speed) for at, other, speed in values if other == side]
            color = colors.get(side, _GREY)
            (handles[side],) = axes.plot(*zip(*line, strict=True), "o-", color=color, markersize=3, linewidth=1.2)
        axes.set_title(name, fontsize=6)
        axes.set_xscale("log", base=2)
        ticks = [size for size in sizes if size & (size - 1) == 0]
        axes.set_xticks(ticks, [f"{size // 1024}K" if size >= 1024 else str(size) for size in ticks])
        axes.minorticks_off()
        axes.tick_params(labelsize=6)
    for axes in list(panels.flat)[len(points) :]:
        axes.set_axis_off()
    figure.legend(handles.values(), handles, frameon=False, fontsize=7, ncols=4, loc="outside lower center")
