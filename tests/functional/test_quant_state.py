"""A quant state survives its entries, copies, moves, and older scripts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from onegpu import functional as F
from tests.matrices import weights


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_state_survives_its_entries_copies_and_pickle(device: str, nested: bool, quant_type: str) -> None:
    packed, state = F.quantize_4bit(
        weights((24, 66), torch.bfloat16, device), quant_type=quant_type, compress_statistics=nested
    )
    entries = {f"layer.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    restored = F.QuantState.from_dict(entries, device)
    wanted = F.dequantize_4bit(packed, state)
    for other in (restored, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert other == state and other.dtype == torch.bfloat16 and other.nested == nested
        assert torch.equal(F.dequantize_4bit(packed, other), wanted)
    restored.absmax = restored.absmax + 1
    assert restored != state and state != "a state"
    name = f"bitsandbytes__{quant_type}"
    assert torch.equal(getattr(state, name), state.as_dict(packed=True)[f"quant_state.{name}"])
    assert not hasattr(state, "bitsandbytes__int3")


def test_state_is_the_list_it_once_was(device: str) -> None:
    _, state = F.quantize_4bit(weights((24, 66), torch.float16, device), compress_statistics=True)
    absmax, shape, dtype, blocksize, nested, quant_type = (state[i] for i in range(6))
    assert absmax is state.absmax and shape == (24, 66) and dtype == torch.float16 and blocksize == 64
    assert nested == [state.offset, state.state2] and quant_type == "fp4"


def test_state_moves_with_all_its_tensors() -> None:
    _, state = F.quantize_4bit(weights((24, 66), torch.float16), compress_statistics=True)
    state.to("meta")
    assert state.state2 is not None and state.code is not None and state.offset is not None
    assert all(t.is_meta for t in (state.absmax, state.code, state.offset, state.state2.absmax))


def test_state_without_its_json_entry_is_an_error() -> None:
    _, state = F.quantize_4bit(weights((24, 66), torch.float16))
    with pytest.raises(ValueError, match="bitsandbytes__nf4 or bitsandbytes__fp4"):
        F.QuantState.from_dict({"absmax": state.absmax, "quant_map": state.code}, "cpu")


def test_a_state_of_8_bits_has_no_4bit_matrix() -> None:
    A = torch.ones(64, 64)
    with pytest.raises(ValueError, match="does not describe a 4-bit tensor"):
        F.QuantState(A).packed(A)
