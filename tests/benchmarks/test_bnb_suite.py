"""bitsandbytes' own tests on onegpu: every name resolves, every exception has its reason and its test."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bnb_cases, bnb_shim, bnb_suite

TABLES = {"excluded": bnb_cases.EXCLUDED, "different": bnb_cases.DIFFERENT}


def test_every_name_is_onegpus():
    for module, names in bnb_shim.NAMES.items():
        for name, owner in names.items():
            assert owner.split(".")[0] == "onegpu"
            assert hasattr(importlib.import_module(owner), name), f"{module}.{name} is not in {owner}"
    assert set(bnb_shim.FACTS) <= set(bnb_shim.NAMES)


def test_the_package_has_nothing_of_its_own(tmp_path: Path):
    bnb_shim.write(tmp_path)
    code = """
import json, sys
import bitsandbytes as bnb
import bitsandbytes.nn.modules, bitsandbytes.cextension
from bitsandbytes.autograd._functions import MatmulLtState
import onegpu
print(json.dumps([bnb.__file__, bnb.functional.QuantState.__module__, bnb.nn.modules.Linear4bit is onegpu.nn.Linear4bit,
                  bnb.matmul is onegpu.functional.matmul, bnb.functional.has_avx512bf16()]))
"""
    path = f"{tmp_path}:{bnb_suite.ROOT}"
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    file, state, *same = json.loads(run.stdout)
    assert Path(file).is_relative_to(tmp_path) and state.startswith("onegpu.") and same == [True, True, False]


@pytest.mark.parametrize("table", TABLES)
def test_every_exception_has_a_reason_and_a_device(table: str):
    cases = TABLES[table]
    assert cases and len({case.pattern for case in cases}) == len(cases)
    assert all(bool(case.message) == (table == "different") for case in cases)
    for case in cases:
        assert len(case.why) > 20 and case.devices and set(case.devices) <= {"cpu", "cuda"}
        re.compile(case.pattern)


@pytest.mark.parametrize("table", TABLES)
def test_every_exception_matches_a_test(table: str):
    if not (bnb_suite.DATA / "COMMIT").is_file():
        pytest.skip("bitsandbytes' tests are not here: python -m benchmarks.bnb_suite --source PATH")
    names = [
        f"tests/{file}.py::{name}[{argument}]"
        for file in bnb_suite.FILES
        for argument in ("deserialize_before_cuda=T", "2.0-cuda")
        for name in re.findall(r"def (test_\w+)", (bnb_suite.DATA / "tests" / f"{file}.py").read_text(encoding="utf-8"))
    ]
    assert len(names) > 40
    for case in TABLES[table]:
        pattern = re.compile(case.pattern)
        assert any(pattern.search(name) or pattern.search(f"::{name.partition('::')[2]}") for name in names), case


def record(test: str, outcome: str, why: str = "") -> dict[str, Any]:
    return {"test": f"tests/{test}", "outcome": outcome, "why": why, "seconds": 0.1}


def test_counts_of_a_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bnb_suite, "DIFFERENT", (bnb_cases.Cases("::test_b", "meant to be so", r"1 == 2"),))
    records = [
        record("test_modules.py::test_a", "passed"),
        record("test_modules.py::test_b[x]", "failed", "assert 1 == 2"),
        record("test_modules.py::test_c", "excluded", "not ours"),
        record("test_modules.py::test_d", "skipped", "slow on a CPU"),
        record("test_autograd.py::test_e", "failed", "boom"),
    ]
    modules, autograd = bnb_suite.rows_of(records, None, {"driver": None}, "0123")
    assert modules["case"] == "test_modules" and modules["passed"] and not autograd["passed"]
    assert modules["ours"] == {
        "passed": 1,
        "failed": 1,
        "excluded": {"not ours": 1},
        "skipped": {"slow on a CPU": 1},
        "different": {"meant to be so": 1},
        "unexplained": {},
    }
    assert autograd["ours"]["unexplained"] == {"tests/test_autograd.py::test_e": "boom"}
    text = bnb_suite.report([modules, autograd])
    assert "test_modules: 1 passed, 1 failed, 1 excluded, 1 skipped" in text and "UNEXPLAINED" in text
    # A listed test that fails in another way is not explained by the list.
    (row,) = bnb_suite.rows_of(
        [record("test_modules.py::test_b[x]", "failed", "a crash")], None, {"driver": None}, "0123"
    )
    assert list(row["ours"]["unexplained"].values()) == ["a crash"] and not row["passed"]
    # A listed test that passes is not counted as different.
    (row,) = bnb_suite.rows_of([record("test_modules.py::test_b[x]", "passed")], records, {"driver": None}, "0123")
    assert row["ours"]["different"] == {} and row["theirs"] == {"passed": 1, "failed": 1}


def test_a_test_that_fails_twice_is_one():
    lines = [record("a", "passed"), record("b", "failed", "boom"), record("a", "failed", "at the end")]
    assert [r["why"] for r in bnb_suite.merged([*lines, record("b", "failed", "again")])] == ["at the end", "boom"]


TESTS = """
import pytest
from tests.helpers import ONE
import bitsandbytes as bnb

def test_passes():
    assert bnb.__version__ == "onegpu" and ONE == 1

def test_fails():
    assert bnb.__version__ == "0.1"

def test_skips():
    pytest.skip("not today")

def test_stable_embedding():
    raise AssertionError("excluded, and still run")
"""


def test_a_folder_of_tests_runs_from_fetch_to_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    source, data = tmp_path / "source", tmp_path / "data"
    source.mkdir()
    (source / "COMMIT").write_text("0123abc\n")
    (source / "test_linear4bit.py").write_text(TESTS)
    (source / "helpers.py").write_text("ONE = 1\n")
    (source / "__init__.py").touch()
    monkeypatch.setattr(bnb_suite, "DATA", data)
    monkeypatch.setattr(bnb_suite, "results_file", lambda name, slug: tmp_path / slug / f"{name}.jsonl")
    options = ["--source", str(source), "--files", "test_linear4bit", "--jobs", "1", "--json"]
    assert bnb_suite.main(options) == 1
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row == json.loads((tmp_path / "cpu" / "bnb_suite.jsonl").read_text())
    assert row["suite_commit"] == "0123abc" and row["case"] == "test_linear4bit"
    ours = row["ours"]
    assert (ours["passed"], ours["failed"], ours["skipped"]) == (1, 1, {"not today": 1})
    assert list(ours["excluded"].values()) == [1] and list(ours["unexplained"]) == [
        "tests/test_linear4bit.py::test_fails"
    ]


def test_the_tests_of_a_git_repository_are_those_of_its_head(tmp_path: Path):
    repository = tmp_path / "repository"
    (repository / "tests").mkdir(parents=True)
    (repository / "tests" / "test_linear4bit.py").write_text("committed = 1\n")
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    commit = bnb_suite.fetch(repository / ".git", tmp_path / "data")
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert (tmp_path / "data" / "tests" / "test_linear4bit.py").read_text() == "committed = 1\n"
    assert (tmp_path / "data" / "COMMIT").read_text().strip() == commit


def test_a_source_that_is_none_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(bnb_suite.SourceError, match="neither a git repository nor a folder"):
        bnb_suite.fetch(tmp_path, tmp_path / "data")
    monkeypatch.setattr(bnb_suite, "DATA", tmp_path / "nothing")
    assert bnb_suite.main([]) == 2
    assert "--source" in capsys.readouterr().err
