"""Reading ``config.json`` without letting it choose code.

transformers hands some fields of a downloaded config to its loader of kernels from the hub (CVE-2026-4372 and a sibling
that is still open): only names of an allow-list pass, the rest are dropped and said.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from onegpu.errors import CheckpointError

logger = logging.getLogger("onegpu")

ATTENTION_NAMES = frozenset({"eager", "sdpa", "flex_attention", "flash_attention_2", "onegpu"})
EXPERTS_NAMES = frozenset({"eager", "batched_mm", "grouped_mm"})
_DROPPED_FIELDS = ("kernel_config", "kernels", "use_kernels", "hub_kernels", "fusion_config")

# What transformers raises where a config.json is damaged, or its values do not make a model.
CONFIG_ERRORS = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError, OverflowError,
    RecursionError, StrictDataclassError,
)  # fmt: skip


def config_error(path: str | os.PathLike[str], error: BaseException) -> CheckpointError:
    """Our error for one of them."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return CheckpointError(
        file=path, reason=f"its config.json cannot be used: {text}", fix="correct config.json, or download it again"
    )


def sanitize(config: Any) -> list[str]:
    """Drop fields of a loaded transformers config that name code and are not on the allow-list, in sub-configs too.

    Returns the fields dropped, as ``name=value``; each is logged once.
    """
    dropped = []
    for part in with_subconfigs(config):
        for field, allowed in (("_attn_implementation", ATTENTION_NAMES), ("_experts_implementation", EXPERTS_NAMES)):
            value = getattr(part, field, None)
            if value is not None and value not in allowed:
                dropped.append(f"{field.lstrip('_')}={value!r}")
                setattr(part, field, None)
        for field in _DROPPED_FIELDS:
            if part.__dict__.get(field) is not None:
                dropped.append(f"{field}={part.__dict__[field]!r}")
                delattr(part, field)
    for item in dict.fromkeys(dropped):
        logger.warning(
            "config.json of %s names code to run (%s): ignored. Pass it as an argument if you trust it.",
            getattr(config, "name_or_path", "") or "the model",
            item,
        )
    return dropped


def with_subconfigs(config: Any) -> list[Any]:
    """A config and all that it is composed of."""
    parts = [config]
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "__dict__"):
            parts += with_subconfigs(part)
    return parts
