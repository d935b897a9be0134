"""Copies of a checkpoint with its tensors or its config changed, for tests of what must not load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from onegpu.errors import CheckpointError

Edit = Callable[[dict[str, torch.Tensor]], object]


def damaged(source: Path, target: Path, edit: Edit, **config: Any) -> Path:
    """A copy of `source` whose tensors went through `edit` (in place), with these fields of config.json."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    if config:
        fields = json.loads((source / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**fields, **config}))
    return target


def changed(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """An edit: `name` becomes `function` of what it was."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = function(tensors[name])

    return edit


def set_one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """One element in the middle becomes `value`."""

    def function(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return function


def refuses(load: Callable[[], object], folder: Path, tensor: str, reason: str) -> None:
    """`load()` raises a CheckpointError that names a file of `folder`, the tensor, and a reason with these words."""
    with pytest.raises(CheckpointError) as caught:
        load()
    error = caught.value
    assert str(folder) in error.file, error
    assert error.tensor is not None and tensor in error.tensor, error
    assert reason in error.reason, error
