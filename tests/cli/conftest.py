"""What the tests of the command line share: a way to run it, and tiny models that are made once."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.tiny import tiny_model_dir

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Runs `onegpu ARGUMENTS` in this process; `input` is its stdin."""
    from onegpu.cli.app import app

    def call(*arguments: object, input: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)

    return call


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("cli"), "llama")


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("cli"), "t5")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """Replaces our Auto classes by transformers' own, and notes what each load was asked for."""
    import transformers

    seen: list[tuple[Any, dict[str, Any]]] = []

    def stand_in(base: Any) -> Any:
        def from_pretrained(path: Any, **arguments: Any) -> Any:
            seen.append((path, arguments))
            return base.from_pretrained(path)

        return types.SimpleNamespace(from_pretrained=from_pretrained)

    fake = types.SimpleNamespace(
        AutoConfig=transformers.AutoConfig,
        AutoTokenizer=transformers.AutoTokenizer,
        AutoModelForCausalLM=stand_in(transformers.AutoModelForCausalLM),
        AutoModelForSeq2SeqLM=stand_in(transformers.AutoModelForSeq2SeqLM),
    )
    import onegpu

    for name in vars(fake):
        monkeypatch.setattr(onegpu, name, getattr(fake, name), raising=False)
    monkeypatch.setitem(sys.modules, "onegpu.auto", fake)  # type: ignore[arg-type]
    return seen
