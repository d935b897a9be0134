"""The tables of README.md and docs/, from the rows stored under benchmarks/results/: none is typed by hand.

A page holds ``<!-- table:NAME -->`` and ``<!-- /table -->``; what stands between them is replaced.

    python -m benchmarks.tables            writes the tables, and the plots where matplotlib is installed
    python -m benchmarks.tables --check    exits with 1, and names the pages, if a stored table is not what it should be
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, read_rows
from benchmarks.perplexity import FORMATS
from benchmarks.plots import PLOTS, draw_all, stale

Row = dict[str, Any]
_MARKED = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
_NONE = "*No run is stored yet.*\n"
_ROWS = (1, 2, 4, 8, 16, 24, 48, 64, 128)  # what else was measured is in the plot
# Table -> the plot below it, and what it shows.
_PICTURES = {
    "fused-budget": ("fused_step", "µs of one step by kind of kernel"),
    "few-rows": ("few_rows", "Times as fast as cuBLAS over the rows of x"),
    "attention-sweep": ("attention_sweep", "TFLOP/s over the length, forward and backward"),
    "attention-models": ("attention_models", "Positions a millisecond over the batch and over the padding"),
    "attention-memory": ("attention_memory", "Memory over the length"),
    "model-step": ("model_step", "µs of one step by kind of kernel"),
}


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def measured_on(rows: list[Row], *packages: str) -> str:
    """``AMD EPYC, 2 cores; torch 2.13.0, …; 2026-11-23; commit 0123abc``, in small print: once for each machine and set
    of versions that the rows were measured with."""
    notes: dict[str, dict[str, None]] = {}
    for row in rows:
        where = row["environment"]
        device = where["device"] if where["driver"] else f"{where['device']}, {where['cores']} cores"
        versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "transformers", *packages))
        commit = (where["commit"] or "unknown")[:7] + (" and changes" if where["dirty"] else "")
        notes.setdefault(f"{device}; {versions}; {where['date'][:10]}", {})[commit] = None
    lines = [f"{note}; commit {', '.join(commits)}" for note, commits in notes.items()]
    return f"<small>{'<br>'.join(lines)}</small>\n"


def fidelity(rows: list[Row]) -> str:
    """Perplexity of both sides, format by format."""
    order = list(FORMATS)
    rows = sorted(rows, key=lambda row: order.index(row["case"]))
    lines = []
    for row in rows:
        exact, kind = row.get("theirs_float32"), row["case"].replace("-double", " + double quantisation")
        lines.append(
            [
                f"{kind} ({row['ours']['weight_bytes'] / 1e6:.0f} MB)",
                f"{row['ours']['perplexity']:.4f}",
                f"{row['theirs']['perplexity']:.4f}",
                _difference(row["relative_difference"]),
                f"{exact['perplexity']:.4f}" if exact else "",
                _difference(row["relative_difference_float32"]) if exact else "",
            ]
        )
    head = ["weights", "onegpu", "transformers + bitsandbytes", "difference", "bitsandbytes in float32", "difference"]
    return markdown(head, lines) + f"\n{rows[0]['tokens_scored']:,} tokens scored. {measured_on(rows, 'bitsandbytes')}"


def _difference(value: float) -> str:
    return "0" if value == 0 else f"{value:+.1e}"


def cpu_decode(rows: list[Row]) -> str:
    """Speed and memory on a CPU, beside transformers in float32."""
    lines = []
    for row in rows:
        ours, ratio = row["ours"], row["ratio"]
        copies = sum(line["bytes"] for line in ours["memory"] if line["name"] != "weights")
        lines.append(
            [
                row["case"].replace("-packed", ", no memory for copies"),
                f"{ours['tokens_per_s']['median']:.1f}",
                f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})",
                f"{ours['first_token_s']['median']:.2f} s",
                f"{(ours['bytes'] - copies) / 1e6:.0f} MB",
                f"{copies / 1e6:.0f} MB",
            ]
        )
    theirs = rows[0]["theirs"]
    peer = [theirs["tokens_per_s"]["median"], theirs["bytes"] / 1e6]
    lines.append(["transformers, float32", f"{peer[0]:.1f}", "1", "", f"{peer[1]:.0f} MB", ""])
    head = ["SmolLM2-135M", "tokens/s", "ratio to float32", "first token", "weights", "expanded copies"]
    threads = f"{rows[0]['threads']} thread{'s' if rows[0]['threads'] > 1 else ''}"
    clock = {"wall": "", "cpu": ", seconds of CPU time"}[rows[0]["clock"]]
    return markdown(head, lines) + f"\n{threads}{clock}. {measured_on(rows)}"


def cpu_generate(rows: list[Row]) -> str:
    """Our loop on a CPU, beside transformers'."""
    lines = []
    for row in rows:
        ratio, speeds = row["ratio"], [row[side]["tokens_per_s"]["median"] for side in ("ours", "theirs")]
        spread = f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
        lines.append([row["case"], *(f"{speed:.1f}" for speed in speeds), spread])
    head = ["SmolLM2-135M, float32", "tokens/s of onegpu", "of transformers", "ratio"]
    setting = f"{rows[0]['new_tokens']} new tokens, one thread, seconds of CPU time"
    return markdown(head, lines) + f"\n{setting}. {measured_on(rows)}"


