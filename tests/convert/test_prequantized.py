"""Checkpoints in bitsandbytes' format that are damaged: none loads, each error names the tensor and says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import onegpu
from onegpu.errors import ArgumentError, CheckpointError
from onegpu.nn import Linear4bit
from tests.damage import Edit, changed, damaged, refuses, set_one

UP = "model.layers.1.mlp.up_proj.weight"
STEM = UP.removesuffix("weight")
STATE = f"{UP}.quant_state.bitsandbytes__nf4"
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1."


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """`whole(kind, model_type)`: a good quantised checkpoint."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, model_type: str = "llama") -> Path:
        if (kind, model_type) not in made:
            folder = made[kind, model_type] = tmp_path_factory.mktemp(kind)
            model = onegpu.AutoModelForCausalLM.from_pretrained(tiny(model_type), **KINDS[kind])
            model.save_pretrained(folder)
        return made[kind, model_type]

    return make


def load(folder: Path):
    return onegpu.AutoModelForCausalLM.from_pretrained(folder)


def blob(**fields: object) -> Edit:
    """An edit of the JSON in quant_state; None takes a field away."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        state = {**json.loads(bytes(tensor.tolist())), **fields}
        text = json.dumps({key: value for key, value in state.items() if value is not None})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    return changed(STATE, change)


def without(*endings: str) -> Edit:
    return lambda tensors: [tensors.pop(f"{UP}.{ending}") for ending in endings]


def renamed_state(tensors: dict[str, torch.Tensor]) -> None:
    tensors[STATE.replace("nf4", "fp4")] = tensors.pop(STATE)


NAN, INF = float("nan"), float("inf")
STATS = ("absmax", "quant_map", "quant_state.bitsandbytes__nf4")
CASES_4BIT: dict[str, tuple[Edit, str]] = {
    "absmax NaN": (changed(f"{UP}.absmax", set_one(NAN)), "absmax"),
    "absmax inf": (changed(f"{UP}.absmax", set_one(INF)), "absmax"),
    "absmax short": (changed(f"{UP}.absmax", lambda t: t[:-1]), "absmax has"),
    "absmax half": (changed(f"{UP}.absmax", lambda t: t[: len(t) // 2]), "absmax has"),
    "absmax long": (changed(f"{UP}.absmax", lambda t: torch.cat((t, t))), "absmax has"),
    "absmax in float16": (changed(f"{UP}.absmax", lambda t: t.half()), "float16"),
    "packed half": (changed(UP, lambda t: t[: len(t) // 2]), "packed weight has"),
    "packed twice": (changed(UP, lambda t: torch.cat((t, t))), "packed weight has"),
    "blocksize 0": (blob(blocksize=0), "blocksize"),
    "blocksize 63": (blob(blocksize=63), "blocksize"),
    "blocksize -64": (blob(blocksize=-64), "blocksize"),
    "blocksize 2^40": (blob(blocksize=2**40), "blocksize"),
    "blocksize 128": (blob(blocksize=128), "absmax has"),
    "blocksize is text": (blob(blocksize="64"), "blocksize"),
    "shape transposed": (blob(shape=[64, 112]), "shape"),
    "shape larger": (blob(shape=[112, 128]), "shape"),
    "shape negative": (blob(shape=[-112, -64]), "shape"),
    "shape of floats": (blob(shape=[112.5, 64]), ""),
    "no shape": (blob(shape=None), ""),
    "no dtype": (blob(dtype=None), ""),
    "a dtype that is none": (blob(dtype="load"), "dtype"),
    "quant_map reversed": (changed(f"{UP}.quant_map", lambda t: t.flip(0)), "quant_map"),
    "quant_map of fp4": (changed(f"{UP}.quant_map", lambda t: t.abs()), "quant_map"),
    "quant_map short": (changed(f"{UP}.quant_map", lambda t: t[:8]), "quant_map"),
    "quant_map NaN": (changed(f"{UP}.quant_map", set_one(NAN)), "quant_map"),
    "no absmax": (without("absmax"), "absmax"),
    "no quant_map": (without("quant_map"), "quant_map"),
    "no quant_state": (without("quant_state.bitsandbytes__nf4"), "quant_state"),
    "no statistics": (without(*STATS), "without their statistics"),
    "quant_state of another type": (renamed_state, "its name says another"),
    "quant_state says another type": (blob(quant_type="fp4"), ""),
    "quant_state is no JSON": (changed(STATE, lambda t: t[:-3]), ""),
    "quant_state of floats": (changed(STATE, lambda t: t.float()), ""),
    "no weight": (lambda tensors: tensors.pop(UP), "missing"),
    "float weight": (changed(UP, lambda t: torch.randn(112, 64)), ""),
}
CASES_DOUBLE: dict[str, tuple[Edit, str]] = {
    "nested_absmax NaN": (changed(f"{UP}.nested_absmax", set_one(NAN)), "nested_absmax"),
    "nested_absmax long": (changed(f"{UP}.nested_absmax", lambda t: torch.cat((t, t))), "nested_absmax"),
    "nested_absmax empty": (changed(f"{UP}.nested_absmax", lambda t: t[:0]), "nested_absmax"),
    "no nested_absmax": (without("nested_absmax"), "nested_absmax"),
    "no nested_quant_map": (without("nested_quant_map"), "nested_quant_map"),
    "neither": (without("nested_absmax", "nested_quant_map"), ""),
    "nested_quant_map reversed": (changed(f"{UP}.nested_quant_map", lambda t: t.flip(0)), "nested_quant_map"),
    "absmax in float32": (changed(f"{UP}.absmax", lambda t: t.float()), "absmax"),
    "absmax short": (changed(f"{UP}.absmax", lambda t: t[:-1]), "absmax"),
    "nested_offset NaN": (blob(nested_offset=NAN), "nested_offset"),
    "nested_offset is text": (blob(nested_offset="much"), ""),
    "no nested_offset": (blob(nested_offset=None), ""),
    "nested_blocksize 64": (blob(nested_blocksize=64), "nested_blocksize"),
    "nested_blocksize 0": (blob(nested_blocksize=0), "nested_blocksize"),
}
CASES_INT8: dict[str, tuple[Edit, str]] = {
    "SCB NaN": (changed(f"{STEM}SCB", set_one(NAN)), "SCB"),
    "SCB inf": (changed(f"{STEM}SCB", set_one(INF)), "SCB"),
    "SCB short": (changed(f"{STEM}SCB", lambda t: t[:-1]), "SCB"),
    "SCB long": (changed(f"{STEM}SCB", lambda t: torch.cat((t, t))), "SCB"),
    "SCB in float16": (changed(f"{STEM}SCB", lambda t: t.half()), "SCB"),
    "no SCB": (lambda tensors: tensors.pop(f"{STEM}SCB"), "SCB"),
    "no statistics": (lambda tensors: [tensors.pop(f"{STEM}{e}") for e in ("SCB", "weight_format")], "statistics"),
    "transposed": (changed(UP, lambda t: t.t()), "shape"),
    "short": (changed(UP, lambda t: t[:-1]), "shape"),
    "floats": (changed(UP, lambda t: t.float()), "F32"),
    "unsigned": (changed(UP, lambda t: t.view(torch.uint8)), "U8"),
    "no weight": (lambda tensors: tensors.pop(UP), "missing"),
    **{
        f"weight_format {n}": (changed(f"{STEM}weight_format", lambda t, n=n: torch.tensor(n, dtype=t.dtype)), layout)
        for n, layout in ((1, "col32"), (2, "col_turing"), (3, "col_ampere"), (7, "unknown"))
    },
}


def check(folder: Path, tmp_path: Path, case: tuple[Edit, str], tensor: str = "layers.1.mlp.up_proj") -> None:
    edit, reason = case
    copy = damaged(folder, tmp_path, edit)
    refuses(lambda: load(copy), copy, tensor, reason)


@pytest.mark.parametrize("case", CASES_4BIT)
def test_damaged_4_bits(whole, tmp_path, case):
    check(whole("nf4"), tmp_path, CASES_4BIT[case])


@pytest.mark.parametrize("case", CASES_DOUBLE)
def test_damaged_double_quantisation(whole, tmp_path, case):
    check(whole("double"), tmp_path, CASES_DOUBLE[case])


@pytest.mark.parametrize("case", CASES_INT8)
def test_damaged_8_bits(whole, tmp_path, case):
    check(whole("int8"), tmp_path, CASES_INT8[case])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_damage_in_the_first_layer_of_the_file(whole, tmp_path, kind):
    """The first quantised weight is looked at before the others: it decides the type."""
    name = "model.layers.0.mlp.down_proj.weight"
    scales = f"{name}.absmax" if kind == "nf4" else "model.layers.0.mlp.down_proj.SCB"
    check(whole(kind), tmp_path, (changed(scales, set_one(NAN)), "NaN"), "layers.0.mlp.down_proj")


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_surplus_tensors_that_are_not_quantised(whole, tmp_path, kind):
    check(whole(kind), tmp_path / "a", (lambda tensors: tensors.pop("model.norm.weight"), "missing"), "model.norm")

    def surplus(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.extra.weight"] = torch.ones(3)

    check(whole(kind), tmp_path / "b", (surplus, "unknown"), "model.layers.0.extra")
    check(whole(kind), tmp_path / "c", (changed("model.norm.weight", set_one(NAN)), "NaN"), "model.norm")


def test_a_quantised_tensor_that_belongs_to_nothing(whole, tmp_path):
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(UP)]:
            tensors[name.replace("up_proj", "other_proj")] = tensors[name].clone()

    check(whole("nf4"), tmp_path, (edit, "no linear layer"), "other_proj")


EXPERTS: dict[str, tuple[str, Edit, str]] = {
    "4-bit scales NaN": ("nf4", changed(f"{EXPERT}weight.absmax", set_one(NAN)), "absmax"),
    "4-bit scales short": ("nf4", changed(f"{EXPERT}weight.absmax", lambda t: t[:-1]), "absmax"),
    "4-bit weight gone": ("nf4", lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith(EXPERT)], "11"),
    "codes half": ("double", changed(f"{EXPERT}weight", lambda t: t[: len(t) // 2]), "packed"),
    "8-bit scales NaN": ("int8", changed(f"{EXPERT}SCB", set_one(NAN)), "SCB"),
    "8-bit scales gone": ("int8", lambda tensors: tensors.pop(f"{EXPERT}SCB"), "SCB"),
    "8-bit transposed": ("int8", changed(f"{EXPERT}weight", lambda t: t.t()), "shape"),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_damaged_experts(whole, tmp_path, case):
    kind, edit, reason = EXPERTS[case]
    copy = damaged(whole(kind, "mixtral"), tmp_path, edit)
    with pytest.raises(CheckpointError) as caught:
        load(copy)
    assert "experts" in str(caught.value.tensor) and str(copy) in caught.value.file
    assert reason in str(caught.value) or case == "4-bit weight gone"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_config_that_says_quantised_over_float_files(tiny, tmp_path, kind):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**KINDS[kind]).to_dict()
    copy = damaged(tiny("llama"), tmp_path, lambda tensors: None, quantization_config=config)
    with pytest.raises(CheckpointError, match=r"but no tensor in the files is.*remove quantization_config"):
        load(copy)


def test_float_config_over_quantised_files(whole, tmp_path):
    copy = damaged(whole("nf4"), tmp_path, lambda tensors: None, quantization_config=None)
    for options in ({}, {"load_in_4bit": True}):
        with pytest.raises((CheckpointError, ArgumentError)):
            onegpu.AutoModelForCausalLM.from_pretrained(copy, **options)


@pytest.mark.parametrize(("files", "said"), [("nf4", "int8"), ("int8", "nf4")])
def test_a_config_of_other_bits_than_the_files(whole, tmp_path, files, said):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**KINDS[said]).to_dict()
    copy = damaged(whole(files), tmp_path, lambda tensors: None, quantization_config=config)
    with pytest.raises(CheckpointError, match=r"config.json says \d bits"):
        load(copy)


def test_the_files_decide_type_and_double_quantisation(whole, tmp_path):
    from transformers import BitsAndBytesConfig

    wrong = BitsAndBytesConfig(load_in_4bit=True).to_dict()  # fp4, plain
    copy = damaged(whole("double"), tmp_path, lambda tensors: None, quantization_config=wrong)
    layer = load(copy).model.layers[1].mlp.up_proj
    assert isinstance(layer, Linear4bit) and layer.weight.quant_type == "nf4" and layer.nested_absmax is not None


def test_what_the_file_leaves_in_float_stays_whatever_the_config_says(tiny, tmp_path):
    options = {**KINDS["nf4"], "llm_int8_skip_modules": ["up_proj"]}
    onegpu.AutoModelForCausalLM.from_pretrained(tiny("llama"), **options).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"]["llm_int8_skip_modules"] = None
    (tmp_path / "config.json").write_text(json.dumps(fields))
    layer = load(tmp_path).model.layers[0].mlp
    assert type(layer.up_proj) is torch.nn.Linear and isinstance(layer.down_proj, Linear4bit)
