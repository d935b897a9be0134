"""What our loop costs or saves on a CPU: `generate` of the real SmolLM2 in float32, ours against transformers'.

One model, whose class still has transformers' method; whole calls, prompt included, in turn. Counted in seconds of CPU
time of one thread, which others on the machine do not lengthen. Floor of the ratio: 1.0.

    python -m benchmarks.cpu_generate                stored in benchmarks/results/cpu/
    python -m benchmarks.cpu_generate --tokens 16 --repeats 3 --no-store --json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from benchmarks.cpu_decode import PROMPT
from benchmarks.environment import environment, results_file, store_rows
from benchmarks.spread import paired_ratio, spread

FLOOR = 1.0
# What the loop does beyond choosing the most likely token.
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 50, "temperature": 0.8},
    "batch of 2, padded": {"do_sample": False},
}


def measure(model: Any, inputs: Any, arguments: dict[str, Any], tokens: int, repeats: int) -> dict[str, list[float]]:
    """Tokens a second of CPU time, by side, after one call of each that is not counted."""
    taken: dict[str, list[float]] = {"ours": [], "theirs": []}
    ways = {"ours": model.generate, "theirs": lambda **given: type(model).generate(model, **given)}
    for repeat in range(-1, repeats):
        for side in ("ours", "theirs") if repeat % 2 else ("theirs", "ours"):
            began = time.process_time()
            ways[side](**inputs, max_new_tokens=tokens, min_new_tokens=tokens, **arguments)
            if repeat >= 0:
                taken[side].append(tokens / (time.process_time() - began))
    return taken


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_generate", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=96, help="new tokens a call (96)")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of calls of each case (7)")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {'; '.join(CASES)}")
    parser.add_argument("--no-store", action="store_true", help="leave benchmarks/results/ as it is")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON lines")
    arguments = parser.parse_args(argv)
    cases = [case for case in CASES if case in arguments.cases]
    if arguments.tokens < 2 or arguments.repeats < 1 or not cases:
        parser.error("--tokens must be 2 or more, --repeats 1 or more, and --cases name one")

    import torch
    import transformers

    from benchmarks.perplexity import model_folder
    from onegpu import AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder, where, rows = model_folder(), environment("cpu"), []
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for case in cases:
        texts = [PROMPT, PROMPT[:40]] if "batch" in case else [PROMPT]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        taken = measure(model, inputs, CASES[case], arguments.tokens, arguments.repeats)
        ratio = paired_ratio(taken["ours"], taken["theirs"])
        row = {
            "benchmark": "cpu_generate",
            "case": case,
            "peer": "transformers' generate",
            "ours": {"tokens_per_s": spread(taken["ours"])},
            "theirs": {"tokens_per_s": spread(taken["theirs"])},
            "ratio": ratio,
            "floor": FLOOR,
            "passed": ratio["median"] >= FLOOR,
            "new_tokens": arguments.tokens,
            "prompt_tokens": inputs["input_ids"].shape[1],
            "threads": 1,
            "clock": "cpu",
            "load_average": round(os.getloadavg()[0], 1),
            "environment": where,
        }
        rows.append(row)
        speed = row["ours"]["tokens_per_s"]["median"]
        text = f"{case:<20} {speed:6.2f} tokens/s, {ratio['median']:.3f} x transformers "
        text += f"({ratio['low']:.3f} to {ratio['high']:.3f})" + ("" if row["passed"] else f"   BELOW {FLOOR}")
        print(json.dumps(row) if arguments.json else text, flush=True)
    if not arguments.no_store:
        store_rows(results_file("cpu_generate", "cpu"), rows)
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
