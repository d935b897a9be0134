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


PLOTS: dict[str, tuple[Callable[..., Points], Callable[[Points, Any], None]]] = {
    "perplexity": (perplexity_points, draw_perplexity),
    "load": (load_points, draw_load),
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
