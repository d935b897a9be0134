"""bitsandbytes' own tests, unchanged, on onegpu: what passes, what fails and why, what does not apply.

The tests are fetched and never committed. They import a package named bitsandbytes that consists of onegpu's names
(bnb_shim.py); bnb_cases.py lists what is not run, with the reason, and what fails on purpose.

    python -m benchmarks.bnb_suite --source PATH            a clone or mirror of bitsandbytes, or its unpacked tests/
    python -m benchmarks.bnb_suite --device cuda            the tests of the last run's source, on the GPU
    python -m benchmarks.bnb_suite --files test_linear4bit --no-store -- -x -k serialization
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import bnb_shim
from benchmarks.bnb_cases import DIFFERENT, find
from benchmarks.environment import ROOT, device_slug, environment, results_file, store_rows

FILES = ("test_linear4bit", "test_linear8bitlt", "test_modules", "test_functional", "test_autograd")
DATA = ROOT / "benchmarks" / ".data" / "bnb_suite"
_COMMIT = "COMMIT"


class SourceError(Exception):
    """The tests cannot be had from where they were looked for."""


def fetch(source: Path, into: Path | None = None) -> str:
    """Unpack the tests of ``source`` to ``into / "tests"`` (of ``DATA`` by default).

    Args:
        source: a git repository (a bare one and a git directory too), or a folder that has the test files, where
            ``COMMIT``, in it or beside it, names the commit.

    Returns:
        The commit, or "unknown".

    Raises:
        SourceError: neither of the two.
    """
    into = into or DATA
    new = into.with_name(into.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    plain = next((folder for folder in (source, source / "tests") if (folder / f"{FILES[0]}.py").is_file()), None)
    git = ["git", "-C", str(source)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True) if plain is None else None
    if plain is not None:
        shutil.copytree(plain, new / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        named = [file for file in (plain / _COMMIT, plain.parent / _COMMIT) if file.is_file()]
        name = named[0].read_text(encoding="utf-8").strip() if named else "unknown"
    elif commit is not None and commit.returncode == 0:
        archive = subprocess.run([*git, "archive", "HEAD", "tests"], capture_output=True)
        if archive.returncode:
            raise SourceError(f"--source {source}: {archive.stderr.decode().strip()}")
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(new, filter="data")
        name = commit.stdout.strip()
    else:
        raise SourceError(f"--source {source} is neither a git repository nor a folder with {FILES[0]}.py")
    (new / _COMMIT).write_text(name + "\n", encoding="utf-8")
    shutil.rmtree(into, ignore_errors=True)
    new.rename(into)
    return name


def run(
    files: Iterable[str], device: str, jobs: int, seconds: int, extra: list[str], ours: bool = True
) -> list[dict[str, Any]]:
    """Run the files and return one record a test: test, outcome, why, seconds.

    Args:
        jobs: processes of pytest-xdist; 1 runs without it.
        seconds: limit of one test.
        extra: further arguments for pytest.
        ours: onegpu under bitsandbytes' name; else the bitsandbytes that is installed.

    Raises:
        SourceError: pytest could not collect or did not end properly.
    """
    with tempfile.TemporaryDirectory(prefix="bnb-suite-") as folder:
        shim, results, config = (Path(folder, name) for name in ("shim", "results", "pytest.ini"))
        if ours:
            bnb_shim.write(shim)
        config.write_text(f"[pytest]\ncache_dir = {folder}/cache\n", encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-c", str(config), "--rootdir", str(DATA), "-q", "--no-header"]
        command += ["-p", "benchmarks.bnb_cases", "--bnb-results", str(results), "--bnb-device", device]
        command += ["--tb=no", "-r", "N", f"--timeout={seconds}", *(["-n", str(jobs)] if jobs > 1 else []), *extra]
        command += [f"tests/{name}.py" for name in files]
        # `tests` is theirs, and onegpu's checkout, which has a folder of that name, comes after it.
        path = os.pathsep.join(map(str, [shim, DATA, ROOT] if ours else [DATA, ROOT]))
        variables = {"PYTHONPATH": path, "BNB_TEST_DEVICE": device, "PYTHONDONTWRITEBYTECODE": "1"}
        # Each process would start a thread for every core: nine times slower with two of them on two cores.
        variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
        process = subprocess.run(command, cwd=DATA, env={**os.environ, **variables})
        if process.returncode not in (0, 1) or not results.is_file():
            raise SourceError(f"pytest ended with code {process.returncode}: see its output above")
        return merged([json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()])


def merged(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record a test: the first that says "failed" (the test itself, its tear-down, its process), else the last."""
    tests: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["test"] not in tests or tests[record["test"]]["outcome"] != "failed":
            tests[record["test"]] = record
    return list(tests.values())


