"""Runs benchmark cases and stores their rows as they are measured: the ratio to the peer, and the share of the roofline
by ceilings measured in the same run.

    python -m benchmarks.run --list
    python -m benchmarks.run --cases 'linear/*' --budget 120           on a GPU: tests, ceilings, cases, ceilings
    python -m benchmarks.run --device cpu --tiny --no-gate --no-store  a dry run, whose numbers mean nothing

A row whose sources have not changed since it was stored is left alone (--again measures it anyway). Cases without a row
come first, so that a short budget is spent on what is unknown. A case whose tests are red is not timed.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import ceilings, gate, timing
from benchmarks.case import Case, Context, all_cases
from benchmarks.environment import RESULTS, device_slug, environment, read_rows, store_rows
from benchmarks.spread import paired_ratio, spread

Row = dict[str, Any]
_GATE_SHARE = 0.5  # of the budget, at most, goes to the tests


def measure_op(case: Case, context: Context) -> Row:
    """Both sides of an op, alternating; the fields of its row."""
    assert case.prepare is not None
    sides = case.prepare(context)
    made = {"ours": timing.Side(sides.ours, context.device)}
    made |= {name: timing.Side(calls, context.device) for name, calls in sides.peers.items()}
    deadline = time.perf_counter() + context.seconds
    rounds = 3 if context.tiny else timing.ROUNDS
    taken = timing.alternate(made, rounds, deadline)
    micro = {name: spread([s * 1e6 for s in samples]) for name, samples in taken.items()}
    row: Row = {"peer": next(iter(sides.peers), None), "shape": sides.shape}
    row["ours"] = {"us": micro["ours"], "launch": made["ours"].launch}
    host = timing.host_seconds(sides.ours[0], context.device, 5 if context.tiny else 50)
    row["ours"]["host_us"] = _rounded(host * 1e6)
    peers = {
        name: {"us": micro[name], "launch": made[name].launch, "ratio": paired_ratio(taken["ours"], taken[name])}
        for name in sides.peers
    }
    row["theirs"], row["peers"] = (peers[row["peer"]] if peers else None), peers
    row["ratio"] = peers[row["peer"]]["ratio"] if peers else None
    row |= {"bytes": sides.bytes, "flops": sides.flops}
    least = ceilings.roofline(context.ceilings, sides.bytes, sides.flops, case.ceiling, case.compute)
    if least is not None:
        row["roofline_us"] = _rounded(least * 1e6)
        row["share"] = _rounded(least * 1e6 / micro["ours"]["median"], 3)
        row["ceiling"] = case.ceiling
    return row


def _rounded(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def run_case(case: Case, context: Context, record: dict[str, Any]) -> Row:
    """The whole row of a case."""
    fields = case.measure(context) if case.measure else measure_op(case, context)
    row = {"benchmark": case.benchmark, "case": case.name, **fields}
    row |= {"bound": case.bound, "goal": case.goal}
    ratio = row.get("ratio")
    row["passed"] = None if case.bound is None or ratio is None else ratio["median"] <= case.bound
    return {**row, "ceilings": {"before": context.ceilings}, "digest": case.digest(), "environment": record}


def choose(cases: list[Case], stored: dict[str, Row], again: bool) -> tuple[list[Case], list[Case]]:
    """Cases to run, those never measured first, and those whose stored row is of this very code."""
    current = [c for c in cases if not again and stored.get(c.full_name, {}).get("digest") == c.digest()]
    rest = [c for c in cases if c not in current]
    groups: dict[str, int] = {}
    for case in sorted(rest, key=lambda case: case.full_name in stored):
        groups.setdefault(case.group or case.full_name, len(groups))
    return sorted(rest, key=lambda case: groups[case.group or case.full_name]), current


def describe(row: Row) -> str:
    """One line for people."""
    text, ratio = f"{row['benchmark']}/{row['case']}:", row.get("ratio")
    for unit in ("us", "ms", "seconds"):
        if unit in (row.get("ours") or {}):
            text += f" {row['ours'][unit]['median']:.4g} {unit}"
    if ratio:
        text += f", {ratio['median']:.3f} x {row['peer']} ({ratio['low']:.3f}-{ratio['high']:.3f})"
    if "share" in row:
        text += f", {row['share']:.0%} of the roofline"
    if row["passed"] is not None:
        text += f", {'within' if row['passed'] else 'OVER'} the bound {row['bound']}"
    return text + (f"; {row['note']}" if row.get("note") else "")


class Run:
    """One run: where rows go, how long there is, and what happened."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.start = options, time.perf_counter()
        self.slug, self.folder = device_slug(options.device), Path(options.output or RESULTS)
        self.rows: list[Row] = []
        self.failed: list[str] = []
        self.skipped: list[str] = []

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.options.budget - (time.perf_counter() - self.start)

    def stored(self) -> dict[str, Row]:
        """Rows of this device by full name, those of this run's folder before those of the repository."""
        found = {}
        for folder in (RESULTS, self.folder):
            for file in sorted((folder / self.slug).glob("*.jsonl")):
                found |= {f"{row['benchmark']}/{row['case']}": row for row in read_rows(file)}
        return found

    def store(self, rows: list[Row]) -> None:
        """Write rows at once: what comes later may be cut off."""
        if not self.options.no_store:
            for row in rows:
                store_rows(self.folder / self.slug / f"{row['benchmark']}.jsonl", [row])

    def red(self, cases: list[Case]) -> dict[str, str]:
        """Test -> state of the tests that did not pass."""
        if self.options.no_gate:
            return {}
        tests = [test for case in cases for test in case.tests]
        if self.options.gate_report:
            results: dict[str, str] = {}
            for file in self.options.gate_report:
                results |= gate.read_report(Path(file).read_text(encoding="utf-8"))
            states = gate.judge(tests, results)
        else:
            states = gate.run_tests(tests, max(30.0, self.left() * _GATE_SHARE))
        return {test: state for test, state in states.items() if state != "passed"}

    def all(self, cases: list[Case]) -> None:
        """Gate, ceilings, cases, ceilings."""
        red = self.red(cases)
        before = ceilings.measure(self.options.device)
        self.tell(f"ceilings: {_readable(before)}")
        record = environment(self.options.device, self.options.commit)
        kept: dict[str, Any] = {}
        group = None
        for case in cases:
            if case.group != group:
                kept.clear()
                self.clean()
            group = case.group
            bad = [f"{test}: {red[test]}" for test in case.tests if test in red]
            if bad:
                self.failed.append(f"{case.full_name} is not timed: {'; '.join(bad)}")
                continue
            if self.left() < case.seconds:
                self.skipped.append(f"{case.full_name}: the budget is spent")
                continue
            seconds = min(self.left(), case.seconds)
            context = Context(self.options.device, self.options.tiny, seconds, before, kept)
            try:
                row = run_case(case, context, record)
            except Exception as error:
                self.failed.append(f"{case.full_name}: {type(error).__name__}: {error}")
                traceback.print_exc()
                continue
            finally:
                self.clean()
            self.rows.append(row)
            self.store([row])
            self.tell(json.dumps(row) if self.options.json else describe(row))
        kept.clear()
        self.clean()
        after = ceilings.measure(self.options.device)
        self.tell(f"ceilings: {_readable(after)}")
        for row in self.rows:
            row["ceilings"]["after"] = after
        self.store(self.rows)

    def clean(self) -> None:
        """Give memory back between cases."""
        gc.collect()
        if self.options.device == "cuda":
            import torch

            torch.cuda.empty_cache()

    def tell(self, text: str) -> None:
        """Rows go to standard output, with --json all else to standard error."""
        plain = self.options.json and not text.startswith("{")
        print(text, file=sys.stderr if plain else sys.stdout, flush=True)