def load(rows: list[Row]) -> str:
    """Seconds from the page cache to a quantised model on the device, and the peaks."""
    lines = []
    for row in rows:
        ours, theirs, ratio = row["ours"], row["theirs"] or {}, row["ratio"]
        other = f"{theirs['seconds']['median']:.2f} s" if theirs else "–"
        lines.append(
            [
                row["case"],
                f"{ours['seconds']['median']:.2f} s",
                other,
                f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else "–",
                f"{ours.get('device_over_model_bytes', 0) / 1e6:.0f} MB",
                f"{theirs.get('device_over_model_bytes', 0) / 1e6:.0f} MB",
                f"{ours['host_anonymous_bytes'] / 1e6:.0f} MB",
            ]
        )
    first = rows[0]
    head = ["to", "onegpu", "bitsandbytes", "ratio", "device, beyond the model", "bitsandbytes", "host"]
    size = f"{first['checkpoint_bytes'] / 1e9:.1f} GB in files of {first['shard_bytes'] / 1e9:.1f} GB. "
    return markdown(head, lines) + f"\n{size}{measured_on(rows, 'bitsandbytes')}"


def commands(rows: list[Row]) -> str:
    """How long the README's commands take from a fresh clone."""
    lines = [[f"`{row['case']}`", f"{row['seconds'] / 60:.1f} min"] for row in rows]
    return markdown(["from a fresh clone", "takes"], lines) + f"\n{measured_on(rows)}"


def bnb_suite(rows: list[Row]) -> str:
    """bitsandbytes' own tests on onegpu: counts by file, then what was different and what was left out."""
    kinds = ("excluded", "skipped")
    counts = {
        f"`{row['case']}.py`": [
            row["ours"]["passed"],
            row["ours"]["failed"],
            *(sum(row["ours"][kind].values()) for kind in kinds),
            *([row["theirs"]["passed"]] if row["theirs"] else []),
        ]
        for row in rows
    }
    head = ["on " + rows[0]["environment"]["device"], "pass", "fail", "not run", "skip themselves"]
    head += ["bitsandbytes passes"] if all(row["theirs"] for row in rows) else []
    lines = {**counts, "all": [sum(column) for column in zip(*counts.values(), strict=False)]}
    table = markdown(head, [[name, *(f"{n:,}" for n in numbers[: len(head) - 1])] for name, numbers in lines.items()])
    reasons = []
    for kind, word in (("different", "fail"), ("excluded", "not run")):
        total: Counter[str] = Counter()
        for row in rows:
            total.update(row["ours"][kind])
        reasons += [f"| {count} {word} | {why} |\n" for why, count in total.items()]
    if unexplained := sum(len(row["ours"]["unexplained"]) for row in rows):
        reasons.append(f"| {unexplained} fail | not explained: the stored rows have their messages |\n")
    listed = "".join(["\n| tests | why |\n| ---: | --- |\n", *reasons] if reasons else [])
    return f"{table}{listed}\nbitsandbytes at {rows[0]['suite_commit'][:7]}; {measured_on(rows)}"


