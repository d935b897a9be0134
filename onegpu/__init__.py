"""onegpu: Hugging Face transformer models at the limit of the GPU you have.

`import onegpu` does no work: each public name is looked up in the module that owns it when it is first used, so that
neither torch, transformers nor Triton is imported, and nothing is compiled, before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # The model classes are made at run time, as subclasses of these.
    from transformers import AutoModel, AutoModelForCausalLM

    from onegpu import errors, functional, nn
    from onegpu.auto import AutoConfig, AutoProcessor, AutoTokenizer, BitsAndBytesConfig, pipeline
    from onegpu.convert import Report
    from onegpu.engine.optimize import optimize, restore
    from onegpu.kernels.warmup import warmup

__version__ = "0.1.0.dev0"

# What `dir()` and `import *` show. Every other Auto class of transformers is reached by its name in the same way.
__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoProcessor",
    "AutoTokenizer",
    "BitsAndBytesConfig",
    "Report",
    "errors",
    "functional",
    "nn",
    "optimize",
    "pipeline",
    "restore",
    "warmup",
]

_SUBMODULES = frozenset({"errors", "functional", "nn"})
_OWNERS = {
    "BitsAndBytesConfig": "onegpu.auto",
    "pipeline": "onegpu.auto",
    "Report": "onegpu.convert",
    "optimize": "onegpu.engine.optimize",
    "restore": "onegpu.engine.optimize",
    "warmup": "onegpu.kernels.warmup",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    owner = "onegpu.auto" if name.startswith("Auto") else _OWNERS.get(name)
    if owner is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(owner), name)
    globals()[name] = value  # the next use is a plain attribute look-up
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
