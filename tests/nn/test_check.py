"""What a loaded 4-bit weight must fit, so that no kernel reads past an end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from onegpu import functional as F
from onegpu.nn.check import check_state
from onegpu.nn.params_4bit import Params4bit
from tests.matrices import weights

SHAPE = (40, 66)
BLOCKS = -(-40 * 66 // 64)


def loaded(nested: bool = True, storage: torch.dtype = torch.uint8) -> Params4bit:
    A = weights(SHAPE, torch.float32)
    return Params4bit(A, quant_type="nf4", compress_statistics=nested, quant_storage=storage).to("cpu")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_what_fits_passes(nested: bool, storage: torch.dtype) -> None:
    weight = loaded(nested, storage)
    check_state(weight, SHAPE)
    check_state(weight.to("meta"), SHAPE)  # nothing to look into, the sizes fit
    other = Params4bit.from_prequantized(weight.data, weight.quant_state.as_dict(packed=True), device="cpu")
    check_state(other, SHAPE)


def test_a_table_off_by_rounding_passes() -> None:
    weight = loaded()
    weight.quant_state.code = weight.quant_state.code + 2e-5
    check_state(weight, SHAPE)


def _set(path: str, change: Callable[[torch.Tensor], object]) -> Callable[[Params4bit], None]:
    """A fault: the field ``path`` of the state is replaced by ``change`` of it."""

    def apply(weight: Params4bit) -> None:
        *parents, name = path.split(".")
        target = weight.quant_state
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, change(getattr(target, name)))

    return apply


def _poison(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


EITHER = [
    (_set("shape", lambda s: torch.Size((66, 40))), r"quant_state.shape=\(66, 40\) .*\(40, 66\)"),
    (_set("shape", lambda s: None), "no quant_state"),
    (_set("code", lambda c: None), "no quant_state"),
    (_set("blocksize", lambda b: 63), "blocksize=63"),
    (_set("blocksize", lambda b: 128), f"absmax has {BLOCKS} entries"),
    (_set("quant_type", lambda q: "int4"), "quant_type='int4'"),
    (_set("quant_type", lambda q: "fp4"), "quant_map is not the table"),
    (_set("absmax", lambda a: a[:-1]), f"absmax has {BLOCKS - 1} entries"),
    (_set("absmax", lambda a: torch.cat((a, a))), f"absmax has {2 * BLOCKS} entries"),
    (_set("code", lambda c: c.flip(0)), "quant_map is not the table"),
    (_set("code", lambda c: c[:8]), "quant_map is not the table"),
    (_set("code", _poison(float("nan"))), "quant_map is not the table"),
]
PLAIN = [
    (_set("absmax", _poison(float("nan"))), "absmax holds NaN"),
    (_set("absmax", _poison(float("inf"))), "absmax holds NaN or infinity"),
    (_set("absmax", lambda a: a.half()), "absmax has dtype torch.float16"),
]
NESTED = [
    (_set("absmax", lambda a: a.float()), "absmax has dtype torch.float32, double quantised scales are uint8"),
    (_set("state2.absmax", lambda a: a[:0]), "nested_absmax has 0 entries"),
    (_set("state2.absmax", lambda a: torch.cat((a, a))), "nested_absmax has 2 entries"),
    (_set("state2.absmax", _poison(float("-inf"))), "nested_absmax holds NaN or infinity"),
    (_set("state2.absmax", lambda a: a.double()), "nested_absmax has dtype torch.float64"),
    (_set("state2.blocksize", lambda b: 128), "nested_blocksize=128"),
    (_set("state2.code", lambda c: c.flip(0)), "nested_quant_map is not the table"),
    (_set("state2.code", lambda c: None), "nested_quant_map is missing"),
    (_set("offset", lambda o: None), "nested_offset=None"),
    (_set("offset", _poison(float("nan"))), "nested_offset"),
]


@pytest.mark.parametrize(("fault", "message"), EITHER + PLAIN)
def test_a_fault_of_plain_scales_is_named(fault: Callable[[Params4bit], None], message: str) -> None:
    weight = loaded(nested=False)
    check_state(weight, SHAPE)
    fault(weight)
    with pytest.raises(ValueError, match=message):
        check_state(weight, SHAPE)


@pytest.mark.parametrize(("fault", "message"), EITHER + NESTED)
def test_a_fault_of_nested_scales_is_named(fault: Callable[[Params4bit], None], message: str) -> None:
    weight = loaded(nested=True)
    check_state(weight, SHAPE)
    fault(weight)
    with pytest.raises(ValueError, match=message):
        check_state(weight, SHAPE)


def test_codes_of_another_length_or_a_float_weight_are_named() -> None:
    weight = loaded()
    short = Params4bit(weight.data[:-1], quant_state=weight.quant_state, quant_type="nf4", bnb_quantized=True)
    with pytest.raises(ValueError, match=r"packed weight has 1319 bytes, \(40, 66\) needs 1320"):
        check_state(short, SHAPE)
    with pytest.raises(ValueError, match="no quant_state"):
        check_state(Params4bit(torch.ones(SHAPE)), SHAPE)
    with pytest.raises(ValueError, match=r"quant_state\.shape"):
        check_state(weight, (66, 40))


def test_tables_of_a_state_are_not_changed_by_a_check() -> None:
    weight = loaded()
    before = F.QuantState.from_dict(weight.quant_state.as_dict(packed=True), "cpu")
    check_state(weight, SHAPE)
    assert weight.quant_state == before