def _with_ratio(cell: dict[str, Any] | None) -> str:
    """``0.31 (0.30–0.33)``: ours / theirs in time."""
    return "–" if cell is None else f"{cell['median']:.2f} ({cell['low']:.2f}–{cell['high']:.2f})"


def _share(row: Row) -> str:
    return f"{row['share']:.0%}" if row.get("share") is not None else "–"


def _ceilings(rows: list[Row]) -> str:
    """What the device reached in the run of the first row, before its cases."""
    found, units = rows[0]["ceilings"]["before"], {"copy": "TB/s", "read": "TB/s", "bf16": "TFLOP/s", "int8": "TOP/s"}
    return "Ceilings: " + ", ".join(f"{name} {found[name] / 1e12:.3g} {units[name]}" for name in units if name in found)


def ops(rows: list[Row]) -> str:
    """Cases of one op: time, ratio to the peer, share of the roofline."""
    lines = [
        [
            row["case"],
            f"{row['ours']['us']['median']:.1f}",
            f"{row['theirs']['us']['median']:.1f}" if row["theirs"] else "–",
            _with_ratio(row["ratio"]),
            _share(row),
            f"{row['ours']['host_us']:.1f}",
        ]
        for row in rows
    ]
    peers = dict.fromkeys(row["peer"] for row in rows if row["peer"])
    head = ["case", "onegpu, µs", "peer, µs", "ratio", "share of the roofline", "host, µs"]
    return markdown(head, lines) + f"\nPeer: {', '.join(peers)}. {_ceilings(rows)}. {measured_on(rows)}"


def few_rows(rows: list[Row]) -> str:
    """Products of few rows: a line for each format and matrix, a column for each number of rows of x."""
    lines: dict[str, dict[int, str]] = {}
    for row in rows:
        cell = f"{row['ours']['us']['median']:.1f} ({row['ratio']['median']:.2f})"
        lines.setdefault(row["case"].rpartition(" M=")[0], {})[row["shape"]["m"]] = cell
    shown = [m for m in _ROWS if any(m in cells for cells in lines.values())]
    head = ["µs (ratio to the peer)", *(f"M = {m}" for m in shown)]
    table = markdown(head, ([name, *(cells.get(m, "–") for m in shown)] for name, cells in lines.items()))
    peers = dict.fromkeys(row["peer"] for row in rows)
    return f"{table}\nPeer: {', '.join(peers)}. {_ceilings(rows)}. {measured_on(rows)}"


def launches(rows: list[Row]) -> str:
    """Host microseconds of one launch."""
    lines = [
        [
            f"{row['case']}, beside {row['peer']}",
            f"{row['ours']['us']['median']:.1f}",
            f"{row['theirs']['us']['median']:.1f}",
            _with_ratio(row["ratio"]),
        ]
        for row in rows
    ]
    return (
        markdown(["a launch with nine arguments", "onegpu, µs", "peer, µs", "ratio"], lines) + f"\n{measured_on(rows)}"
    )


