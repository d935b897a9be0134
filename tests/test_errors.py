"""Errors say what, which value and what to do, and stay what scripts already catch."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from onegpu.errors import ArgumentError, CheckpointError, MemoryBudgetError, OneGPUError, SamplingError, bad_argument


def test_bad_argument_names_argument_value_and_fix():
    error = bad_argument("quant_type", "nf5", "is not a quantisation type", "Use 'nf4' or 'fp4'")
    assert str(error) == "quant_type='nf5' is not a quantisation type. Use 'nf4' or 'fp4'."
    with pytest.raises(ValueError):
        raise error


def test_bad_argument_shortens_long_values_but_not_paths():
    path = "folder/" * 20 + "model.safetensors"
    assert path in str(bad_argument("path", path, "does not exist", "Check it"))
    assert len(str(bad_argument("tokens", list(range(10**6)), "is too long", "Shorten it"))) < 500
    assert len(str(bad_argument("prompt", "a" * 10**6, "is too long", "Shorten it"))) < 500


def test_checkpoint_error_keeps_its_parts_through_pickle():
    error = CheckpointError(file=Path("a.safetensors"), tensor="h.0.weight", reason="is cut short", fix="Copy it again")
    assert str(error) == "a.safetensors: tensor 'h.0.weight': is cut short. Copy it again."
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is CheckpointError and str(copy) == str(error)
    assert (copy.file, copy.tensor, copy.reason, copy.fix) == (error.file, error.tensor, error.reason, error.fix)
    assert str(CheckpointError(file="a", reason="is empty")) == "a: is empty."


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (ArgumentError, ValueError),
        (CheckpointError, ValueError),
        (MemoryBudgetError, MemoryError),
        (SamplingError, RuntimeError),
    ],
)
def test_each_error_is_a_onegpu_error_and_a_builtin_one(kind: type[OneGPUError], builtin: type[Exception]):
    assert issubclass(kind, OneGPUError) and issubclass(kind, builtin)
