"""Plots of the stored results, under docs/images/. Each SVG names the digest of the numbers in it, so that a check for
plots that are out of date needs no matplotlib.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, read_rows
from benchmarks.plots_ops import draw_few_rows, draw_sweep, few_rows_points, sweep_points

IMAGES = ROOT / "docs" / "images"
Points = list[list[Any]]
_OURS, _THEIRS = "#1f6f8b", "#d1495b"


def perplexity_points(results: Path = RESULTS) -> Points:
    """``[format, MB, perplexity of ours, of theirs]`` of every format measured on the CPU."""
    rows = read_rows(results / "cpu" / "perplexity.jsonl")
    return [
        [row["case"], round(row["ours"]["weight_bytes"] / 1e6, 1)]
        + [round(row[side]["perplexity"], 4) for side in ("ours", "theirs")]
        for row in rows
    ]


def load_points(results: Path = RESULTS) -> Points:
    """``[device, format, seconds of ours, of theirs]`` of every load measured on a GPU."""
    files = sorted(file for file in results.glob("*/load.jsonl") if file.parent.name != "cpu")
    return [
        [row["environment"]["device"], row["case"]] + [row[side]["seconds"]["median"] for side in ("ours", "theirs")]
        for file in files
        for row in read_rows(file)
        if row["theirs"]
    ]


def draw_perplexity(points: Points, figure: Any) -> None:
    """Perplexity over size: a ring for bitsandbytes, a dot for onegpu in it."""
    axes = figure.subplots()
    sizes = [point[1] for point in points]
    axes.scatter(sizes, [p[3] for p in points], s=130, facecolors="none", edgecolors=_THEIRS, label="bitsandbytes")
    axes.scatter(sizes, [p[2] for p in points], s=28, color=_OURS, label="onegpu")
    for name, size, ours, _ in points:
        left = name == "nf4-double"  # beside nf4 on the plot: its label goes to the other side
        place = {"xytext": (-10 if left else 10, -3), "ha": "right" if left else "left"}
        axes.annotate(name, (size, ours), textcoords="offset points", **place)
    axes.set(xlabel="weights, MB", ylabel="perplexity", xlim=(0, 1.2 * max(sizes)))
    axes.margins(y=0.1)
    axes.set_title("SmolLM2-135M, King James Bible: two implementations of each format", fontsize=10)
    axes.legend(frameon=False)


def draw_load(points: Points, figure: Any) -> None:
    """Seconds of a load, ours beside theirs."""
    axes = figure.subplots()
    names = [f"{device}\n{kind}" for device, kind, *_ in points]
    for offset, column, color, label in ((-0.2, 2, _OURS, "onegpu"), (0.2, 3, _THEIRS, "transformers + bitsandbytes")):
        bars = axes.bar(
            [i + offset for i in range(len(points))], [p[column] for p in points], 0.38, color=color, label=label
        )
        axes.bar_label(bars, fmt="%.1f")
    axes.set_xticks(range(len(points)), names)
    axes.set(ylabel="seconds")
    axes.set_title("7B-shaped checkpoint, page cache to quantised model", fontsize=10)
    axes.legend(frameon=False)


def decode_points(results: Path = RESULTS) -> Points:
    """``[device, format and batch, ms of ours, of the hand-captured peer, of generate()]`` of the Llama-2-7B shape."""
    points: Points = []
    for file in sorted(results.glob("*/model.jsonl")):
        for row in read_rows(file):
            if row["case"].startswith("Llama-2-7B ") and " decode" in row["case"]:
                name = row["case"].removeprefix("Llama-2-7B ").replace(" decode, ", "\n")
                eager = row["peers"]["transformers generate, bf16"]["ms"]["median"]
                ms = [row[side]["ms"]["median"] for side in ("ours", "theirs")]
                points.append([row["environment"]["device"], name, *ms, eager])
    # Rows stand in the order in which they were first measured.
    return sorted(points, key=lambda point: (point[0], int(point[1].rpartition(" ")[2]), point[2]))


def draw_decode(points: Points, figure: Any) -> None:
    """Milliseconds a step on a logarithmic axis, one panel a device."""
    devices = list(dict.fromkeys(point[0] for point in points))
    panels = figure.subplots(1, len(devices), sharey=True, squeeze=False)[0]
    kinds = (
        (2, _OURS, "onegpu"),
        (3, _THEIRS, "transformers bf16, captured by hand"),
        (4, "#c9c2b8", "its generate()"),
    )
    for axes, device in zip(panels, devices, strict=True):
        chosen = [point for point in points if point[0] == device]
        for place, (column, color, label) in enumerate(kinds):
            at = [i + 0.27 * (place - 1) for i in range(len(chosen))]
            bars = axes.bar(at, [point[column] for point in chosen], 0.25, color=color, label=label)
            axes.bar_label(bars, fmt="%.3g", fontsize=6)
        axes.set_xticks(range(len(chosen)), [point[1] for point in chosen], fontsize=7)
        axes.set_yscale("log")
        axes.set_yticks(ticks := [1, 2, 5, 10, 20, 50, 100, 200], [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(0.8 * min(min(p[2:]) for p in points), 1.4 * max(max(p[2:]) for p in points))
        axes.set_title(device, fontsize=9)
    panels[0].set_ylabel("ms a step, Llama-2-7B shape")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=7, ncols=3, loc="outside lower center")


def step_points(results: Path = RESULTS) -> Points:
    """``[device and format, [[work, us], …]]`` of one decoding step, idle time as "nothing runs"."""
    return _budgets(results, "model")


def fused_points(results: Path = RESULTS) -> Points:
    """As `step_points`, of the fused step."""
    return _budgets(results, "fused_step")


def _budgets(results: Path, benchmark: str) -> Points:
    points: Points = []
    for file in sorted(results.glob(f"*/{benchmark}.jsonl")):
        for row in read_rows(file):
            if row["case"].endswith("budget of one step") and row.get("work"):
                kind = row["case"].removesuffix(" budget of one step")
                work = [[entry["what"], entry["us"]] for entry in row["work"]]
                points.append([f"{kind}\n{row['environment']['device']}", [*work, ["nothing runs", row["idle_us"]]]])
    return points


def draw_step(points: Points, figure: Any) -> None:
    """One bar a format, stacked by kind of work."""
    axes = figure.subplots()
    kinds = list(dict.fromkeys(kind for _, work in points for kind, _ in work))
    colors = dict(zip(kinds, (_OURS, _THEIRS, "#edae49", "#6a994e", "#8d6a9f", "#c9c2b8", "#4d4d4d"), strict=False))
    base = [0.0] * len(points)
    for kind in kinds:
        size = [max(dict(work).get(kind, 0.0), 0.0) for _, work in points]
        axes.barh(range(len(points)), size, left=base, color=colors.get(kind, "#999999"), label=kind)
        base = [a + b for a, b in zip(base, size, strict=True)]
    axes.set_yticks(range(len(points)), [name for name, _ in points], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="µs of one decoding step, batch 1")
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=7, ncols=3, loc="outside lower center")


def _attention_rows(results: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(results.glob("*/attention_model.jsonl")) for row in read_rows(file)]


def attention_points(results: Path = RESULTS) -> Points:
    """``[what the panel shows, [[batch or percent of padding, side, tokens/s], …]]`` of whole models."""
    panels: dict[str, list[list[Any]]] = {}
    for row in _attention_rows(results):
        if "ms" not in row["ours"]:
            continue
        sizes, shape = row["shape"], row["case"].partition(" batch")[0]
        model, _, whole = shape.partition(" by ")
        padded = "padding" in row["case"]
        name = f"{model}, {sizes['batch']} x {sizes['length']}" if padded else f"{model}, n x {sizes['length']}"
        sides = {f"onegpu, {whole}": row["ours"]} if whole else {"onegpu": row["ours"], **row["peers"]}
        for side, fields in sides.items():
            speed = sizes["batch"] * sizes["length"] / fields["ms"]["median"]
            at = sizes["padding"] if padded else sizes["batch"]
            panels.setdefault(f"{name}\n{row['environment']['device']}", []).append([at, side, round(speed, 1)])
    return [[name, sorted(points)] for name, points in panels.items()]


def draw_attention(points: Points, figure: Any) -> None:
    """Positions a second, padding counted: what padding costs is seen as a line that stays flat."""
    panels = figure.subplots(1, len(points), squeeze=False)[0]
    colors = {"onegpu": _OURS, "onegpu, optimize()": "#5aa469", "transformers, sdpa": _THEIRS}
    colors["transformers, eager"] = "#8d8d8d"
    handles: dict[str, Any] = {}
    for axes, (name, values) in zip(panels, points, strict=True):
        for side in dict.fromkeys(value[1] for value in values):
            line = [(at, speed) for at, other, speed in values if other == side]
            (handles[side],) = axes.plot(*zip(*line, strict=True), "o-", color=colors[side], markersize=3)
        axes.set_title(name, fontsize=6)
        axes.set_ylim(0, 1.08 * max(speed for _, _, speed in values))
        axes.set_xticks(sorted({at for at, _, _ in values}))
        axes.margins(x=0.1)
        axes.set_xlabel("batch" if " n x " in name else "% padding", fontsize=7)
        axes.tick_params(labelsize=6)
    panels[0].set_ylabel("positions per ms, forward", fontsize=7)
    figure.legend(handles.values(), handles, frameon=False, fontsize=7, ncols=3, loc="outside lower center")


def attention_memory_points(results: Path = RESULTS) -> Points:
    """``[device, length, bytes of ours, of eager, of ours in training, of eager]`` beyond inputs and outputs."""
    return [
        [row["environment"]["device"], row["shape"]["length"]]
        + [row[side][key] for key in ("bytes", "training_bytes") for side in ("ours", "theirs")]
        for row in _attention_rows(results)
        if "bytes" in row["ours"] and row["ratio"]
    ]


def draw_attention_memory(points: Points, figure: Any) -> None:
    """Both axes logarithmic: ours goes with the length, eager's with its square."""
    axes = figure.subplots()
    points = sorted((p for p in points if p[0] == points[0][0]), key=lambda point: point[1])
    lines = ((2, _OURS, "o-", "onegpu"), (3, _THEIRS, "o-", "eager"))
    lines += ((4, _OURS, "o--", "onegpu, with the backward"), (5, _THEIRS, "o--", "eager, with the backward"))
    for column, color, style, label in lines:
        axes.plot([p[1] for p in points], [p[column] / 2**20 for p in points], style, color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([p[1] for p in points], [str(p[1]) for p in points])
    axes.set(xlabel="length", ylabel="MiB beyond inputs and outputs")
    axes.set_title(f"one causal attention, 8 heads of 128, 16 bits; {points[0][0]}", fontsize=9)
    axes.legend(frameon=False, fontsize=7)


PLOTS: dict[str, tuple[Callable[..., Points], Callable[[Points, Any], None]]] = {
    "perplexity": (perplexity_points, draw_perplexity),
    "load": (load_points, draw_load),
    "model_decode": (decode_points, draw_decode),
    "model_step": (step_points, draw_step),
    "fused_step": (fused_points, draw_step),
    "attention_models": (attention_points, draw_attention),
    "attention_memory": (attention_memory_points, draw_attention_memory),
    "attention_sweep": (sweep_points, draw_sweep),
    "few_rows": (few_rows_points, draw_few_rows),
}


def digest(points: Points) -> str:
    """What the plot of these points names as its data."""
    return f"onegpu results {hashlib.sha256(json.dumps(points).encode()).hexdigest()[:16]}"


def stale(results: Path = RESULTS, images: Path = IMAGES) -> list[str]:
    """Names of plots whose file is missing or shows other numbers than those stored."""
    names = []
    for name, (read, _) in PLOTS.items():
        points, file = read(results), images / f"{name}.svg"
        if points and not (file.is_file() and digest(points) in file.read_text(encoding="utf-8")):
            names.append(f"docs/images/{name}.svg")
    return names


def draw_all(files: list[str], results: Path = RESULTS, images: Path = IMAGES) -> bool:
    """Draw the plots of these names; False if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    images.mkdir(parents=True, exist_ok=True)
    for file in files:
        name = Path(file).stem
        read, draw = PLOTS[name]
        points = read(results)
        # The same numbers give the same file, whoever draws it.
        with matplotlib.rc_context({"svg.hashsalt": "onegpu", "svg.fonttype": "none", "font.size": 9}):
            figure = Figure(figsize=(6.4, 3.6), layout="constrained")
            draw(points, figure)
            for axes in figure.axes:
                axes.spines[["top", "right"]].set_visible(False)
            FigureCanvasSVG(figure).print_svg(
                str(images / f"{name}.svg"), metadata={"Date": None, "Creator": None, "Description": digest(points)}
            )
    return True