def model_decode(rows: list[Row]) -> str:
    """Milliseconds a token of whole models beside the hand-captured peer and `generate()` as it comes."""
    rows = [row for row in rows if " decode" in row["case"]]
    if not rows:
        return _NONE
    lines = []
    for row in rows:
        ours = row["ours"]
        found = [[p for name, p in row["peers"].items() if word in name] for word in ("generate, bf16", "bitsandbytes")]
        lines.append(
            [
                row["case"].replace(" decode", "") + " †" * bool(ours.get("fused")),
                f"{ours['ms']['median']:.2f}",
                f"{row['theirs']['ms']['median']:.2f}" + (" *" if row["note"] else ""),
                _with_ratio(row["ratio"]),
                *(f"{peers[0]['ms']['median']:.1f}" if peers else "–" for peers in found),
                *_given(ours, wall_over_replay="{:.3f}", capture_s="{:.2f}"),
                _share(row),
            ]
        )
    head = ["ms a step", "onegpu", "bf16 forward in a CUDA graph by hand", "ratio", "`generate()` of transformers"]
    head += ["… + bitsandbytes", "clock / graph", "capture, s", "roofline"]
    columns = [column for column in zip(head, *lines, strict=True) if set(column[1:]) != {"–"}]
    head, *lines = (list(line) for line in zip(*columns, strict=True))
    star = "\\* its forward cannot be captured. " if any(row.get("note") for row in rows) else ""
    star += "† five kernels a layer. " if any(row["ours"].get("fused") for row in rows) else ""
    return markdown(head, lines) + f"\n{star}{_ceilings(rows)}. {measured_on(rows)}"


def model_host(rows: list[Row]) -> str:
    """Microseconds of the host a token, by what it has to see of it."""
    rows = [row for row in rows if "host_us" in row["ours"]]
    if not rows:
        return _NONE
    ways = list(rows[0]["ours"]["host_us"])
    lines = [
        [row["case"].replace(" decode", ""), *(f"{row['ours']['host_us'][way]:.0f}" for way in ways),
         f"{row['ours']['launch_us']:.0f}"]
        for row in rows
    ]  # fmt: skip
    return markdown(["µs a token", *ways, "launch of the step's graph"], lines) + f"\n{measured_on(rows)}"


def model_first_use(rows: list[Row]) -> str:
    """Seconds of the first `generate()` of a process."""
    rows = [row for row in rows if row["case"].endswith("first use")]
    if not rows:
        return _NONE
    names = ("optimize_s", "first_use_s", "compile_s", "capture_s")
    lines = [
        [f"{row['case'].removesuffix(' first use')}, {text}", *(f"{row['ours'][disk][name]:.2f}" for name in names)]
        for row in rows
        for disk, text in (("empty", "no kernel on disk"), ("filled", "kernels on disk"))
    ]
    head = ["seconds", "`optimize()`", "first use", "… waiting for kernels", "… capturing"]
    return markdown(head, lines) + f"\n{measured_on(rows)}"


def model_ties(rows: list[Row]) -> str:
    """Where our 16-bit tokens first differ from the peer's, and by how little."""
    rows = [row for row in rows if row.get("first_difference")]
    if not rows:
        return _NONE
    lines = []
    for row in rows:
        found = row["first_difference"]
        lines.append([
            row["case"].replace(" decode", ""), f"{row['same_tokens']} of {row['compared_tokens']}",
            f"{found['gap']:.3f}", f"{found['own_noise']:.3f}", str(found["rank"] + 1),
        ])  # fmt: skip
    head = ["", "tokens alike, in the worst row", "gap of the two logits", "noise of the peer's logits", "rank of ours"]
    return markdown(head, lines) + f"\n{measured_on(rows)}"


def _given(ours: Row, **forms: str) -> list[str]:
    """Fields in their forms; a dash for what the row does not have."""
    return ["–" if ours.get(name) is None else form.format(ours[name]) for name, form in forms.items()]


def model_prefill(rows: list[Row]) -> str:
    """Milliseconds of a whole prompt."""
    lines = [
        [
            row["case"].replace(" prefill", ""),
            f"{row['ours']['ms']['median']:.1f}",
            f"{row['theirs']['ms']['median']:.1f}",
            _with_ratio(row["ratio"]),
            _share(row),
        ]
        for row in rows
        if " prefill" in row["case"]
    ]
    head = ["ms", "onegpu", "transformers bf16, sdpa", "ratio", "share of the roofline"]
    return markdown(head, lines) + f"\n{_ceilings(rows)}. {measured_on(rows)}" if lines else _NONE


