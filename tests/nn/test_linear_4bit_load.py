"""Loading state dicts into `Linear4bit`: into each kind of module, and broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

from onegpu.nn import Linear4bit
from tests.matrices import activations, weights

Entries = dict[str, torch.Tensor]


def layer(nested: bool = True, storage: torch.dtype = torch.uint8, seed: int = 0) -> Linear4bit:
    """Not yet quantised."""
    module = Linear4bit(66, 40, quant_type="nf4", compress_statistics=nested, quant_storage=storage)
    module.load_state_dict({"weight": weights((40, 66), torch.float32, seed=seed), "bias": torch.ones(40) * seed})
    return module


TARGETS: dict[str, Callable[[], Linear4bit]] = {
    "float": lambda: layer(seed=1),
    "quantised": lambda: layer(seed=1).to("cpu"),
    "quantised otherwise": lambda: Linear4bit(66, 40, quant_type="fp4", compress_statistics=False).to("cpu"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_entries_load(target: str, nested: bool, storage: torch.dtype) -> None:
    source = layer(nested, storage).to("cpu")
    module = TARGETS[target]()
    result = module.load_state_dict(source.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    x = activations((3, 66), torch.float32)
    assert module.weight.bnb_quantized and torch.equal(module(x), source(x))
    assert {n: t.tolist() for n, t in module.state_dict().items() if n != "weight"} == {
        n: t.tolist() for n, t in source.state_dict().items() if n != "weight"
    }


@pytest.mark.parametrize("quantised", [False, True])
def test_entries_load_into_meta(device: str, quantised: bool) -> None:
    source = layer().to(device)
    module = layer(seed=1)
    module = (module.to("cpu") if quantised else module).to("meta")
    module.load_state_dict(source.state_dict(), assign=True)
    x = activations((3, 66), torch.float32, device)
    assert module.weight.device.type == module.absmax.device.type == device and torch.equal(module(x), source(x))


def test_what_is_loaded_is_a_copy() -> None:
    source, module = layer().to("cpu"), layer(seed=1).to("cpu")
    module.load_state_dict(source.state_dict())
    source.weight.data.zero_()
    source.absmax.zero_()
    assert module.weight.count_nonzero() > 0 and module.absmax.count_nonzero() > 0


def test_entries_load_below_a_parent() -> None:
    source = nn.Sequential(nn.Linear(66, 66), layer()).to("cpu")
    module = nn.Sequential(nn.Linear(66, 66), layer(seed=1))
    module.load_state_dict(source.state_dict())
    x = activations((3, 66), torch.float32)
    assert torch.equal(module(x), source(x))


def edit(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Entries], None]:
    """Replace the entry ``weight.<name>`` (or "weight") by ``change`` of it, or remove it."""

    def apply(entries: Entries) -> None:
        key = "weight" if name == "weight" else f"weight.{name}"
        value = change(entries.pop(key).clone())
        if value is not None:
            entries[key] = value

    return apply


def edit_json(**fields: object) -> Callable[[Entries], None]:
    def change(blob: torch.Tensor) -> torch.Tensor:
        facts = json.loads(bytes(blob.tolist())) | fields
        return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)

    return edit("quant_state.bitsandbytes__nf4", change)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[0] = float("nan")
    return tensor


NAN = float("nan")
FAULTS: dict[str, tuple[bool, Callable[[Entries], None], str]] = {
    "short absmax": (True, edit("absmax", lambda t: t[:-1]), "absmax has 41 entries"),
    "NaN scale": (False, edit("absmax", poison), "absmax holds NaN"),
    "NaN nested scale": (True, edit("nested_absmax", poison), "nested_absmax holds NaN"),
    "short nested scale": (True, edit("nested_absmax", lambda t: t[:0]), "nested_absmax has 0 entries"),
    "reversed table": (True, edit("quant_map", lambda t: t.flip(0)), "quant_map is not the table"),
    "reversed nested table": (True, edit("nested_quant_map", lambda t: t.flip(0)), "nested_quant_map is not the table"),
    "scales in half": (False, edit("absmax", lambda t: t.half()), "absmax has dtype torch.float16"),
    "short codes": (True, edit("weight", lambda t: t[:-8]), "packed weight has 1312 bytes"),
    "no absmax": (True, edit("absmax", lambda t: None), "absmax"),
    "no table": (True, edit("quant_map", lambda t: None), "quant_map"),
    "no facts": (True, edit("quant_state.bitsandbytes__nf4", lambda t: None), "bitsandbytes__nf4"),
    "facts that are a list": (
        True,
        edit("quant_state.bitsandbytes__nf4", lambda t: torch.tensor(list(b"[1]"), dtype=torch.uint8)),
        "not a JSON object",
    ),
    "a shape of words": (True, edit_json(shape="ab"), "shape='ab'"),
    "a type that is a list": (True, edit_json(quant_type=["nf4"]), "quant_type="),
    "facts that are no JSON": (True, edit("quant_state.bitsandbytes__nf4", lambda t: t[:9]), "is not JSON"),
    "another shape": (True, edit_json(shape=[66, 40]), r"quant_state.shape=\(66, 40\)"),
    "another block size": (True, edit_json(blocksize=128), "absmax has 42 entries"),
    "no block size": (True, edit_json(blocksize=0), "blocksize=0"),
    "a block size that is a word": (True, edit_json(blocksize="64"), "blocksize='64'"),
    "another type": (True, edit_json(quant_type="fp4"), "quant_map is not the table"),
    "an unknown type": (True, edit_json(quant_type="int4"), "quant_type='int4'"),
    "a dtype that is none": (True, edit_json(dtype="load"), "dtype"),
    "a nested dtype that is none": (True, edit_json(nested_dtype="nn"), "dtype"),
    "no offset": (True, edit_json(nested_offset=NAN), "nested_offset"),
    "an offset that is a word": (True, edit_json(nested_offset="much"), "nested_offset='much'"),
    "another nested block size": (True, edit_json(nested_blocksize=128), "nested_blocksize=128"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_broken_entry_is_an_error_that_names_it(fault: str, target: str) -> None:
    nested, break_it, message = FAULTS[fault]
    entries = {f"0.{name}": tensor for name, tensor in layer(nested).to("cpu").state_dict().items()}
    inner = {name.removeprefix("0."): tensor for name, tensor in entries.items()}
    break_it(inner)
    parent = nn.Sequential(TARGETS[target]())
    with pytest.raises(RuntimeError, match=rf"0\.weight: .*{message}"):
        parent.load_state_dict({f"0.{name}": tensor for name, tensor in inner.items()})


def test_scales_without_codes_and_codes_without_scales_are_errors() -> None:
    entries = layer().to("cpu").state_dict()
    scales = {name: tensor for name, tensor in entries.items() if name != "weight"}
    codes = {name: tensor for name, tensor in entries.items() if "." not in name}
    for target in TARGETS.values():
        for broken in (scales, codes):
            with pytest.raises(RuntimeError, match="weight"):
                target().load_state_dict(broken)


def test_a_float_weight_for_a_quantised_module_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="weight"):
        layer().to("cpu").load_state_dict(layer().state_dict())
