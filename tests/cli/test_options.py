from __future__ import annotations

import pytest

from onegpu import hardware
from onegpu.cli.options import DType, ModelOptions, QuantType, SamplingOptions, parse_max_memory
from onegpu.errors import ArgumentError


def test_only_what_was_asked_for() -> None:
    assert ModelOptions("m").arguments() == {}
    assert SamplingOptions().arguments() == {}


def test_spelling_for_from_pretrained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "device_count", lambda: 1)
    options = ModelOptions(
        "m", load_in_4bit=True, quant_type=QuantType.nf4, double_quant=True, dtype=DType.bfloat16, device_map="0",
        max_memory=["0=6GB", "cpu = 1.5GiB"], trust_remote_code=True,
    )  # fmt: skip
    assert options.arguments() == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "dtype": "bfloat16",
        "device_map": 0,
        "max_memory": {0: "6GB", "cpu": "1.5GiB"},
        "trust_remote_code": True,
    }
    assert ModelOptions("m", max_memory=["cpu=100"]).arguments() == {"max_memory": {"cpu": 100}, "device_map": "auto"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "--load-in-8bit exclude"),
        ({"quant_type": QuantType.nf4}, "--quant-type='nf4' belongs to 4-bit"),
        ({"double_quant": True, "load_in_8bit": True}, "--double-quant=True belongs to 4-bit"),
    ],
)
def test_contradictions(options: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ModelOptions("m", **options).arguments()


@pytest.mark.parametrize("pair", ["6GB", "0:6GB", "gpu=6GB", "cpu=", "cpu=much", "cpu=-1GB", "=6GB", "cpu=6 bananas"])
def test_limits_that_are_none(pair: str) -> None:
    with pytest.raises(ArgumentError, match="--max-memory"):
        parse_max_memory([pair])


def test_a_limit_for_a_gpu_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "device_count", lambda: 1)
    with pytest.raises(ArgumentError, match=r"--max-memory=3 .*only GPU 0"):
        parse_max_memory(["3=6GB"])


def test_shaping_the_distribution_means_sampling() -> None:
    assert SamplingOptions(settings={"top_p": 0.9, "top_k": None}).arguments() == {"top_p": 0.9, "do_sample": True}
    assert SamplingOptions(settings={"temperature": 0.0}).arguments() == {"do_sample": False}
    assert SamplingOptions(do_sample=False, settings={"num_beams": 2}).arguments() == {
        "num_beams": 2,
        "do_sample": False,
    }


@pytest.mark.parametrize(
    ("sample", "settings", "message"),
    [
        (False, {"top_p": 0.9}, "--top-p=0.9 has no effect with --greedy"),
        (True, {"temperature": 0.0}, "--temperature=0 is greedy"),
    ],
)
def test_sampling_contradictions(sample: bool, settings: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SamplingOptions(do_sample=sample, settings=settings).arguments()