def _readable(found: dict[str, float]) -> str:
    units = {"copy": "TB/s", "read": "TB/s", "bf16": "TFLOP/s", "int8": "TOP/s"}
    return ", ".join(f"{name} {value / 1e12:.3g} {units[name]}" for name, value in found.items())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--cases", action="append", metavar="GLOB", help="of BENCHMARK/CASE; may be given again")
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="stop starting cases after that")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a dry run; needs --no-store")
    parser.add_argument("--again", action="store_true", help="also cases whose code has not changed since their row")
    parser.add_argument("--no-gate", action="store_true", help="do not run the tests first; needs --no-store")
    report_help = "JUnit report of the tests at this very commit on this device, instead of running them; repeatable"
    parser.add_argument("--gate-report", action="append", metavar="XML", help=report_help)
    parser.add_argument("--no-store", action="store_true", help="write no rows")
    parser.add_argument("--output", metavar="DIR", help="folder for rows; default benchmarks/results")
    parser.add_argument("--commit", metavar="SHA", help="commit of the code, where it runs outside of its repository")
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    options = parser.parse_args(argv)
    if (options.tiny or options.no_gate) and not options.no_store and not options.list:
        parser.error("--tiny and --no-gate give rows that must not be stored: add --no-store")
    patterns = options.cases or ["*"]
    # Not fnmatch itself: on some systems it would ignore case.
    chosen = [c for c in all_cases() if any(fnmatch.fnmatchcase(c.full_name, pattern) for pattern in patterns)]
    if not chosen:
        parser.error(f"no case is called {' or '.join(patterns)}; see --list")
    if options.list:
        print("\n".join(case.full_name for case in chosen))
        return 0
    run = Run(options)
    cases, current = choose(chosen, {} if options.no_store else run.stored(), options.again)
    run.skipped += [f"{case.full_name}: its code has not changed since its row" for case in current]
    if cases:
        run.all(cases)
    spent = time.perf_counter() - run.start
    over = [row for row in run.rows if row["passed"] is False]
    run.tell(
        f"{len(run.rows)} rows in {spent:.0f} s, {len(over)} over their bound;"
        f" {len(run.skipped)} cases skipped, {len(run.failed)} failed"
    )
    for line in (*run.skipped, *run.failed):
        run.tell(f"  {line}")
    return 1 if run.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
