"""Which tests passed, from pytest's own report."""

from __future__ import annotations

from pathlib import Path

from benchmarks import gate

TESTS = """
import pytest, time
@pytest.mark.parametrize("n", [1, 2])
def test_good(n): pass
@pytest.mark.parametrize("n", [1, 2])
def test_half(n): assert n == 1
@pytest.mark.skip
def test_skipped(): pass
def test_slow(): time.sleep(60)
@pytest.fixture
def broken(): raise ValueError
def test_error(broken): pass
"""


def test_states_by_node_id(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    name = "tests/test_it.py::test_{}".format
    wanted = [name("good"), name("half"), name("skipped"), name("error"), name("half[1]")]
    assert gate.run_tests(wanted, 60, tmp_path) == {
        name("good"): "passed",
        name("half"): "failed",
        name("half[1]"): "passed",
        name("skipped"): "not run",
        name("error"): "failed",
    }
    assert gate.run_tests([name("slow")], 3, tmp_path) == {name("slow"): "not run in 3 s"}
    assert gate.run_tests([name("nosuch")], 60, tmp_path) == {name("nosuch"): "not run"}
    assert gate.run_tests([], 60, tmp_path) == {}


def test_a_report_of_another_run_is_judged_alike() -> None:
    results = {"tests/a.py::test_x[1]": "passed", "tests/a.py::test_x[2]": "skipped", "tests/a.py::test_y": "failed"}
    tests = ["tests/a.py::test_x", "tests/a.py::test_x[2]", "tests/a.py", "tests/b.py::test_z"]
    assert gate.judge(tests, results) == {
        "tests/a.py::test_x": "passed",
        "tests/a.py::test_x[2]": "not run",
        "tests/a.py": "failed",
        "tests/b.py::test_z": "not run",
    }
