"""Hiding quantised tensors from what ``nn.Module`` does to the rest of a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def set_aside(module: nn.Module, *names: str) -> Iterator[None]:
    """Inside, ``module`` has no parameter or buffer of these names; afterwards they are back, in their old places."""
    kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    held = [(own, dict(own)) for own in kinds]
    for own, before in held:
        for name in before.keys() & set(names):
            del own[name]
    try:
        yield
    finally:
        for own, before in held:
            now = dict(own)
            own.clear()  # and filled again in order: scripts rely on weight coming before bias
            for name, value in before.items():
                if name in names:
                    own[name] = value
                elif name in now:
                    own[name] = now[name]
            own.update(now)
