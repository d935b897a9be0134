"""`Params4bit`: quantises at its first move, then only moves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from onegpu import functional as F
from onegpu.nn.params_4bit import Params4bit, state_tensors
from tests.matrices import weights


def quantised(device: str = "cpu", nested: bool = True, storage: torch.dtype = torch.uint8) -> Params4bit:
    A = weights((24, 66), torch.bfloat16)
    return Params4bit(A, quant_type="nf4", compress_statistics=nested, quant_storage=storage).to(device)


def test_the_first_move_to_a_device_quantises_in_place(device: str) -> None:
    A = weights((24, 66), torch.float32)
    weight = Params4bit(A.clone(), quant_type="nf4", compress_statistics=True, blocksize=128)
    assert isinstance(weight, nn.Parameter) and not weight.requires_grad and not weight.bnb_quantized
    assert torch.equal(weight.data, A)
    assert weight.to(device) is weight
    packed, state = F.quantize_nf4(A.to(device), compress_statistics=True, blocksize=128)
    assert weight.bnb_quantized and weight.device.type == device and weight.dtype == torch.uint8
    assert torch.equal(weight.data, packed) and weight.quant_state == state


@pytest.mark.parametrize("move", [lambda w: w.cpu(), lambda w: w.to("cpu"), lambda w: w.to(torch.ones(1))])
def test_every_way_to_the_cpu_quantises(move) -> None:
    assert move(Params4bit(torch.ones(8, 64))).bnb_quantized


@pytest.mark.gpu
@pytest.mark.parametrize("move", [lambda w: w.cuda(), lambda w: w.cuda(0), lambda w: w.to("cuda")])
def test_every_way_to_a_gpu_quantises(move) -> None:
    weight = move(Params4bit(torch.ones(8, 64)))
    assert weight.bnb_quantized and weight.device.type == "cuda" and weight.absmax.device.type == "cuda"


def test_a_cast_or_a_move_to_meta_does_not_quantise() -> None:
    weight = Params4bit(torch.ones(8, 64))
    for other in (weight.to(torch.float16), weight.half(), weight.to("meta"), weight.to("meta", torch.float16)):
        assert not getattr(other, "bnb_quantized", False) and other.shape == (8, 64)
    assert weight.to(torch.float16).dtype == torch.float16 and isinstance(weight.to(torch.float16), Params4bit)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_cast_leaves_codes_and_scales(device: str, storage: torch.dtype) -> None:
    weight = quantised(device, storage=storage)
    cast = weight.to(torch.float16)
    assert cast.dtype == storage and torch.equal(cast.data.view(torch.uint8), weight.data.view(torch.uint8))
    assert cast.quant_state == weight.quant_state and cast.nested_absmax.dtype == torch.float32
    both = weight.to(device, torch.float16)
    assert both.dtype == storage and both.quant_state == weight.quant_state


def test_a_second_move_leaves_the_first_state_where_it_was() -> None:
    weight = quantised()
    moved = weight.to("meta")
    assert moved.is_meta and moved.bnb_quantized and not weight.is_meta and not weight.absmax.is_meta


@pytest.mark.parametrize("nested", [False, True])
def test_state_is_readable_as_attributes(nested: bool) -> None:
    weight = quantised(nested=nested)
    assert weight.quant_state is not None
    tensors = state_tensors(weight.quant_state)
    for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset"):
        if tensors[name] is None:
            assert not hasattr(weight, name) and not nested
        else:
            assert getattr(weight, name) is tensors[name]
    assert weight.code is weight.quant_map
    with pytest.raises(AttributeError, match="not quantised"):
        _ = Params4bit(torch.ones(8, 64)).absmax


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_from_prequantized(device: str, nested: bool, storage: torch.dtype) -> None:
    weight = quantised(nested=nested, storage=storage)
    assert weight.quant_state is not None
    entries = weight.quant_state.as_dict(packed=True)
    other = Params4bit.from_prequantized(weight.data, entries, device=device)
    assert other.bnb_quantized and other.device.type == device and not other.requires_grad
    assert (other.quant_type, other.blocksize, other.compress_statistics) == ("nf4", 64, nested)
    assert other.quant_storage == storage
    back = other.to("cpu")
    wanted = F.dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(F.dequantize_4bit(back.data, back.quant_state), wanted)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_copies_are_independent(storage: torch.dtype) -> None:
    weight = quantised(storage=storage)
    raw, absmax = weight.data.view(torch.uint8).clone(), weight.absmax.clone()
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert type(other) is Params4bit and other.bnb_quantized and other.quant_storage == storage
        assert torch.equal(other.data.view(torch.uint8), raw) and other.quant_state == weight.quant_state
        other.data.zero_()
        other.absmax.zero_()
        other.nested_absmax.zero_()
        assert torch.equal(weight.data.view(torch.uint8), raw) and torch.equal(weight.absmax, absmax)
        assert weight.nested_absmax.count_nonzero() > 0
    pair = copy.deepcopy([weight, weight])
    assert pair[0] is pair[1]


def test_a_float_weight_copies_as_one() -> None:
    weight = Params4bit(torch.ones(8, 64), requires_grad=True, quant_type="nf4")
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert torch.equal(other.data, weight.data) and other.requires_grad and other.quant_type == "nf4"
        assert not other.bnb_quantized and other.data_ptr() != weight.data_ptr()


def test_its_own_dict_is_accepted_as_arguments() -> None:
    weight = quantised()
    other = Params4bit(weight.data, requires_grad=False, **weight.__dict__, module=None)
    assert other.quant_state is weight.quant_state and other.bnb_quantized


def test_without_data_it_is_empty() -> None:
    assert Params4bit().numel() == 0 and Params4bit(quant_type="nf4").quant_type == "nf4"


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="quant_type='int4'"):
        Params4bit(torch.ones(8, 64), quant_type="int4")
    with pytest.raises(ValueError, match="blocksize=63"):
        Params4bit(torch.ones(8, 64), blocksize=63)
