"""Expanded copies on a CPU: allowed by a share of free memory, counted, and the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onegpu import AutoModelForCausalLM
from onegpu.nn import Linear4bit
from onegpu.placement import memory_table
from onegpu.placement.expand import SHARE_OF_FREE_MEMORY, allow_expansion
from tests.tiny import tiny_model_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("expand"), "llama")


def _layers(model: torch.nn.Module) -> list[Linear4bit]:
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def test_a_quarter_of_free_memory_is_the_limit(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True)
    needed = sum(layer.in_features * layer.out_features for layer in _layers(model)) * 4
    free = int(needed / SHARE_OF_FREE_MEMORY)
    assert allow_expansion(model, free) == needed
    assert all(layer.expand_on_cpu for layer in _layers(model))
    assert allow_expansion(model, free - 4) == 0
    assert not any(layer.expand_on_cpu for layer in _layers(model))


def test_copies_are_counted_and_answers_are_the_same(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True)
    ids = torch.arange(5, 15)[None]
    allow_expansion(model, 0)
    packed = model.get_memory_footprint()
    with torch.no_grad():
        plain = model(ids).logits
        assert model.get_memory_footprint() == packed, "a copy was kept although none was allowed"
        needed = allow_expansion(model, 1 << 40)
        assert model.get_memory_footprint() == packed, "copies are made by the first call, not before"
        expanded = model(ids).logits
    torch.testing.assert_close(expanded, plain, rtol=1e-5, atol=1e-5)
    assert model.get_memory_footprint() == packed + needed
    assert sum(row.bytes for row in memory_table(model) if row.name == "expanded copies") == needed


def test_copies_go_with_a_move_and_stay_out_of_files(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True)
    allow_expansion(model, 1 << 40)
    with torch.no_grad():
        model(torch.arange(5, 15)[None])
    assert all(layer.expanded is not None for layer in _layers(model))
    assert not any("expanded" in name for name in model.state_dict())
    model.to("cpu")
    assert all(layer.expanded is None for layer in _layers(model))


def test_training_makes_no_copies(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True)
    allow_expansion(model, 1 << 40)
    model(torch.arange(5, 15)[None])
    assert all(layer.expanded is None for layer in _layers(model))