def summary(records: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """The counts of one file."""
    by_outcome = Counter(record["outcome"] for record in records)
    failures = [record for record in records if record["outcome"] == "failed"]
    failed = [(record, find(DIFFERENT, record["test"], device, record["why"])) for record in failures]
    return {
        "passed": by_outcome["passed"],
        "failed": by_outcome["failed"],
        "excluded": dict(Counter(record["why"] for record in records if record["outcome"] == "excluded")),
        "skipped": dict(Counter(record["why"] for record in records if record["outcome"] in ("skipped", "xfailed"))),
        "different": dict(Counter(why for _, why in failed if why)),
        "unexplained": {record["test"]: record["why"] for record, why in failed if why is None},
    }


def rows_of(
    records: list[dict[str, Any]], theirs: list[dict[str, Any]] | None, where: dict[str, Any], suite_commit: str
) -> list[dict[str, Any]]:
    """One row a file. ``where``: the environment; ``suite_commit``: of the tests."""
    device, rows = "cuda" if where["driver"] else "cpu", []
    for name in FILES:
        mine = [record for record in records if f"{name}.py" in record["test"]]
        if not mine:
            continue
        peer = None
        if theirs is not None:
            peer = summary([record for record in theirs if f"{name}.py" in record["test"]], device)
            peer = {key: peer[key] for key in ("passed", "failed")}
        ours = summary(mine, device)
        row = {"benchmark": "bnb_suite", "case": name, "suite_commit": suite_commit, "ours": ours, "theirs": peer}
        rows.append({**row, "passed": not ours["unexplained"], "environment": where})
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """The rows for a reader at a terminal."""
    lines = []
    for row in rows:
        ours, theirs = row["ours"], row["theirs"]
        counts = [f"{ours['passed']} passed", f"{ours['failed']} failed"]
        counts += [f"{sum(ours[kind].values())} {kind}" for kind in ("excluded", "skipped")]
        if theirs:
            counts.append(f"bitsandbytes: {theirs['passed']} passed, {theirs['failed']} failed")
        lines.append(f"{row['case']}: {', '.join(counts)}")
        lines += [f"  {count} different: {why}" for why, count in ours["different"].items()]
        lines += [f"  UNEXPLAINED {test}: {why}" for test, why in ours["unexplained"].items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bnb_suite", description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, help="clone or mirror of bitsandbytes, or a folder with its tests")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--files", nargs="+", choices=FILES, default=FILES)
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=300, help="limit of one test (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="run the torch.compile cases too")
    parser.add_argument("--peer", action="store_true", help="run the installed bitsandbytes through the same tests too")
    parser.add_argument("--commit", help="of onegpu, where this runs outside of its repository")
    parser.add_argument("--no-store", action="store_true", help="leave benchmarks/results/ as it is")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON lines")
    parser.add_argument("pytest", nargs="*", metavar="-- ARGUMENT", help="more for pytest; nothing is stored then")
    arguments = parser.parse_args(argv)
    extra = [*(["--bnb-compile"] if arguments.compile else []), *arguments.pytest]
    limits = (arguments.files, arguments.device, arguments.jobs, arguments.seconds, extra)
    try:
        if arguments.source is not None:
            fetch(arguments.source)
        if not (DATA / _COMMIT).is_file():
            raise SourceError("there are no tests yet: name where they are with --source")
        suite_commit = (DATA / _COMMIT).read_text(encoding="utf-8").strip()
        records = run(*limits)
        theirs = run(*limits, ours=False) if arguments.peer else None
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    rows = rows_of(records, theirs, environment(arguments.device, arguments.commit), suite_commit)
    if not arguments.no_store and not arguments.pytest:
        store_rows(results_file("bnb_suite", device_slug(arguments.device)), rows)
    print("\n".join(map(json.dumps, rows)) if arguments.json else report(rows), flush=True)
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
