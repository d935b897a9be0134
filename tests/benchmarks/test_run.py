"""The benchmark runner: what is run, refused, stored and skipped; and every case in a dry run."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import case as case_module
from benchmarks import ceilings, gate, run, timing
from benchmarks.case import Case, Context, Sides
from benchmarks.environment import read_rows


def sleeping(ours: float, theirs: float, context: Context) -> Sides:
    calls = [partial(time.sleep, ours)] * context.copies(10)
    return Sides(calls, {"slow": [partial(time.sleep, theirs)] * 2, "other": [partial(time.sleep, ours)]}, 100, 7)


def make(name: str, **given: Any) -> Case:
    settings = {"prepare": partial(sleeping, 1e-4, 4e-4), "sources": ("benchmarks/spread.py",), "seconds": 0.2}
    return Case("toy", name, **{**settings, **given})


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Case]:
    chosen: list[Case] = []
    monkeypatch.setattr(run, "all_cases", lambda: iter(chosen))
    monkeypatch.setattr(run, "RESULTS", tmp_path / "kept")
    monkeypatch.setattr(ceilings, "measure", lambda device: {"copy": 1e9, "read": 2e9, "bf16": 1e12, "int8": 2e12})
    monkeypatch.setattr(timing, "ROUNDS", 5)
    return chosen


def go(tmp_path: Path, *options: str) -> int:
    return run.main(["--device", "cpu", "--output", str(tmp_path / "out"), *options])


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return read_rows(tmp_path / "out" / "cpu" / "toy.jsonl")


def test_a_row_has_the_ratio_the_share_and_where_it_was_measured(cases: list[Case], tmp_path: Path) -> None:
    cases.append(make("a", bound=0.9, goal=0.1))
    assert go(tmp_path, "--commit", "0" * 40) == 0
    (row,) = rows(tmp_path)
    assert (row["peer"], list(row["peers"])) == ("slow", ["slow", "other"])
    assert 0 < row["ratio"]["median"] < 0.9 and row["passed"] is True and row["ratio"] == row["theirs"]["ratio"]
    assert row["ours"]["us"]["median"] > 90 and row["ours"]["us"]["n"] >= 3 and row["ours"]["host_us"] > 90
    assert row["roofline_us"] == 0.05 and row["share"] == pytest.approx(0.05 / row["ours"]["us"]["median"], rel=0.01)
    assert row["ceilings"]["before"] == row["ceilings"]["after"] == ceilings.measure("cpu")
    assert row["environment"]["commit"] == "0" * 40 and row["digest"] == cases[0].digest()


def test_a_slow_case_is_over_its_bound(cases: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases.append(make("a", prepare=partial(sleeping, 4e-4, 1e-4), bound=1.0))
    assert go(tmp_path) == 0
    assert rows(tmp_path)[0]["passed"] is False
    assert "OVER the bound 1.0" in capsys.readouterr().out


def test_only_what_changed_is_run_again_and_the_unknown_first(cases: list[Case], tmp_path: Path) -> None:
    cases.append(make("a"))
    go(tmp_path)
    first = rows(tmp_path)[0]
    cases[:] = [make("a"), make("b")]
    assert [c.name for c in run.choose(cases, {"toy/a": first}, True)[0]] == ["b", "a"]
    go(tmp_path)
    assert [row["case"] for row in rows(tmp_path)] == ["a", "b"] and rows(tmp_path)[0] == first
    cases[0] = make("a", sources=("benchmarks/kjv.py",))
    go(tmp_path)
    assert rows(tmp_path)[0]["digest"] != first["digest"]


def test_cases_of_a_group_stay_together_and_share_what_they_keep(cases: list[Case], tmp_path: Path) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []

    def measure(name: str, context: Context) -> dict[str, Any]:
        seen.append((name, dict(context.kept)))
        context.kept[name] = 1
        return {"peer": None, "ours": {}, "ratio": None}

    for name, group in (("a", "x"), ("b", "y"), ("c", "x")):
        cases.append(make(name, prepare=None, measure=partial(measure, name), group=group))
    assert go(tmp_path) == 0
    assert seen == [("a", {}), ("c", {"a": 1}), ("b", {})]


def test_a_red_case_is_not_timed(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases += [make("red", tests=("t.py::bad", "t.py::good")), make("green", tests=("t.py::good",))]
    asked: list[set[str]] = []
    states = {"t.py::bad": "failed", "t.py::good": "passed"}
    monkeypatch.setattr(gate, "run_tests", lambda tests, timeout: asked.append(set(tests)) or states)
    assert go(tmp_path) == 1
    assert [row["case"] for row in rows(tmp_path)] == ["green"] and asked == [{"t.py::bad", "t.py::good"}]
    assert "toy/red is not timed: t.py::bad: failed" in capsys.readouterr().out


def test_a_failing_case_does_not_hide_the_others(
    cases: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(context: Context) -> Sides:
        raise RuntimeError("no such thing")

    cases += [make("a", prepare=broken), make("b")]
    assert go(tmp_path) == 1
    assert [row["case"] for row in rows(tmp_path)] == ["b"]
    assert "toy/a: RuntimeError: no such thing" in capsys.readouterr().out


def test_the_budget_ends_a_run(cases: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases += [make("a"), make("b", seconds=1000.0)]
    assert go(tmp_path, "--budget", "20") == 0
    assert [row["case"] for row in rows(tmp_path)] == ["a"]
    assert "toy/b: the budget is spent" in capsys.readouterr().out


def test_a_dry_run_cannot_be_stored(cases: list[Case], capsys: pytest.CaptureFixture[str]) -> None:
    cases.append(make("a"))
    for option in ("--tiny", "--no-gate"):
        with pytest.raises(SystemExit):
            run.main(["--device", "cpu", option])
        assert "must not be stored" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--cases", "nothing/*"])
    assert "no case is called nothing/*" in capsys.readouterr().err


def test_every_case_runs_on_a_cpu_in_tiny(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SAMPLE", 1e-5)
    small = [
        *(f"linear/{kind} o M={m}" for kind in ("nf4", "int8") for m in (1, 16)),
        "model/Llama*nf4 [bdp]*",  # the first use is a process of its own, tried in test_models.py
        "model/B*bf16*",
    ]
    patterns = [option for pattern in small for option in ("--cases", pattern)]
    assert run.main(["--device", "cpu", "--tiny", "--no-gate", "--no-store", "--json", *patterns]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(found) == 4 + 4 + 1
    for row in found:
        assert row["digest"] and row["ours"] and row["environment"]["device"]
    decode = [row for row in found if "decode" in row["case"]]
    assert all(list(row["peers"])[1] == "transformers generate, bf16" for row in decode) and len(decode) == 3
    bloom = next(row for row in decode if row["case"].startswith("B"))
    assert bloom["same_tokens"] == bloom["compared_tokens"] == 5  # bf16: the same tokens as the peer


def test_the_registry_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(case_module.all_cases())
    assert {case.benchmark for case in found} >= {"linear", "model"}
    root = case_module.ROOT
    for case in found:
        assert case.sources and case.tests, case.full_name
        assert len(case.digest()) == 16
        for test in case.tests:
            file, _, name = test.partition("[")[0].partition("::")
            assert (root / file).is_file() and f"def {name}(" in (root / file).read_text(encoding="utf-8"), test
    with pytest.raises(ValueError, match=r"names no/file\.py as its source, which does not exist"):
        make("a", sources=("no/file.py",)).digest()
    from benchmarks.cases import linear

    for wrong, message in (
        ([make("a"), make("a")], "is defined twice"),
        ([make("a", prepare=None)], "needs prepare or measure"),
    ):
        monkeypatch.setattr(linear, "cases", lambda wrong=wrong: iter(wrong))
        with pytest.raises(ValueError, match=message):
            list(case_module.all_cases())


def test_ceilings_are_measured_and_bound_an_op() -> None:
    assert ceilings.measure("cpu", repeats=1)["copy"] > 1e6
    found = {"read": 1e12, "copy": 5e11, "bf16": 1e14}
    assert ceilings.roofline(found, 10**9, 10**9, "read") == 1e-3
    assert ceilings.roofline(found, 10**9, 10**9, "copy") == 2e-3
    assert ceilings.roofline(found, 10**3, 10**12, "read") == 1e-2
    assert ceilings.roofline(found, 1, 1, "read", "int8") is None


@pytest.mark.gpu
def test_on_a_gpu_ops_are_launched_from_graphs_and_ceilings_are_plausible() -> None:
    import torch

    found = ceilings.measure("cuda", repeats=3)
    assert found["read"] > 0.8 * found["copy"] > 1e11 and found["bf16"] > 1e13
    x = torch.randn(1024, 1024, device="cuda")
    side = timing.Side([partial(torch.mm, x, x)] * 3, "cuda")
    waits = timing.Side([lambda: x.sum().item()], "cuda")
    assert side.launch == "graph" and waits.launch.startswith("eager")
    taken = timing.alternate({"a": side, "b": waits}, rounds=4)
    assert all(0 < s < 1 for samples in taken.values() for s in samples) and len(taken["a"]) == 4
    assert 0 < timing.host_seconds(partial(torch.mm, x, x), "cuda") < 1e-3
    assert Context("cuda").copies(1 << 20) > 2 and Context("cuda").copies(1 << 40) == 2
