"""Whether the tests of a case pass: pytest runs once for all cases that were chosen, and a red op is not timed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path

from benchmarks.environment import ROOT


def run_tests(tests: Iterable[str], timeout: float, root: Path = ROOT) -> dict[str, str]:
    """``{node id: "passed" | "failed" | "not run"}``; one that only skipped has not run.

    Args:
        tests: node ids; one without parameters stands for all of its parametrisations.
        timeout: seconds for all of them; what did not come to its end has not run.
    """
    wanted = sorted(set(tests))
    if not wanted:
        return {}
    with tempfile.TemporaryDirectory(prefix="onegpu-gate-") as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *wanted]
        try:
            run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return dict.fromkeys(wanted, f"not run in {timeout:.0f} s")
        results = read_report(report.read_text(encoding="utf-8")) if report.is_file() else {}
    states = judge(wanted, results)
    if not all(state == "passed" for state in states.values()):
        print(run.stdout[-3000:], file=sys.stderr)
    return states


def judge(tests: Iterable[str], results: dict[str, str]) -> dict[str, str]:
    """What `run_tests` says, from the results of a run that there was."""
    states = {}
    for test in sorted(set(tests)):
        found = [state for name, state in results.items() if _is_of(name, test)]
        if "failed" in found:
            states[test] = "failed"
        else:
            states[test] = "passed" if "passed" in found else "not run"
    return states


def _is_of(name: str, test: str) -> bool:
    return name == test or name.startswith((f"{test}[", f"{test}::"))


def read_report(text: str) -> dict[str, str]:
    """State by node id of a report in JUnit's form, as pytest writes it."""
    states = {}
    for case in ET.fromstring(text).iter("testcase"):
        file, kind = case.get("classname", "").replace(".", "/"), {child.tag for child in case}
        name = f"{file}.py::{case.get('name')}"
        bad = kind & {"failure", "error"}
        states[name] = "failed" if bad else "skipped" if "skipped" in kind else "passed"
    return states