def step(rows: list[Row]) -> str:
    """Where the time of one decoding step goes, by kind of work."""
    lines, chosen = [], [row for row in rows if row["case"].endswith("budget of one step") and row.get("work")]
    for row in chosen:
        name = row["case"].removesuffix(" budget of one step")
        for entry in row["work"]:
            share = f"{entry['share']:.0%}" if "share" in entry else "–"
            lines.append([name, entry["what"], f"{entry['launches']:.0f}", f"{entry['us']:.0f}", share])
            name = ""
        lines.append(["", "nothing runs", "", f"{row['idle_us']:.0f}", ""])
        lines.append(["", "the step", f"{row['launches']:.0f}", f"{row['ours']['us']['median']:.0f}", ""])
    head = ["batch 1", "work", "launches", "µs", "share of the roofline"]
    return markdown(head, lines) + f"\n{_ceilings(chosen)}. {measured_on(chosen)}" if chosen else _NONE


def two_gpus(rows: list[Row]) -> str:
    """How full two budgets are that do not hold the model."""
    lines = []
    for row in rows:
        ours, budgets = row["ours"], row["arguments"]["max_memory"]
        lines.append(
            [
                f'{row["case"]}: `max_memory={{0: "{budgets["0"]}", 1: "{budgets["1"]}"}}`',
                *(f"{share:.0%}" for share in ours["share"]),
                f"{ours['cpu_bytes'] / 1e9:.2f} GB",
                f"{ours['load_s']:.1f} s",
                f"{ours['s_per_token']:.2f} s",
            ]
        )
    head = ["bloom-3b's shape", "GPU 0 full", "GPU 1 full", "in CPU memory", "load", "a token"]
    return markdown(head, lines) + f"\n{measured_on(rows)}"


def _swept(row: Row) -> bool:
    return row["case"].startswith(("sweep ", "batches "))


def attention_sweep(rows: list[Row]) -> str:
    """TFLOP/s of our own kernels and of torch's backends."""
    backends = ("cuDNN", "FlashAttention-2", "memory-efficient")
    lines, rows = [], [row for row in rows if _swept(row)]
    for row in rows:
        sides = [row["ours"], *(row["peers"].get(name) for name in backends)]
        speeds = [f"{row['flops'] / side['us']['median'] / 1e6:.0f}" if side else "–" for side in sides]
        lines.append([row["case"].partition(" ")[2], *speeds, _with_ratio(row["ratio"]), _share(row)])
    head = ["TFLOP/s", "onegpu", *backends, "ratio of times", "share of the roofline"]
    return markdown(head, lines) + f"\n{_ceilings(rows)}. {measured_on(rows)}" if lines else _NONE


def attention_models(rows: list[Row]) -> str:
    """Milliseconds of a forward of whole models, and the most memory that it takes."""
    lines = []
    for row in (row for row in rows if "ms" in row["ours"]):
        cells = [row["case"], f"{row['ours']['ms']['median']:.1f}"]
        for name in ("sdpa", "eager"):
            peer = row["peers"].get(f"transformers, {name}")
            cells.append(f"{peer['ms']['median']:.1f}" if peer else "–")
        peaks = " / ".join(f"{side['peak_bytes'] / 1e9:.2f}" for side in (row["ours"], row["theirs"]))
        speed = {name: 1 / row["ratio"][name] for name in ("median", "low", "high")}
        cells.append(
            f"{speed['median']:.2f} × {row['peer'].rpartition(' ')[2]} ({speed['high']:.2f}–{speed['low']:.2f})"
        )
        lines.append([*cells, peaks])
    head = ["ms of a forward, bf16", "onegpu", "sdpa", "eager", "speed", "GB at most, ours / theirs"]
    return markdown(head, lines) + f"\n{measured_on(rows)}" if lines else _NONE


