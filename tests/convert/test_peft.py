"""Merging LoRA adapters into quantised layers, layer by layer; whole models are in tests/ecosystem/test_peft.py."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from onegpu.convert import hooks
from onegpu.nn import Linear4bit, Linear8bitLt

peft = pytest.importorskip("peft")

FORMATS = ["nf4", "nf4_double", "fp4_bf16_storage", "int8"]


def layer(kind: str, bias: bool = True, dtype: torch.dtype = torch.float32, shape=(48, 64)) -> nn.Module:
    rows, columns = shape
    if kind == "int8":
        made = Linear8bitLt(columns, rows, bias, has_fp16_weights=False)
    else:
        storage = torch.bfloat16 if "storage" in kind else torch.uint8
        made = Linear4bit(
            columns, rows, bias, compress_statistics="double" in kind, quant_type=kind[:3], quant_storage=storage
        )
    source = nn.Linear(columns, rows, bias, dtype=dtype)
    made.weight = type(made.weight)(source.weight.data, **{**made.weight.__dict__, "requires_grad": False})
    if bias:
        made.bias = nn.Parameter(source.bias.data)
    return made.to("cpu")


class Net(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.fixture(autouse=True)
def _hooked():
    hooks.install()


def adapted(inner: nn.Module, names=("default",), **options):
    """A model of one layer, with adapters that do something."""
    config = peft.LoraConfig(r=4, target_modules=["inner"], **options)
    model = peft.get_peft_model(Net(inner), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model, model.base_model.model.inner


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """As bytes: packed codes viewed as bfloat16 may be NaN, which equals nothing."""
    return {name: value.reshape(-1).clone().view(torch.uint8) for name, value in model.state_dict().items()}


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def requantized(base: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """``weight`` through the format of ``base``, by a new layer."""
    new = copy.deepcopy(base)
    fields = {**base.weight.__dict__, "requires_grad": False, "quant_state": None, "CB": None, "SCB": None}
    fields["bnb_quantized"] = False
    new.weight = type(base.weight)(weight, **fields).to("cpu")
    return new.dequantize(torch.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", FORMATS)
def test_merged_codes_are_those_of_the_sum_and_unmerging_is_exact(kind, bias):
    model, lora = adapted(layer(kind, bias))
    before, x = state(model), torch.randn(3, 64)
    expected = lora.base_layer.dequantize(torch.float32) + lora.get_delta_weight("default")
    with torch.no_grad():
        apart = model(x)
        model.merge_adapter()
        assert lora.merged and lora.merged_adapters == ["default"]
        got = lora.base_layer.dequantize(torch.float32)
        torch.testing.assert_close(got, requantized(lora.base_layer, expected), rtol=0, atol=0)
        step = 2 / 127 if kind == "int8" else 0.35  # the widest gap of the format, of its block's or row's maximum
        assert (got - expected).abs().max() <= step / 2 * expected.abs().max() * 1.01
        assert lora.base_layer.weight.requires_grad is False and not model(x).isnan().any()
        assert not torch.equal(model(x), apart)
        model.unmerge_adapter()
        assert torch.equal(model(x), apart)
    assert same(state(model), before) and not lora.merged and lora._unmerged is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_and_the_format_stay(dtype):
    inner = layer("nf4_double", dtype=dtype)
    model, _ = adapted(inner)
    merged = model.merge_and_unload().inner
    assert merged is inner and merged.quant_state.dtype == dtype and merged.dequantize().dtype == dtype
    assert merged.nested_absmax.dtype == torch.float32 and merged.weight.compress_statistics
    assert merged.weight.quant_type == "nf4"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_one_after_the_other_is_as_both_at_once(kind):
    """Without the codes of before, the second merge would start from rounded weights."""
    model, lora = adapted(layer(kind), names=("a", "b"))
    before = state(model)
    model.merge_adapter(["a", "b"])
    both = state(model)
    model.unmerge_adapter()
    assert same(state(model), before)
    model.merge_adapter(["a"])
    model.merge_adapter(["b"])
    assert lora.merged_adapters == ["a", "b"] and same(state(model), both)
    model.unmerge_adapter()
    assert same(state(model), before)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_dora_reads_and_merges_without_bitsandbytes(kind, monkeypatch):
    import peft.utils.integrations

    def refuse(*_, **__):
        raise AssertionError("PEFT asked bitsandbytes to dequantise our weight")

    monkeypatch.setattr(peft.utils.integrations, "dequantize_bnb_weight", refuse)
    model, lora = adapted(layer(kind), use_dora=True)
    x = torch.randn(5, 64)
    magnitude = lora.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        magnitude.mul_(1.5)
        base, delta = lora.base_layer.dequantize(torch.float32), lora.get_delta_weight("default")
        expected = magnitude[:, None] * (base + delta) / (base + delta).norm(dim=1, keepdim=True)
        torch.testing.assert_close(
            model(x), nn.functional.linear(x, expected, lora.base_layer.bias), rtol=0.05, atol=0.05
        )
        before = state(model)
        model.merge_adapter()
        torch.testing.assert_close(
            lora.base_layer.dequantize(torch.float32), requantized(lora.base_layer, expected), rtol=1e-4, atol=0.05
        )
        model.unmerge_adapter()
    assert same(state(model), before) and not lora._caches


def test_a_bias_of_the_adapter_is_merged_and_taken_back():
    model, lora = adapted(layer("nf4"), lora_bias=True)
    nn.init.normal_(lora.lora_B["default"].bias)
    before, bias = state(model), lora.base_layer.bias.clone()
    model.merge_adapter()
    torch.testing.assert_close(lora.base_layer.bias.data, bias + lora.lora_B["default"].bias * lora.scaling["default"])
    model.unmerge_adapter()
    assert same(state(model), before)


def test_a_failed_merge_changes_nothing():
    model, lora = adapted(layer("int8"), names=("good", "bad"))
    lora.lora_B["bad"].weight.data[3, 1] = float("nan")
    model.merge_adapter(["good"])
    before = state(model)
    with pytest.raises(ValueError, match=r"adapter_names=\['bad'\].*NaN or infinity.*Train the adapter again"):
        model.merge_adapter(["bad"])
    assert lora.merged_adapters == ["good"] and same(state(model), before)
    assert isinstance(lora.base_layer, Linear8bitLt)


def test_disabled_adapters_unmerge_as_pefts_do():
    model, lora = adapted(layer("nf4"))
    x = torch.randn(2, 64)
    plain = lora.base_layer(x)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_copies_and_pickles_of_a_merged_layer_unmerge(kind):
    model, lora = adapted(layer(kind))
    before = state(model)
    model.merge_adapter()
    for twin in (copy.deepcopy(lora), pickle.loads(pickle.dumps(lora))):
        twin.unmerge()
        assert same(state(twin), {name.removeprefix("base_model.model.inner."): v for name, v in before.items()})
    assert lora.merged


def test_a_layer_that_still_holds_floats_is_merged_by_peft():
    model, lora = adapted(Linear8bitLt(64, 48, has_fp16_weights=True))
    expected = lora.base_layer.weight + lora.get_delta_weight("default")
    model.merge_adapter()
    torch.testing.assert_close(lora.base_layer.weight.data, expected.data)
    model.unmerge_adapter()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_olora_changes_the_base_through_its_own_class(kind):
    inner = layer(kind)
    weight = inner.dequantize(torch.float32)
    model, lora = adapted(inner, init_lora_weights="olora")
    assert type(lora.base_layer.weight).__module__.startswith("onegpu")
    assert not torch.equal(lora.base_layer.dequantize(torch.float32), weight)
    assert not model(torch.randn(2, 64)).isnan().any()


def test_pissa_is_refused_as_on_bitsandbytes():
    with pytest.raises(TypeError, match="PiSSA"):
        adapted(layer("nf4"), init_lora_weights="pissa")


def test_other_layers_are_left_to_peft():
    from onegpu.convert.peft import QuantizedLoraLinear

    model, lora = adapted(nn.Linear(64, 48))
    assert not isinstance(lora, QuantizedLoraLinear)
    model.merge_adapter()
    model.unmerge_adapter()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FORMATS)
def test_on_a_gpu_the_kept_codes_take_no_gpu_memory(kind):
    model, lora = adapted(layer(kind, shape=(512, 512)).to("cuda"))
    before = state(model)
    model.merge_adapter()
    assert lora._unmerged["weight"].device.type == "cpu" and lora.base_layer.weight.is_cuda
    model.unmerge_adapter()
    assert same(state(model), before)
