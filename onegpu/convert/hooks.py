"""The few changes to other packages that nothing else reaches: all of them, in this file.

Each replaces one name of one module by a wrapper. They are installed when the first model is quantised, and
:func:`undo` takes them back. A package that is not imported yet is not imported for it: its hook waits until the
user's script imports it. ``tests/convert/test_hooks.py`` fails when a package no longer has, or no longer asks, what
is wrapped here.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

logger = logging.getLogger("onegpu")


@dataclass(frozen=True)
class Hook:
    """``module.name`` is replaced by ``wrap(module.name)``. loss: what does not work without it."""

    module: str
    name: str
    wrap: Callable[[Any], Any]
    loss: str


def _wrap_lora_dispatcher(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT builds its adapter layer; around a quantised layer it becomes one of ours, which can merge."""

    @functools.wraps(dispatch)
    def dispatch_default(*args: Any, **kwargs: Any) -> Any:
        from onegpu.convert.peft import adopt

        return adopt(dispatch(*args, **kwargs))

    return dispatch_default


HOOKS = (
    Hook(
        "peft.tuners.lora.model",
        "dispatch_default",
        _wrap_lora_dispatcher,
        "LoRA adapters cannot be merged into quantised layers",
    ),
)
_originals: dict[Hook, Any] = {}


def install() -> None:
    """Install every hook: now where the package is imported, else when it is. A second call changes nothing."""
    for hook in HOOKS:
        module = sys.modules.get(hook.module)
        if module is not None and not _being_imported(module):
            _apply(hook, module)
    if _waiting() and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def undo() -> None:
    """Take every hook back. Adapter layers that were made meanwhile stay as they are."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for hook, (original, wrapper) in list(_originals.items()):
        module = sys.modules.get(hook.module)
        if module is not None and getattr(module, hook.name, None) is wrapper:  # else somebody wrapped ours: leave it
            setattr(module, hook.name, original)
        del _originals[hook]


def _apply(hook: Hook, module: ModuleType) -> None:
    if hook in _originals:
        return
    original = getattr(module, hook.name, None)
    if original is None:
        logger.warning("%s has no %s in the version installed here: %s", hook.module, hook.name, hook.loss)
        return
    wrapper = hook.wrap(original)
    setattr(module, hook.name, wrapper)
    _originals[hook] = (original, wrapper)


def _waiting() -> list[Hook]:
    return [hook for hook in HOOKS if hook not in _originals]


def _being_imported(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class _Finder(MetaPathFinder):
    """Finds nothing by itself: gives a module that a hook waits for to its usual finder, and applies the hook after."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not any(hook.module == fullname for hook in _waiting()):
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The usual loader, and the hooks after it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        for hook in HOOKS:
            if hook.module == module.__name__:
                _apply(hook, module)
        if not _waiting() and _finder in sys.meta_path:
            sys.meta_path.remove(_finder)


_finder = _Finder()
