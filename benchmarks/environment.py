"""Where a result was measured, and where it is kept: one JSON line a row, under ``benchmarks/results/<device>/``.

A row is ``{"benchmark": …, "case": …, …, "environment": {…}}``. Storing a row replaces the older one of the same case
and leaves the others, so that a benchmark may run again in part; the rows of earlier runs are in git's history.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("onegpu", "torch", "triton", "transformers", "bitsandbytes", "accelerate", "safetensors")
# What a result depends on; other edits (docs, stored results) do not make it one of unknown code.
_CODE = ("onegpu", "benchmarks", "pyproject.toml", ":!benchmarks/results")


def environment(device: str = "cpu", commit: str | None = None) -> dict[str, Any]:
    """The record that every row carries: names and numbers, no path, host or user.

    Args:
        device: "cpu" or "cuda" (the current GPU).
        commit: the commit of the code, where it runs outside of its repository.

    Returns:
        date (UTC), device, cores, memory_gb, driver, versions by package, commit, dirty. None for what is unknown.
    """
    git = _git_state() if commit is None else {"commit": commit, "dirty": None}
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device_name(device),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "driver": _driver() if device == "cuda" else None,
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in _PACKAGES},
        **git,
    }


def device_name(device: str) -> str:
    """The GPU's name as its driver says it, or the CPU's."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return _cpu_name()


def device_slug(device: str) -> str:
    """Name of the folder for results of this device: "cpu", or the GPU's name, as in "nvidia-h200"."""
    return "cpu" if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def package_version(name: str) -> str | None:
    """Version of a package that is installed, or unpacked on ``sys.path``; None if it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "onegpu":
            return None
        text = (ROOT / "onegpu" / "__init__.py").read_text(encoding="utf-8")
        found = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
        return found[1] if found else None


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] or None


def _git_state() -> dict[str, Any]:
    commit = _output("git", "rev-parse", "HEAD")
    if not commit:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(_output("git", "status", "--porcelain", "--", *_CODE))}


def _output(*command: str) -> str:
    """What a command prints; "" if it fails or is not there."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def results_file(benchmark: str, slug: str) -> Path:
    """Where the rows of a benchmark on a device are kept."""
    return RESULTS / slug / f"{benchmark}.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file, in their order; none if there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def store_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Put rows into a results file: each replaces the one of the same benchmark and case, or is added at the end."""
    kept = {(row["benchmark"], row["case"]): row for row in read_rows(path)}
    for row in rows:
        kept[row["benchmark"], row["case"]] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(row) + "\n" for row in kept.values()), encoding="utf-8")
    new.replace(path)
