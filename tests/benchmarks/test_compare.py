"""What became slower between two sets of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.environment import RESULTS, store_rows


def spread(median: float, width: float = 0.01) -> dict[str, Any]:
    return {"median": median, "low": median - width, "high": median + width, "n": 3}


def row(case: str, ratio: Any = None, **more: Any) -> dict[str, Any]:
    return {"benchmark": "toy", "case": case, "ratio": ratio, "environment": {}, **more}


def test_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = [
        row("faster", spread(1.0)),
        row("slower", spread(1.0)),
        row("same", spread(1.0)),
        row("gone", spread(1.0)),
        row("no ratio", None, ours={"us": spread(10.0)}),
        row("rate", spread(1.0), ours={"tokens_per_s": spread(5.0)}),
        row("nothing to compare", None, passed=3),
    ]
    new = [
        row("faster", spread(0.9)),
        row("slower", spread(1.1)),
        row("same", spread(1.015)),
        row("new", spread(1.0)),
        row("no ratio", None, ours={"us": spread(20.0)}),
        row("rate", spread(2.0), ours={"tokens_per_s": spread(9.0)}),
        row("nothing to compare", None, passed=4),
    ]
    for name, rows in (("old", old), ("new", new)):
        store_rows(tmp_path / name / "gpu" / "toy.jsonl", rows)
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new"), "--json", "--all"]) == 1
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    verdicts = {entry["case"].removeprefix("gpu toy/"): entry["verdict"] for entry in entries}
    expected = {"faster": "faster", "slower": "slower", "same": "same", "gone": "gone", "new": "new"}
    assert verdicts == {**expected, "no ratio": "slower", "rate": "faster"}
    assert next(e for e in entries if e["case"] == "gpu toy/slower")["change"] == pytest.approx(0.1)
    same = str(tmp_path / "new" / "gpu" / "toy.jsonl")
    assert compare.main([same, str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == "6 rows compared, 0 slower\n"


def test_commits_and_wrong_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if compare._git("rev-parse", "HEAD") is not None:
        assert set(compare.load("HEAD")) <= set(compare.load(str(RESULTS))) and compare.load("HEAD")
    for place, message in (
        (str(tmp_path), "holds no rows"),
        (str(tmp_path / "no"), "is no folder, no file and no commit"),
    ):
        with pytest.raises(SystemExit):
            compare.main([place, place])
        assert message in capsys.readouterr().err
