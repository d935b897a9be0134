from __future__ import annotations

import json
from pathlib import Path

import pytest

from onegpu.cli import quantize as module


def test_text_and_then_the_folder_is_taken(run, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("quantize", llama, "--to", "nf4", "--double-quant", "--output", out, "--device", "cpu")
    result = run(*command, "--max-shard-size", "30KB", "--skip-module", "q_proj", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "12 weights in nf4, 3 left as they were" in result.stdout and "files (" in result.stdout
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["quantization_config"]["bnb_4bit_use_double_quant"] is True
    card = (out / "README.md").read_text()
    assert (
        "onegpu quantize tiny-llama --to nf4 --output out --double-quant --skip-module q_proj --max-shard-size 30KB "
        "--dtype bfloat16" in card
    )
    assert str(tmp_path) not in card and str(llama.parent) not in card
    again = run(*command)
    assert again.exit_code == 1 and "is not empty" in again.stderr


def test_json(run, llama: Path, tmp_path: Path) -> None:
    result = run("quantize", llama, "--to", "int8", "-o", tmp_path / "out", "--json", "--bitsandbytes-compatible")
    text = json.loads(result.stdout)
    assert text["to"] == "int8" and text["shards"] == 1 and len(text["quantized"]) == 14 and text["seconds"] > 0
    assert text["left"][0]["name"] == "lm_head" and text["output_bytes"] < text["source_bytes"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--to", "int4"], 2, "int4"),
        ([], 2, "--to"),
        (["--to", "nf4", "--max-shard-size", "big"], 1, "max_shard_size='big' is no size"),
        (["--to", "int8", "--double-quant"], 1, "double_quant=True is for 4-bit"),
        (["--to", "nf4", "--skip-module", "nothing"], 1, "matches no layer"),
        (["--to", "nf4", "--revision", "v1"], 1, "revision='v1' is given for a folder"),
    ],
)
def test_bad_arguments(run, llama: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    result = run("quantize", llama, *arguments, "--output", tmp_path / "out")
    assert result.exit_code == code and message in result.output
    assert not (tmp_path / "out").exists()


def test_an_interruption_says_how_to_go_on(run, llama: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Bar, "advance", interrupt)
        stopped = run("quantize", llama, "--to", "nf4", "--output", tmp_path / "out")
    assert stopped.exit_code == 130 and "same command goes on" in stopped.stderr
    assert not (tmp_path / "out" / "config.json").exists()
    assert run("quantize", llama, "--to", "nf4", "--output", tmp_path / "out").exit_code == 0
