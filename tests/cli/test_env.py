from __future__ import annotations

import json

import pytest

from onegpu import hardware
from onegpu.cli import env

H100 = hardware.Device("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30, 3.35e12, 9.9e14, 132, 232448, 2e15, "data sheet")
UNKNOWN = hardware.Device("NVIDIA Nothing", (8, 6), 8 << 30, None, None, 20, 101376)


def test_every_fact_is_there(run) -> None:
    result = run("env", "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 0
    assert facts["packages"].keys() >= {"torch", "triton", "transformers", "accelerate", "peft", "bitsandbytes"}
    assert facts["memory"]["total_bytes"] > 0 and facts["cpu"]["cores"] >= 1
    assert facts["kernels"] and all(isinstance(value, str) for value in facts["kernels"].values())
    page = run("env").stdout
    assert all(entry in page for entry in facts["attention_by_cudnn"])
    for value in (facts["python"], facts["packages"]["torch"], facts["cpu"]["name"], *facts["kernels"]):
        assert str(value) in page


def test_gpus(run, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [H100, UNKNOWN]
    monkeypatch.setattr(hardware, "device_count", lambda: 2)
    monkeypatch.setattr(hardware, "detect", lambda index: devices[index])
    page = run("env").stdout
    assert "GPU 0" in page and "H100 80GB HBM3" in page and "3.35 TB/s" in page and "(tested)" in page
    assert "GPU 1" in page and "unknown bandwidth" in page and "(compiled only)" in page
    assert [gpu["support"] for gpu in json.loads(run("env", "--json").stdout)["gpus"]] == ["tested", "compiled only"]


def test_what_is_missing_is_said() -> None:
    nothing = dict.fromkeys(env.PACKAGES)
    assert any("CPU build" in line for line in env.missing(nothing, False, None))
    assert any("torch sees none" in line for line in env.missing(nothing, False, "12.8"))
    assert any(line.startswith("triton") for line in env.missing(nothing, True, "12.8"))
    assert any("onegpu[gguf]" in line for line in env.missing(nothing, True, "12.8"))
    assert env.missing(dict.fromkeys(env.PACKAGES, "1"), True, "12.8") == []


def test_support() -> None:
    assert env.support((7, 5)).startswith("best effort") and env.support((7, 0)) == "not supported"