def attention_memory(rows: list[Row]) -> str:
    """Memory of one attention beyond inputs and outputs."""
    lines = []
    for row in (row for row in rows if "bytes" in row["ours"] and row["ratio"]):
        cells = [str(row["shape"]["length"])]
        for key in ("bytes", "training_bytes"):
            ours, theirs = (row[side][key] / 2**20 for side in ("ours", "theirs"))
            cells += [f"{ours:.1f}", f"{theirs:.0f}", f"{theirs / ours:.0f} ×"]
        lines.append(cells)
    head = ["length", "forward, MiB", "eager", "", "and backward, MiB", "eager", ""]
    return markdown(head, lines) + f"\n{measured_on(rows)}" if lines else _NONE


# Name in the pages -> results file, and how it reads. A device with no such file has no table.
TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "fidelity": ("perplexity", fidelity),
    "cpu-decode": ("cpu_decode", cpu_decode),
    "cpu-generate": ("cpu_generate", cpu_generate),
    "load": ("load", load),
    "timing": ("commands", commands),
    "bnb_suite": ("bnb_suite", bnb_suite),
    "launch": ("launch", launches),
    "linear": ("linear", ops),
    "few-rows": ("few_rows", few_rows),
    "attention": ("attention", lambda rows: ops(left) if (left := [row for row in rows if not _swept(row)]) else _NONE),
    "attention-sweep": ("attention", attention_sweep),
    "decode-attention": ("decode_attention", ops),
    "model-decode": ("model", model_decode),
    "model-host": ("model", model_host),
    "model-first-use": ("model", model_first_use),
    "model-ties": ("model", model_ties),
    "model-prefill": ("model", model_prefill),
    "model-step": ("model", step),
    "fused-step": ("fused_step", lambda rows: ops([row for row in rows if "work" not in row])),
    "fused-structures": ("fused_structures", ops),
    "fused-budget": ("fused_step", step),
    "attention-models": ("attention_model", attention_models),
    "attention-memory": ("attention_model", attention_memory),
    "two-gpus": ("two_gpus", two_gpus),
}


def render(name: str, results: Path = RESULTS) -> str:
    """The table, once for each device that has rows for it, the CPU last; then its plot, if there is one.

    Raises:
        ValueError: there is no table of that name.
    """
    if name not in TABLES:
        raise ValueError(f"table:{name} is unknown; one of {', '.join(TABLES)}")
    benchmark, make = TABLES[name]
    files = sorted(results.glob(f"*/{benchmark}.jsonl"), key=lambda file: (file.parent.name == "cpu", file))
    made = [make(rows) for file in files if (rows := read_rows(file))]
    table = "\n".join(table for table in made if table != _NONE) or _NONE
    picture, shows = _PICTURES.get(name, ("", ""))
    return table + (f"\n![{shows}](images/{picture}.svg)\n" if picture and PLOTS[picture][0](results) else "")


def fill(text: str, results: Path = RESULTS) -> str:
    """A page with every marked table replaced."""
    return _MARKED.sub(lambda m: f"{m[1]}{render(m['name'], results)}{m[4]}", text)


def pages(root: Path = ROOT) -> list[Path]:
    """README.md and the pages of docs/ that hold a table."""
    return [
        page for page in (root / "README.md", *sorted((root / "docs").rglob("*.md"))) if _MARKED.search(_read(page))
    ]


def _read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page or a plot is not current")
    parser.add_argument("--json", action="store_true", help="print the names of what differed as JSON")
    arguments = parser.parse_args(argv)
    changed = []
    for page in pages():
        new = fill(_read(page))
        if new != _read(page):
            changed.append(page.relative_to(ROOT).as_posix())
            if not arguments.check:
                page.write_text(new, encoding="utf-8", newline="\n")
    plots = stale()
    if plots and not arguments.check and not draw_all(plots):
        print("matplotlib is not installed, so no plot was drawn: pip install matplotlib")
    changed += plots
    word = "differs from the stored results: run python -m benchmarks.tables" if arguments.check else "written"
    print(json.dumps(changed) if arguments.json else "\n".join(f"{name}: {word}" for name in changed) or "up to date")
    return 1 if arguments.check and changed else 0


if __name__ == "__main__":
    raise SystemExit(main())
