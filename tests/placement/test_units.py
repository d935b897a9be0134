from __future__ import annotations

import pytest
import torch
from torch import nn

from onegpu.placement.sizes import stored_sizes
from onegpu.placement.units import find_units, group_tied, items_of
from tests.placing import bloom
from tests.tiny import _RECIPES, tiny_model


@pytest.mark.parametrize("kind", sorted(_RECIPES))
def test_every_tensor_is_in_one_part(kind: str):
    model = tiny_model(kind)
    sizes = stored_sizes(model)
    units = find_units(model, sizes)
    assert sum(unit.bytes for unit in units) == sizes.total
    for name in sizes.bytes:
        assert sum(name == unit.name or name.startswith(f"{unit.name}.") for unit in units) == 1
    assert sum(unit.block for unit in units) >= 2
    blocks = [unit for unit in units if unit.block]
    whole = {type(module).__name__ for module in model.modules()} & set(model._no_split_modules or ())
    assert not whole or {type(unit.module).__name__ for unit in blocks} & whole


def test_bloom():
    model = bloom("fp4")
    units = find_units(model.model, model.sizes)
    assert [unit.name for unit in units if not unit.block] == [
        "transformer.word_embeddings",
        "transformer.word_embeddings_layernorm",
        "transformer.ln_f",
        "lm_head",
    ]
    groups = group_tied(units, model.sizes)
    assert [unit.name for unit in groups[0]] == ["transformer.word_embeddings", "lm_head"]
    items = items_of(groups)
    assert items[0].tail and items[0].work == items[0].bytes  # the head's work, at the head's place
    assert not items[1].tail and items[-1].tail
    assert sum(item.block for item in items) == 30


class Mixed(nn.Module):
    """Tensors of its own, a list with a list inside, a container without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3))
        self.stages = nn.ModuleList(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])}) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        self.empty = nn.Dropout()


def test_modules_of_any_shape():
    units = find_units(Mixed(), stored_sizes(Mixed()))
    assert [(unit.name, unit.block) for unit in units] == [
        ("token", False),
        ("stages.0", True),
        ("stages.1", True),
        ("head", False),
    ]


def test_names_of_the_user_divide_a_block():
    model = bloom("float16")
    units = find_units(model.model, model.sizes, ["transformer.h.3.mlp", "transformer.h"])
    names = [unit.name for unit in units]
    assert "transformer.h.3.mlp" in names and "transformer.h.3.self_attention" in names
    assert "transformer.h.2" in names and "transformer.h.3" not in names
