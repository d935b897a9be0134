from __future__ import annotations

import json

import pytest
import typer

from onegpu.cli.failure import guarded, is_users
from onegpu.errors import CheckpointError, MemoryBudgetError, bad_argument


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


USERS = [
    bad_argument("x", 1, "is wrong", "Use 2"),
    CheckpointError(file="f", reason="is\n damaged"),
    MemoryBudgetError("3 GB missing"),
    FileNotFoundError(2, "No such file", "f"),
    OutOfMemoryError("tried to allocate"),
]


def code_of(error: BaseException, **arguments: object) -> int:
    @guarded
    def command(json_output: bool = False) -> None:
        raise error

    with pytest.raises(typer.Exit) as stop:
        command(**arguments)  # type: ignore[arg-type]
    return stop.value.exit_code


@pytest.mark.parametrize("error", USERS, ids=lambda error: type(error).__name__)
def test_a_users_error_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_users(error) and code_of(error) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "error: " in captured.err and "Traceback" not in captured.err


def test_a_users_error_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(USERS[0], json_output=True) == 1
    assert json.loads(capsys.readouterr().out) == {
        "error": {"type": "ArgumentError", "message": "x=1 is wrong. Use 2."}
    }


def test_our_own_mistake_shows_a_traceback_and_how_to_report_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(ZeroDivisionError("oops"), json_output=True) == 1
    captured = capsys.readouterr()
    assert "Traceback" in captured.err and "onegpu env" in captured.err
    assert json.loads(captured.out)["error"]["type"] == "ZeroDivisionError"


def test_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(KeyboardInterrupt()) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_typers_own_exits_pass() -> None:
    assert code_of(typer.Exit(7)) == 7
