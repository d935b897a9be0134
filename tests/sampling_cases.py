"""Random scores and texts, and transformers' processors with and without onegpu's form of them."""

from __future__ import annotations

from typing import Any

import torch

from onegpu.engine.processors import translate
from onegpu.engine.steps import Frame, Step, Text

VOCAB = 40
MAX_LENGTH = 24
BATCH = 3


def frame(device: str = "cpu", *, batch: int = BATCH, rows: int | None = None, vocab: int = VOCAB) -> Frame:
    return Frame(batch, batch if rows is None else rows, vocab, MAX_LENGTH, torch.device(device))


def scores(seed: int, *, batch: int = BATCH, vocab: int = VOCAB, device: str = "cpu") -> torch.Tensor:
    """float32 [batch, vocab], all different within a row, some of them negative."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, vocab, generator=generator) * 3).to(device)


def text(seed: int, length: int, *, batch: int = BATCH, vocab: int = 8, device: str = "cpu") -> Text:
    """Rows of `length` tokens of a small vocabulary, so that they repeat; what stands behind them is another text."""
    generator = torch.Generator().manual_seed(seed)
    history = torch.randint(0, vocab, (batch, MAX_LENGTH + 1), generator=generator)
    return Text(history.to(device), torch.full((batch,), length, device=device))


def step_for(processor: Any, device: str = "cpu", **sizes: Any) -> Step:
    step = translate(processor, frame(device, **sizes))
    assert isinstance(step, Step), step
    return step


def assert_as_transformers(processor: Any, given: torch.Tensor, so_far: Text, device: str = "cpu") -> None:
    """The step's scores are the processor's bit for bit, and what was given is unchanged."""
    history, lengths = so_far
    wanted = processor(history[:, : int(lengths[0])], given.clone())
    kept = given.clone()
    got = step_for(processor, device, batch=given.shape[0], vocab=given.shape[1])(given, so_far)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(given, kept, rtol=0, atol=0, equal_nan=True)
