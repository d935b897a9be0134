"""What changed between two sets of stored rows: ``python -m benchmarks.compare OLD NEW``.

OLD and NEW are each a folder of results, a results file, or a commit whose ``benchmarks/results/`` is meant. Compared
are ratios to the peer, since peers were measured in the same run; where a row has none, our own times. A difference
counts when the spreads of the two do not meet. Exits with 1 if anything became slower.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT

Rows = dict[str, dict[str, Any]]


def load(place: str) -> Rows:
    """Rows by device, benchmark and case.

    Raises:
        ValueError: there is no such folder, file or commit, or it has no rows.
    """
    path = Path(place)
    if path.is_dir():
        files = [(file.parent.name, file.read_text(encoding="utf-8")) for file in sorted(path.rglob("*.jsonl"))]
    elif path.is_file():
        files = [(path.resolve().parent.name, path.read_text(encoding="utf-8"))]
    else:
        names = _git("ls-tree", "-r", "--name-only", place, "--", "benchmarks/results")
        if names is None:
            raise ValueError(f"{place} is no folder, no file and no commit")
        kept = [name for name in names.splitlines() if name.endswith(".jsonl")]
        files = [(Path(name).parent.name, _git("show", f"{place}:{name}") or "") for name in kept]
    rows = {}
    for device, text in files:
        for row in (json.loads(line) for line in text.splitlines() if line):
            rows[f"{device} {row['benchmark']}/{row['case']}"] = row
    if not rows:
        raise ValueError(f"{place} holds no rows")
    return rows


def _git(*command: str) -> str | None:
    run = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    return run.stdout if run.returncode == 0 else None


def value(row: dict[str, Any]) -> dict[str, Any] | None:
    """The spread that is compared: the ratio (ours / theirs in time, less is better), else our time; None: neither."""
    if isinstance(row.get("ratio"), dict):
        return row["ratio"]  # type: ignore[no-any-return]
    ours = row.get("ours")
    for name in ("us", "ms", "seconds"):
        if isinstance(ours, dict) and isinstance(ours.get(name), dict):
            return ours[name]  # type: ignore[no-any-return]
    return None


def compare(old: Rows, new: Rows) -> list[dict[str, Any]]:
    """An entry a row of either: name, old, new, change (new / old - 1), verdict: faster, slower, same, new or gone."""
    entries = []
    for name in sorted({*old, *new}):
        a, b = (value(rows[name]) if name in rows else None for rows in (old, new))
        entry: dict[str, Any] = {"case": name, "old": a and a["median"], "new": b and b["median"], "change": None}
        if a is None or b is None:
            if a is b is None:
                continue
            entry["verdict"] = "new" if a is None else "gone"
        else:
            entry["change"] = b["median"] / a["median"] - 1
            rates = "tokens_per_s" in new[name].get("ours", {})  # ratios of rates: more is better
            better, worse = ("slower", "faster") if rates else ("faster", "slower")
            entry["verdict"] = better if b["high"] < a["low"] else worse if b["low"] > a["high"] else "same"
        entries.append(entry)
    return entries


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("old", help="folder, results file or commit")
    parser.add_argument("new", help="the same")
    parser.add_argument("--json", action="store_true", help="print the entries as JSON lines")
    parser.add_argument("--all", action="store_true", help="also rows that are the same")
    options = parser.parse_args(argv)
    try:
        entries = compare(load(options.old), load(options.new))
    except ValueError as error:
        parser.error(str(error))
    shown = [entry for entry in entries if options.all or entry["verdict"] != "same"]
    for entry in shown:
        if options.json:
            print(json.dumps(entry))
            continue
        numbers = " -> ".join("-" if entry[side] is None else f"{entry[side]:.4g}" for side in ("old", "new"))
        change = "" if entry["change"] is None else f" ({entry['change']:+.1%})"
        print(f"{entry['verdict']:<6} {entry['case']}: {numbers}{change}")
    slower = sum(entry["verdict"] == "slower" for entry in entries)
    if not options.json:
        print(f"{len(entries)} rows compared, {slower} slower")
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
