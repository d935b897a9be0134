"""How long a 7B-shaped checkpoint takes from the page cache to a quantised model on the GPU, and at what peak memory.

Ours beside transformers + bitsandbytes, in turn, each load in a process of its own with imports and kernels warm. The
bounds on ours / theirs: nf4 1.0, int8 0.2. Peak device memory: the quantised model plus one decoder layer in 16 bits.
Peak host memory: one shard, not counting mapped pages of the files, which are the page cache's and can be dropped.

    python -m benchmarks.load_gpu --profile            7B shape, 13 GB on disk, about 6 minutes
    python -m benchmarks.load_gpu --device cpu --no-store --tiny --runs 1        the script itself, without a GPU
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, device_slug, environment, results_file, store_rows
from benchmarks.spread import paired_ratio, spread

BOUNDS = {"nf4": 1.0, "int8": 0.2}
_TINY = {"layers": 1, "hidden": 256, "intermediate": 688, "heads": 4, "vocab": 512, "shard_bytes": 1 << 30}


class SideError(Exception):
    """A side's process failed; its own error stands on stderr."""


def side(action: str, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run one action of `load_side` and return what it printed.

    Raises:
        SideError: it failed.
    """
    command = [sys.executable, "-m", "benchmarks.load_side", action, str(folder), json.dumps(job)]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise SideError(f"{action} {job.get('format', '')} failed with exit code {run.returncode}")
    answers: list[dict[str, Any]] = [json.loads(text) for text in run.stdout.splitlines() if text.startswith("{")]
    return answers[-1] if answers else {}


def warm_page_cache(folder: Path) -> tuple[int, int]:
    """Read every file of a checkpoint once; bytes of all shards, and of the largest."""
    sizes = []
    for file in sorted(folder.glob("*.safetensors")):
        sizes.append(file.stat().st_size)
        with open(file, "rb", buffering=0) as stream:
            buffer = bytearray(1 << 24)
            while stream.readinto(buffer):
                pass
    return sum(sizes), max(sizes)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One side of a row: spread of the seconds, the largest of everything else."""
    result: dict[str, Any] = {"seconds": spread([run["seconds"] for run in runs])}
    result["first_use_s"] = round(runs[0]["warm_up_s"], 2)  # imports, a tiny model and, the first time, kernels
    for name in runs[0]:
        if name.endswith("_bytes"):
            result[name] = max(run[name] for run in runs)
    if "device_peak_bytes" in result:
        result["device_over_model_bytes"] = max(run["device_peak_bytes"] - run["device_model_bytes"] for run in runs)
    return result


def measure(kind: str, folder: Path, job: dict[str, Any], runs: int, deadline: float) -> dict[str, Any]:
    """One row: both sides in turn, ``runs`` times or until the deadline. A peer that fails leaves ours alone."""
    taken: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    order = ["ours", "peer"]
    for number in range(runs):
        if number and time.monotonic() > deadline:
            print(f"-- {kind}: stopped after {number} of {runs} runs, out of time", flush=True)
            break
        for name in list(order):
            try:
                taken[name].append(side(name, folder, {**job, "format": kind}))
            except SideError as error:
                if name == "ours":
                    raise
                print(f"-- {error}; ours goes on alone", flush=True)
                order, taken["peer"] = ["ours"], []
                continue
            print(f"-- {kind} {name}: {taken[name][-1]['seconds']:.2f} s", flush=True)
        order.reverse()
    row = {"benchmark": "load", "case": kind, "peer": "transformers + bitsandbytes", "ours": summary(taken["ours"])}
    row |= {"theirs": None, "ratio": None, "bound": BOUNDS[kind], "passed": False}
    if taken["peer"]:
        seconds = ([run["seconds"] for run in taken[name]] for name in ("ours", "peer"))
        row["theirs"], row["ratio"] = summary(taken["peer"]), paired_ratio(*seconds)
        row["passed"] = row["ratio"]["median"] <= BOUNDS[kind]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """What is printed last: ours, with theirs in brackets."""
    lines = [f"{'':5}{'seconds':>16}{'ratio':>7}{'bound':>6}  {'device peak over model':>24}{'host peak':>20}  MB"]
    for row in rows:
        ours, theirs = row["ours"], row["theirs"]

        def pair(name: str, ours: dict[str, Any] = ours, theirs: dict[str, Any] | None = theirs) -> str:
            other = "-" if theirs is None else f"{theirs.get(name, 0) / 1e6:.0f}"
            return f"{ours.get(name, 0) / 1e6:.0f} ({other})"

        other = "-" if theirs is None else f"{theirs['seconds']['median']:.2f}"
        ratio = "-" if theirs is None else f"{row['ratio']['median']:.3f}"
        text = f"{row['case']:5}{ours['seconds']['median']:8.2f} ({other:>5}){ratio:>7}{row['bound']:>6}  "
        text += f"{pair('device_over_model_bytes'):>24}{pair('host_anonymous_bytes'):>20}  "
        failed = [name for name in ("passed", "passed_device_memory", "passed_host_memory") if not row[name]]
        lines.append(text + " ".join(name.replace("passed", "FAILED") for name in failed))
    sizes = [f"{name} {rows[0][f'{name}_bytes'] / 1e6:.0f} MB" for name in ("checkpoint", "shard", "layer")]
    return "\n".join([*lines, ", ".join(sizes)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--formats", default="nf4,int8", help="of nf4, int8")
    parser.add_argument("--runs", type=int, default=3, help="loads of each side and format (3)")
    sizes = {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "vocab": 32000}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of the model ({default})")
    parser.add_argument("--tiny", action="store_true", help="a model of 4 MB instead: does the script run?")
    parser.add_argument("--shard-mb", type=int, default=2000, help="size of a checkpoint file at most (2000)")
    parser.add_argument("--budget", type=float, default=330, help="seconds after which no further run starts (330)")
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here, or use the one that is here")
    parser.add_argument("--profile", action="store_true", help="one more load of ours each, to see where its time goes")
    parser.add_argument("--commit", help="commit of the code, where it runs outside of its repository")
    parser.add_argument("--output", type=Path, help="folder for load.jsonl; default: benchmarks/results/<device>/")
    parser.add_argument("--no-store", action="store_true", help="store no rows")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON lines, not as a table")
    arguments = parser.parse_args(argv)
    formats = arguments.formats.split(",")
    if unknown := set(formats) - set(BOUNDS):
        parser.error(f"--formats: {', '.join(sorted(unknown))} is not of nf4, int8")
    if arguments.runs < 1:
        parser.error(f"--runs {arguments.runs}: pass 1 or more")
    output = arguments.output / "load.jsonl" if arguments.output else None
    if output is None and not arguments.no_store and not arguments.tiny:
        output = results_file("load", device_slug(arguments.device))
    shape = {name: getattr(arguments, name) for name in sizes} | {"shard_bytes": arguments.shard_mb * 1_000_000}
    if arguments.tiny:
        shape = {**_TINY, "layers": 2, "shard_bytes": 1_000_000}
    with tempfile.TemporaryDirectory(prefix="onegpu-load-") as scratch:
        rows = run(arguments, formats, Path(scratch), shape, output)
    print("\n".join(json.dumps(row) for row in rows) if arguments.json else table(rows), flush=True)
    return 0 if arguments.tiny or all(row["passed"] for row in rows) else 1


def run(
    arguments: argparse.Namespace, formats: list[str], scratch: Path, shape: dict[str, Any], output: Path | None
) -> list[dict[str, Any]]:
    """Make the checkpoint, then measure; rows are stored as they come."""
    start = time.monotonic()
    device = arguments.device
    folder, tiny = arguments.folder or scratch / "model", scratch / "tiny"
    side("make", tiny, {**_TINY, "device": device})
    if not (folder / "config.json").is_file():
        side("make", folder, {**shape, "device": device})
    total, shard = warm_page_cache(folder)
    print(f"-- checkpoint of {total / 1e9:.2f} GB ready after {time.monotonic() - start:.0f} s", flush=True)
    where = environment(device, arguments.commit)
    layer = 2 * shape["hidden"] * (4 * shape["hidden"] + 3 * shape["intermediate"])
    facts = {"checkpoint_bytes": total, "shard_bytes": shard, "layer_bytes": layer, "shape": shape}
    job = {"device": device, "warm_up": str(tiny)}
    rows = []
    for kind in formats:
        row = {**measure(kind, folder, job, arguments.runs, start + arguments.budget), **facts}
        row["passed_device_memory"] = row["ours"].get("device_over_model_bytes", 0) <= layer
        row["passed_host_memory"] = row["ours"]["host_anonymous_bytes"] <= shard
        rows.append({**row, "environment": where})
        if output is not None:
            store_rows(output, rows)
    for kind in formats if arguments.profile else []:
        text = side("ours", folder, {**job, "format": kind, "profile": True})["profile"]
        print(f"\n== where our {kind} load spends its time\n{text}\n", flush=True)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
