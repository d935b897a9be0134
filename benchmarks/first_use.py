"""The first `generate()` of a fresh process: `python -m benchmarks.first_use SHAPE KIND DEVICE` prints a line of JSON.

`measure` runs it twice in a home of its own: without kernels on disk, as on the day of installation, and with those
that the first process left there, as in every process after it. What torch itself sets up (its context, cuBLAS,
modules that load late) is taken off first, by two calls of transformers' own `generate()` on the plain model.
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.environment import ROOT

PROMPT, ANSWER = 128, 32
_TIMEOUT = 240  # seconds a process


def measure(shape: str, kind: str, device: str, tiny: bool) -> dict[str, Any]:
    """By what was on disk, what `run` found."""
    with tempfile.TemporaryDirectory() as home:
        return {disk: _process(shape, kind, device, tiny, home) for disk in ("empty", "filled")}


def _process(shape: str, kind: str, device: str, tiny: bool, home: str) -> dict[str, Any]:
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_CACHE_DIR", "TRITON_HOME")}
    # Packages of the user's own stay where they are, though the home moves.
    environment = {**kept, "HOME": home, "PYTHONUSERBASE": site.getuserbase(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.first_use", shape, kind, device, *["tiny"] * tiny]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=_TIMEOUT, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(shape: str, kind: str, device: str, tiny: bool) -> dict[str, Any]:
    """Seconds: of `optimize()`; of the first `generate()` right behind it, and what that is more than the least of the
    later ones (``first_use_s``: what still compiles beside the second would flatter); of the second (``second_s``); and
    what the report says of both parts of the first."""
    import torch

    import onegpu
    from benchmarks import models

    def seconds(call: Callable[[], Any]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    model = models.plain(shape, device, tiny)
    ids = torch.randint(3, model.config.vocab_size, (1, 8 if tiny else PROMPT), device=device)

    def generate(count: int) -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)

    torch_s = seconds(partial(generate, 2))
    torch_s -= seconds(partial(generate, 2))
    optimize_s = seconds(lambda: onegpu.optimize(model, quantize=None if kind == "bf16" else kind))
    first = seconds(partial(generate, ANSWER))
    report: Any = model.generate.report
    later = [seconds(partial(generate, ANSWER)) for _ in range(5)]
    return {
        "torch_s": round(torch_s, 3), "optimize_s": round(optimize_s, 3), "first_s": round(first, 3),
        "first_use_s": round(first - min(later), 3), "second_s": round(later[0], 3),
        "capture_s": round(report.capture_s, 3), "compile_s": round(report.compile_s, 3), "loop": report.loop,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2], sys.argv[3], "tiny" in sys.argv[4:])))
