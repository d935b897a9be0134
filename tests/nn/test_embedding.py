"""Quantised embeddings: the rows of the dequantised table, wherever the module moves."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from onegpu import functional as F
from onegpu import nn
from tests.matrices import weights

CLASSES = [nn.EmbeddingNF4, nn.EmbeddingFP4, nn.Embedding8bit]


def make(kind: type, columns: int, dtype: torch.dtype = torch.float32, **options: Any) -> torch.nn.Embedding:
    module = kind(50, columns, dtype=dtype, **options)
    module.load_state_dict({"weight": weights((50, columns), dtype)})
    return module


def dequantized(module: torch.nn.Embedding) -> torch.Tensor:
    if isinstance(module, nn.Embedding8bit):
        return F.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).to(module.dtype)
    return F.dequantize_4bit(module.weight.data, module.weight.quant_state)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("columns", [1, 65, 66, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_those_of_the_table(device: str, kind: type, columns: int, dtype: torch.dtype) -> None:
    module = make(kind, columns, dtype).to(device)
    assert module.weight.dtype in (torch.uint8, torch.int8)
    ids = torch.tensor([[0, 49, 7], [7, 1, 30]], device=device)
    rows = module(ids)
    assert rows.dtype == dtype and rows.shape == (2, 3, columns)
    assert torch.equal(rows, dequantized(module)[ids])
    assert module(ids[:0]).shape == (0, 3, columns)


@pytest.mark.parametrize("kind", CLASSES)
def test_rows_stay_the_same_through_casts_moves_and_copies(device: str, kind: type) -> None:
    ids = torch.arange(50, device=device)
    module = make(kind, 128).to(device)
    wanted = module(ids)
    module = module.half().to("cpu").bfloat16().to(device)
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(ids), wanted)
    assert module.to("meta").weight.is_meta


def test_a_weight_quantised_by_itself_and_one_that_lost_its_state(device: str) -> None:
    module = make(nn.EmbeddingNF4, 64)
    module.weight = module.weight.to(device)
    ids = torch.arange(50, device=device)
    wanted = module(ids)
    for other in (module, make(nn.EmbeddingNF4, 64).to(device)):
        other.weight.quant_state = None
        assert torch.equal(other(ids), wanted) and other.weight.quant_state is not None


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_storage_changes_nothing(device: str, storage: torch.dtype) -> None:
    ids = torch.arange(50, device=device)
    module = make(nn.EmbeddingNF4, 66, quant_storage=storage).to(device)
    assert module.weight.dtype == storage
    assert torch.equal(module(ids), make(nn.EmbeddingNF4, 66).to(device)(ids))


def test_bytes() -> None:
    assert make(nn.EmbeddingNF4, 128).to("cpu").nbytes() == {"weight": 50 * 64, "scales": 50 * 2 * 4}
    assert make(nn.Embedding8bit, 128).to("cpu").nbytes() == {"weight": 50 * 128, "scales": 50 * 4}


@pytest.mark.parametrize("kind", CLASSES)
def test_what_cannot_be_done_says_so(kind: type) -> None:
    module = make(kind, 64)
    with pytest.raises(RuntimeError, match="holds a float table"):
        module(torch.tensor([0]))
    with pytest.raises(NotImplementedError, match=r"emb.weight: .* cannot be saved"):
        torch.nn.ModuleDict({"emb": module}).state_dict()
