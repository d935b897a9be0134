"""Stacks of experts: each matrix quantised by itself, saved and loaded under its own name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from onegpu import functional as F
from onegpu.nn import ExpertStack4bit, ExpertStack8bit
from onegpu.nn.experts import ExpertStack, replace_parameter
from tests.matrices import FLOATS, weights

E, ROWS, K = 3, 20, 26  # two matrices of [10, 26] an expert: no multiple of a block
NAMES = ("{}.w1.weight", "{}.w3.weight")
Make = Callable[..., ExpertStack]


def make_4bit(dtype: torch.dtype = torch.float32, **options: Any) -> ExpertStack4bit:
    return ExpertStack4bit((E, ROWS, K), dtype, NAMES, **{"quant_type": "nf4", "compress_statistics": True, **options})


def make_8bit(dtype: torch.dtype = torch.float32) -> ExpertStack8bit:
    return ExpertStack8bit((E, ROWS, K), dtype, NAMES)


MAKERS: dict[str, Make] = {
    "nf4 nested": make_4bit,
    "fp4": lambda *a: make_4bit(*a, quant_type="fp4", compress_statistics=False),
    "bf16 storage": lambda *a: make_4bit(*a, quant_storage=torch.bfloat16, blocksize=128),
    "int8": make_8bit,
}


def filled(kind: str, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> ExpertStack:
    stack = MAKERS[kind](dtype)
    stack.quantize_(weights((E, ROWS, K), dtype, device, seed=seed))
    return stack


def by_hand(kind: str, matrix: torch.Tensor) -> torch.Tensor:
    """One part of one expert, quantised and dequantised alone."""
    if kind == "int8":
        codes, maxima, _ = F.int8_vectorwise_quant(matrix.half())
        return F.int8_vectorwise_dequant(codes, maxima).to(matrix.dtype)
    stack = MAKERS[kind]()
    assert isinstance(stack, ExpertStack4bit)
    options = {"blocksize": stack.blocksize, "quant_type": stack.quant_type}
    return F.dequantize_4bit(
        *F.quantize_4bit(matrix.contiguous(), compress_statistics=stack.compress_statistics, **options)
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", MAKERS)
def test_each_matrix_is_quantised_by_itself(device: str, kind: str, dtype: torch.dtype) -> None:
    source = weights((E, ROWS, K), dtype, device)
    stack = filled(kind, device, dtype)
    for expert in range(E):
        parts = [by_hand(kind, source[expert, first : first + ROWS // 2]) for first in (0, ROWS // 2)]
        got = stack[expert]
        assert got.dtype == dtype and got.shape == (ROWS, K) and got.device.type == device
        limit = torch.finfo(dtype).eps if kind == "int8" else 0.0  # by another order of two products
        assert (got.float() - torch.cat(parts).float()).abs().max() <= limit * source.abs().max()
        assert torch.equal(stack[torch.tensor(expert, device=device)], got) and torch.equal(stack[expert - E], got)
    assert torch.equal(stack.dequantize(), torch.stack(list(stack)))
    with pytest.raises(IndexError):
        stack[E]


@pytest.mark.parametrize("kind", MAKERS)
def test_it_answers_as_the_parameter_did(device: str, kind: str) -> None:
    stack, source = filled(kind, device, torch.bfloat16), weights((E, ROWS, K), torch.bfloat16, device)
    assert stack.shape == source.shape and stack.dim() == 3 and stack.size() == source.size() and len(stack) == E
    assert stack.size(1) == ROWS and stack.dtype == torch.bfloat16 and stack.device.type == device
    assert "20, 26" in repr(stack)


def test_bytes_count_codes_and_scales() -> None:
    blocks = -(-10 * K // 64)
    assert filled("nf4 nested").nbytes() == {"weight": 6 * 130, "scales": 6 * (blocks + 4 + 4)}
    assert filled("fp4").nbytes() == {"weight": 6 * 130, "scales": 6 * blocks * 4}
    assert filled("int8").nbytes() == {"weight": E * ROWS * K, "scales": E * ROWS * 4}
    for kind in MAKERS:
        stack = filled(kind)
        held = sum(t.nbytes for t in (*stack.parameters(), *stack.buffers()))
        assert held == sum(stack.nbytes().values())


@pytest.mark.parametrize("kind", MAKERS)
def test_casts_leave_codes_and_scales_and_copies_are_independent(device: str, kind: str) -> None:
    stack = filled(kind, device)
    wanted = stack.dequantize()
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to(device, torch.float16)):
        cast(stack)
        assert torch.equal(stack.dequantize(), wanted)
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert torch.equal(other.dequantize(), wanted)
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.data.zero_()
        assert other.dequantize().count_nonzero() == 0 and torch.equal(stack.dequantize(), wanted)
    assert [name for name, _ in stack.named_parameters()] == ["weight"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MAKERS)
def test_a_move_between_devices_keeps_every_bit(kind: str) -> None:
    stack = filled(kind)
    wanted = [tensor.clone() for tensor in stack.state_dict().values()]
    there = stack.cuda()
    assert all(t.device.type == "cuda" for t in (*there.parameters(), *there.buffers()))
    for tensor, before in zip(there.cpu().state_dict().values(), wanted, strict=True):
        assert torch.equal(tensor.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("kind", MAKERS)
def test_part_entries_are_those_of_a_linear_and_load_elsewhere(device: str, kind: str) -> None:
    source, stack = weights((E, ROWS, K), torch.float32, device), filled(kind, device)
    entries = stack.part_entries(1, 1)
    matrix = source[1, ROWS // 2 :].contiguous()
    if kind == "int8":
        codes, maxima, _ = F.int8_vectorwise_quant(matrix.half())
        assert torch.equal(entries[""], codes) and torch.equal(entries["SCB"], maxima)
        assert entries["weight_format"].item() == 0 and len(entries) == 3
    else:
        options = {"quant_storage": stack.quant_storage, "blocksize": stack.blocksize, "quant_type": stack.quant_type}
        packed, state = F.quantize_4bit(matrix, compress_statistics=stack.compress_statistics, **options)
        wanted = {f".{name}": value for name, value in state.as_dict(packed=True).items()} | {"": packed}
        assert set(entries) == set(wanted)
        for name, tensor in entries.items():
            assert tensor.dtype == wanted[name].dtype and tensor.shape == wanted[name].shape, name
            assert torch.equal(tensor.view(torch.uint8), wanted[name].view(torch.uint8)), name
    storages = [tensor.untyped_storage().data_ptr() for tensor in entries.values()]
    assert len(set(storages)) == len(storages), "safetensors refuses tensors that share memory"
    for target in (filled(kind, device, seed=1), MAKERS[kind]().to("meta")):
        for expert in range(E):
            for part in range(2):
                target.load_part(expert, part, stack.part_entries(expert, part))
        assert target.device.type == device and torch.equal(target.dequantize(), stack.dequantize())


class Experts(nn.Module):
    """As transformers writes them: two stacks that share the names of their experts."""

    def __init__(self, kind: str | None, seed: int) -> None:
        super().__init__()
        self.gate = nn.Linear(K, E)
        self.gate_up_proj = nn.Parameter(weights((E, ROWS, K), torch.float32, seed=seed))
        self.down_proj = nn.Parameter(weights((E, K, ROWS // 2), torch.float32, seed=seed + 1))
        if kind is None:
            return
        up = MAKERS[kind]()
        down = type(up)((E, K, ROWS // 2), torch.float32, ("{}.w2.weight",), **_options(up))
        for name, stack in (("gate_up_proj", up), ("down_proj", down)):
            stack.quantize_(getattr(self, name).data)
            replace_parameter(self, name, stack)


def _options(stack: ExpertStack) -> dict[str, Any]:
    names = ("quant_type", "compress_statistics", "quant_storage", "blocksize")
    return {name: getattr(stack, name) for name in names} if isinstance(stack, ExpertStack4bit) else {}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("nested", [False, True])
def test_state_dict_has_a_name_for_each_matrix_and_loads(kind: str, nested: bool) -> None:
    source, target = Experts(kind, seed=0), Experts(kind, seed=5)
    prefix = "layer.0." if nested else ""
    if nested:
        source, target = (nn.ModuleDict({"layer": nn.ModuleList([module])}) for module in (source, target))
    entries = source.state_dict()
    assert {f"{prefix}{e}.{w}.weight" for e in range(E) for w in ("w1", "w2", "w3")} < set(entries)
    assert not any("proj" in name for name in entries)
    result = target.load_state_dict(entries)
    assert not result.missing_keys and not result.unexpected_keys
    again = target.state_dict()
    assert list(again) == list(entries)
    for name, tensor in entries.items():
        assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert entries.keys() == source.state_dict().keys(), "the caller's dict is left alone"


@pytest.mark.parametrize("kind", MAKERS)
def test_entries_that_are_missing_broken_or_too_many_are_named(kind: str) -> None:
    scales = "1.w3.SCB" if kind == "int8" else "1.w3.weight.absmax"
    for change, message in (
        (lambda e: e.pop("1.w3.weight"), r"Missing key.*1\.w3\.weight"),
        (lambda e: e.pop(scales), r"1\.w3\.weight: .*(absmax|SCB)"),
        (lambda e: e.update({scales: e[scales][:-1]}), r"1\.w3\.weight: .*(absmax|SCB)"),
        (lambda e: e.update({"1.w3.weight": e["1.w3.weight"][:-1]}), r"1\.w3\.weight: .*weight has"),
        (lambda e: e.update({"1.w3.surplus": torch.ones(1)}), r"Unexpected key.*1\.w3\.surplus"),
        (lambda e: e.update({"7.w3.weight": torch.ones(1)}), r"Unexpected key.*7\.w3\.weight"),
    ):
        entries = dict(Experts(kind, seed=0).state_dict())
        change(entries)
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            Experts(kind, seed=5).load_state_dict(entries)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"quant_type": "fp4"}, "fp4, blocksize 64, nested True differ"),
        ({"blocksize": 128}, "nf4, blocksize 128"),
        ({"compress_statistics": False}, "nested False differ from the other experts"),
    ],
)
def test_an_expert_quantised_otherwise_is_an_error(other: dict[str, Any], message: str) -> None:
    stranger = make_4bit(**other)
    stranger.quantize_(weights((E, ROWS, K), torch.float32))
    entries = stranger.part_entries(0, 0)
    stack = filled("nf4 nested", seed=1)
    before = stack.dequantize()
    with pytest.raises(ValueError, match=message):
        stack.load_part(0, 0, entries)
    assert torch.equal(stack.dequantize(), before)


@pytest.mark.parametrize("kind", MAKERS)
def test_bad_shapes_are_named(kind: str) -> None:
    with pytest.raises(ValueError, match=r"\(3, 26, 20\).*\(3, 20, 26\)"):
        MAKERS[kind]().quantize_(torch.ones(E, K, ROWS))
    with pytest.raises(ValueError, match="21 rows are not 2 matrices"):
        ExpertStack8bit((E, 21, K), torch.float32, NAMES)


def test_replacing_a_parameter_twice_registers_one_hook() -> None:
    module = Experts("int8", seed=0)
    assert len(module._load_state_dict_pre_hooks) == 1
    assert [name for name, _ in module.named_children()] == ["gate", "gate_up_proj", "down_proj"]
    assert "down_proj" not in module._parameters
