"""U11 and U13: a BLOOM of bloom-3b's shape with the budgets of two GPUs that do not hold it, loaded and generating.

Each case is a load as a user writes it. Stored: how full each GPU is (the bound: at least 80 % of its budget, and never
more than all of it), what waits in CPU memory, how far the logits are from those of the same model on one GPU, and
seconds. That a GPU that does not exist and `"cpu": 0` are errors, before anything is loaded, is checked too.

    python -m benchmarks.two_gpus                   two GPUs, 6 GB on disk, about a minute
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import onegpu
from benchmarks.environment import device_slug, environment, results_file, store_rows
from onegpu.errors import ArgumentError, MemoryBudgetError

BLOOM_3B = {"hidden_size": 2560, "n_layer": 30, "n_head": 32, "vocab_size": 250880}
CASES: dict[str, dict[str, Any]] = {
    "U11": {"max_memory": {0: "600MB", 1: "1GB"}, "load_in_4bit": True},
    "U13": {"max_memory": {0: "1GB", 1: "2GB"}, "load_in_8bit": True},
}
BYTES = {"600MB": 600_000_000, "1GB": 1_000_000_000, "2GB": 2_000_000_000}
PROMPT = torch.tensor([[10, 42, 137, 251, 77, 300, 12, 9]])
NEW_TOKENS = 20


def make(folder: Path) -> None:
    """A random checkpoint in float16."""
    with torch.device("cuda"):
        model = transformers.BloomForCausalLM(transformers.BloomConfig(**BLOOM_3B)).half()
    model.save_pretrained(folder)


def load(folder: Path, **arguments: Any) -> Any:
    return onegpu.AutoModelForCausalLM.from_pretrained(folder, device_map="auto", **arguments)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT.to(model.device)).logits[0].float().cpu()


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One row: the model on GPU 0 alone first, for its logits; then within the budgets."""
    arguments = CASES[name]
    whole = onegpu.AutoModelForCausalLM.from_pretrained(
        folder, device_map=0, **{key: value for key, value in arguments.items() if key != "max_memory"}
    )
    expected = logits(whole)
    del whole
    gc.collect()
    torch.cuda.empty_cache()
    before = [torch.cuda.memory_allocated(index) for index in (0, 1)]
    start = time.perf_counter()
    model = load(folder, **arguments)
    seconds = time.perf_counter() - start
    budgets = [BYTES[arguments["max_memory"][index]] for index in (0, 1)]
    used = [torch.cuda.memory_allocated(index) - before[index] for index in (0, 1)]
    error = (logits(model) - expected).abs().max() / expected.abs().max()
    start = time.perf_counter()
    tokens = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    row = {
        "benchmark": "two_gpus",
        "case": name,
        "arguments": {**arguments, "max_memory": {str(k): v for k, v in arguments["max_memory"].items()}},
        "ours": {
            "budget_bytes": budgets,
            "used_bytes": used,
            "share": [round(a / b, 4) for a, b in zip(used, budgets, strict=True)],
            "cpu_bytes": sum(p.nbytes for p in {*model.parameters(), *model.buffers()} if p.device.type == "cpu"),
            "load_s": round(seconds, 2),
            "s_per_token": round((time.perf_counter() - start) / NEW_TOKENS, 3),
            "new_tokens": tokens.shape[1] - PROMPT.shape[1],
            "logits_error": float(f"{error:.3g}"),
        },
        "bound": 0.8,
    }
    filled = all(0.8 * budget <= size <= 1.02 * budget for size, budget in zip(used, budgets, strict=True))
    row["passed"] = filled and error.item() < 2e-2 and row["ours"]["new_tokens"] == NEW_TOKENS
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return row


def refused(folder: Path, kind: type[Exception], arguments: dict[str, Any]) -> str:
    """The message of the error that such a load ends in, and must."""
    before = torch.cuda.memory_allocated(0)
    try:
        load(folder, **arguments)
    except kind as error:
        assert torch.cuda.memory_allocated(0) == before, "something was loaded before the refusal"
        return str(error)
    raise AssertionError(f"{arguments} was not refused")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_gpus", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here, or use the one that is here")
    parser.add_argument("--commit", help="commit of the code, where it runs outside of its repository")
    parser.add_argument("--output", type=Path, help="folder for two_gpus.jsonl; default: benchmarks/results/<device>/")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON lines")
    arguments = parser.parse_args(argv)
    if torch.cuda.device_count() < 2:
        parser.error(f"this needs two GPUs; there are {torch.cuda.device_count()}")
    output = arguments.output / "two_gpus.jsonl" if arguments.output else results_file("two_gpus", device_slug("cuda"))
    where = environment("cuda", arguments.commit)
    with tempfile.TemporaryDirectory(prefix="onegpu-two-") as scratch:
        folder = arguments.folder or Path(scratch)
        if not (folder / "config.json").is_file():
            make(folder)
        rows = [{**measure(name, folder), "environment": where} for name in CASES]
        store_rows(output, rows)
        for limit, kind, words in (
            ({0: "600MB", 1: "1GB", "cpu": 0}, MemoryBudgetError, "missing"),
            ({0: "600MB", 7: "1GB"}, ArgumentError, "max_memory=7"),
        ):
            message = refused(folder, kind, {"max_memory": limit, "load_in_4bit": True})
            assert words in message, message
            print(f"-- {limit}: {message}", flush=True)
    for row in rows:
        print(json.dumps(row) if arguments.json else f"{row['case']}: {row['ours']} passed={row['passed']}", flush=True)
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
