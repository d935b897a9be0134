"""How fast the real SmolLM2 decodes on a CPU: ours in 4 and 8 bits against transformers with float32 weights.

All models stand in one process and generate in turn, greedily; the ratio is taken pair by pair. Floor in 4 bits: 0.5.

    python -m benchmarks.cpu_decode                  stored in benchmarks/results/cpu/
    python -m benchmarks.cpu_decode --tokens 16 --repeats 5 --no-store --json
    python -m benchmarks.cpu_decode --clock cpu      on a machine that others use too: seconds of CPU time, one thread
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, results_file, store_rows
from benchmarks.spread import paired_ratio, spread

PROMPT = "Why is the sky blue? Explain it to a child, step by step, and say what happens at sunset."
# Floors of the ratio to transformers in float32. None: shown, not judged.
CASES: dict[str, float | None] = {"nf4": 0.5, "fp4": 0.5, "int8": None, "nf4-packed": None}
# Decoding all weights again for every token: what 4 bits cost a CPU where there is no memory for expanded copies.
PACKED_TOKENS = 8


# CPU time is what one thread would take had it the core to itself. Several threads spend it on waiting as well.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Stamps:
    """A streamer that notes when each token came; the first thing that `generate` puts is the prompt."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: Any) -> None:
        if not self._prompt:
            self.times.append(self.clock())
        self._prompt = False

    def end(self) -> None:
        """Nothing to flush."""


def decode(model: Any, inputs: Any, tokens: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Generate exactly ``tokens`` tokens greedily: seconds to the first one, and tokens per second after it."""
    stamps = Stamps(clock)
    start = clock()
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=stamps)
    first, last = stamps.times[0], stamps.times[-1]
    return first - start, (len(stamps.times) - 1) / (last - first)


def load_models(folder: Path, cases: list[str]) -> dict[str, Any]:
    """The models by case, "float32" first: transformers' own."""
    import torch
    import transformers

    from benchmarks.perplexity_side import load
    from onegpu.placement.expand import allow_expansion

    models = {"float32": transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()}
    for case in cases:
        models[case] = load("ours", str(folder), case.removesuffix("-packed"))
        if case.endswith("-packed"):
            allow_expansion(models[case], free=0)
    return models


def measure(
    models: dict[str, Any], inputs: Any, tokens: int, repeats: int, clock: Callable[[], float]
) -> dict[str, dict[str, list[float]]]:
    """Seconds to the first token and tokens/s of every repeat, by case; each case's first call is apart, as cold."""
    taken: dict[str, dict[str, list[float]]] = {}
    for case, model in models.items():
        cold, _ = decode(model, inputs, 2, clock)
        taken[case] = {"cold": [cold], "first": [], "rate": [], "pair": []}
    for repeat in range(repeats):
        for case in list(models)[1:]:
            count = min(tokens, PACKED_TOKENS) if case.endswith("-packed") else tokens
            pair = ("float32", case) if repeat % 2 else (case, "float32")
            results = {name: decode(models[name], inputs, count, clock) for name in pair}
            for name, (first, rate) in results.items():
                taken[name]["first"].append(first)
                taken[name]["rate"].append(rate)
            taken[case]["pair"].append(results["float32"][1])
            rates = f"{results[case][1]:6.2f} tokens/s, float32 {results['float32'][1]:6.2f}"
            print(f"{repeat + 1}/{repeats} {case:<11} {rates}", file=sys.stderr, flush=True)
    return taken


def row(case: str, model: Any, taken: dict[str, Any], reference: Any, setting: dict[str, Any]) -> dict[str, Any]:
    """One stored row."""
    from onegpu.placement import memory_table

    floor, ratio = CASES[case], paired_ratio(taken["rate"], taken["pair"])
    return {
        "benchmark": "cpu_decode",
        "case": case,
        "peer": "transformers float32",
        "ours": {
            "tokens_per_s": spread(taken["rate"]),
            "first_token_s": spread(taken["first"]),
            "cold_first_token_s": round(taken["cold"][0], 3),
            "bytes": sum(line.bytes for line in memory_table(model)),
            "memory": [asdict(line) for line in memory_table(model)],
        },
        "theirs": {
            "tokens_per_s": spread(taken["pair"]),
            "bytes": sum(line.bytes for line in memory_table(reference)),
        },
        "ratio": ratio,
        "floor": floor,
        "passed": floor is None or ratio["median"] >= floor,
        **setting,
    }


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    ours, ratio = row["ours"], row["ratio"]
    text = f"{row['case']:<11} {ours['tokens_per_s']['median']:6.2f} tokens/s, {ratio['median']:.2f} x float32 "
    text += f"({ratio['low']:.2f} to {ratio['high']:.2f}), first token {ours['first_token_s']['median']:.2f} s, "
    text += f"{ours['bytes'] / 1e6:.0f} MB (float32 {row['theirs']['bytes'] / 1e6:.0f})"
    return text if row["passed"] else f"{text}   BELOW {row['floor']}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_decode", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=48, help="new tokens a call (48)")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of calls of each case (7)")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--threads", type=int, help="threads of torch (2; 1 with --clock cpu)")
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS), help="what seconds are counted (wall)")
    parser.add_argument("--no-store", action="store_true", help="leave benchmarks/results/ as it is")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON lines")
    arguments = parser.parse_args(argv)
    cases = arguments.cases.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"--cases: {', '.join(sorted(unknown))} is not of {', '.join(CASES)}")
    threads = arguments.threads or (1 if arguments.clock == "cpu" else 2)
    if arguments.clock == "cpu" and threads > 1:
        parser.error(
            f"--threads {threads}: with --clock cpu, pass 1; threads that wait for each other use CPU time too"
        )
    if arguments.tokens < 2 or arguments.repeats < 1:
        parser.error("--tokens must be 2 or more and --repeats 1 or more")

    import torch
    import transformers

    from benchmarks.perplexity import model_folder

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    setting: dict[str, Any] = {"new_tokens": arguments.tokens, "threads": threads, "clock": arguments.clock}
    where = environment("cpu")
    folder = model_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    setting["prompt_tokens"] = inputs["input_ids"].shape[1]
    models = load_models(folder, cases)
    taken = measure(models, inputs, arguments.tokens, arguments.repeats, CLOCKS[arguments.clock])
    setting["load_average"] = round(os.getloadavg()[0], 1)  # above `threads`: others used the cores too
    setting["environment"] = where
    rows = [row(case, models[case], taken[case], models["float32"], setting) for case in cases]
    if not arguments.no_store:
        store_rows(results_file("cpu_decode", "cpu"), rows)
    for each in rows:
        print(json.dumps(each) if arguments.json else line(each), flush=True)
    return 0 if all(each["passed"] for each in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
