"""`onegpu env`: what this machine and installation are, the page to paste into a bug report."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib import metadata
from typing import Any

import typer

from onegpu import __version__
from onegpu.cli.failure import guarded
from onegpu.cli.options import Json

PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface-hub", "peft",
    "bitsandbytes", "gguf", "cuda-core", "numpy",
)  # fmt: skip
# Run on these architectures by the project; another one that torch supports is compiled for, and nobody has tried it.
TESTED_CAPABILITIES: frozenset[tuple[int, int]] = frozenset({(9, 0)})


@guarded
def env(json_output: Json = False) -> None:
    """Show the GPU, the driver, the versions, the kernels that would be used, and what is missing.

    Paste its output into a bug report.

    Examples:

        onegpu env

        onegpu env --json > env.json
    """
    facts = collect()
    typer.echo(json.dumps(facts) if json_output else page(facts))


def collect() -> dict[str, Any]:
    """Everything the page shows, as JSON-ready values."""
    import torch

    from onegpu import hardware
    from onegpu.kernels import available
    from onegpu.kernels.attention_dispatch import by_cudnn

    gpus = []
    for index in range(hardware.device_count()):
        device = hardware.detect(index)
        assert device is not None
        gpus.append({**asdict(device), "capability": list(device.capability), "support": support(device.capability)})
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "onegpu": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"name": hardware.cpu_name(), "cores": hardware.cpu_count()},
        "memory": {"total_bytes": hardware.total_host_bytes(), "free_bytes": hardware.free_host_bytes()},
        "gpus": gpus,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "packages": versions,
        "kernels": available(),
        "attention_by_cudnn": by_cudnn(),
        "missing": missing(versions, bool(gpus), torch.version.cuda),
    }


def support(capability: tuple[int, int]) -> str:
    """How far the project stands behind an architecture."""
    if capability in TESTED_CAPABILITIES:
        return "tested"
    if capability >= (8, 0):
        return "compiled only"
    return "best effort, float16" if capability >= (7, 5) else "not supported"


def missing(versions: dict[str, str | None], has_gpu: bool, cuda: str | None) -> list[str]:
    """What is not there and what that costs, one sentence each."""
    found = []
    if not has_gpu:
        why = "this torch is a CPU build" if cuda is None else "torch sees none"
        found.append(f"GPU: {why}; everything runs on the CPU, slowly")
    elif versions["triton"] is None:
        found.append("triton: no GPU kernels; it comes with torch's CUDA build")
    if versions["gguf"] is None:
        found.append("gguf: most GGUF files cannot be read; pip install 'onegpu[gguf]'")
    return found


def page(facts: dict[str, Any]) -> str:
    """The facts as plain text, in lines that survive being pasted."""
    lines = [
        f"onegpu        {facts['onegpu']}",
        f"python        {facts['python']}",
        f"platform      {facts['platform']}",
        f"CPU           {facts['cpu']['name']}, {facts['cpu']['cores']} cores",
        f"memory        {_gigabytes(facts['memory']['total_bytes'])}, {_gigabytes(facts['memory']['free_bytes'])} free",
        f"CUDA          {facts['cuda'] or 'none'}, driver {facts['driver'] or 'none'}",
    ]
    for index, gpu in enumerate(facts["gpus"]):
        rate = f"{gpu['bytes_per_s'] / 1e12:.2f} TB/s" if gpu["bytes_per_s"] else "unknown bandwidth"
        lines.append(
            f"GPU {index}         {gpu['name']}, compute capability {gpu['capability'][0]}.{gpu['capability'][1]} "
            f"({gpu['support']}), {_gigabytes(gpu['memory_bytes'])}, {rate}, {gpu['sms']} SMs"
        )
    if not facts["gpus"]:
        lines.append("GPU           none")
    lines += ["", "packages"]
    lines += [f"  {name:<25}{version or 'not installed'}" for name, version in facts["packages"].items()]
    lines += ["", "kernels"]
    lines += [f"  {name:<25}{implementation}" for name, implementation in facts["kernels"].items()]
    lines += ["", "attention through cuDNN on Hopper, where it was measured faster"]
    lines += [f"  {entry}" for entry in facts["attention_by_cudnn"]] or ["  nothing"]
    lines += ["", "missing"]
    lines += [f"  {sentence}" for sentence in facts["missing"]] or ["  nothing"]
    return "\n".join(lines)


def _gigabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The NVIDIA driver's version; None without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(result.stdout.split()), None)
