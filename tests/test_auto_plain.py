"""Unquantised loads through our Auto classes are checked before anything is read into memory, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from onegpu import AutoModelForCausalLM
from onegpu.errors import CheckpointError, MemoryBudgetError
from tests.tiny import tiny_model_dir


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model_dir(tmp_path, "llama")


def test_too_little_memory_says_how_much_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(parameter.nbytes for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())
    monkeypatch.setattr("onegpu.placement.fit.free_bytes", lambda device: size - 1000)
    with pytest.raises(MemoryBudgetError, match=r"1\.0 kB are missing\. load_in_4bit=True"):
        AutoModelForCausalLM.from_pretrained(folder)
    # Half of it in 16 bits: that fits.
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").get_memory_footprint() < size


def test_a_truncated_file_is_named(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=file.name):
        AutoModelForCausalLM.from_pretrained(folder)
