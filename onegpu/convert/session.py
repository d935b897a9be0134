"""One load in progress: what the Auto classes and the quantizer, which transformers constructs, tell each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from onegpu.convert.report import Report
from onegpu.errors import OneGPUError
from onegpu.formats.bitsandbytes import Settings
from onegpu.formats.prefault import Prefault
from onegpu.placement.device_map import Placement, Wish


@dataclass
class Session:
    """config: a ``BitsAndBytesConfig``, the user's or the file's. settings: the same, as we use it.

    scales: names of weights quantised, each with the scales in which NaN or infinity would show; looked at once, at the
    end, since every look would wait for the device. errors: what went wrong inside transformers'
    loader, which logs exceptions and goes on. wish, placement: where the user wants the model, and where it goes.
    """

    source: str
    config: Any
    settings: Settings
    report: Report = field(default_factory=lambda: Report("load"))
    scales: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    errors: list[OneGPUError] = field(default_factory=list)
    wish: Wish = field(default_factory=Wish)
    placement: Placement | None = None
    prefault: Prefault = field(default_factory=Prefault)


_current: ContextVar[Session | None] = ContextVar("onegpu_load", default=None)


def current() -> Session:
    """The load in progress."""
    session = _current.get()
    if session is None:
        raise RuntimeError(
            "a checkpoint was claimed by onegpu outside of its Auto classes; load it with onegpu's Auto classes"
        )
    return session


@contextmanager
def loading(session: Session) -> Iterator[Session]:
    """Make ``session`` the current one."""
    token = _current.set(session)
    try:
        with session.prefault:
            yield session
    finally:
        _current.reset(token)
