"""How long ``make demo`` and ``make test`` take from a fresh clone, environments included, for the README.

python -m benchmarks.commands demo test       each in a clone of its own; what the clone does is printed
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time

from benchmarks.environment import ROOT, environment, results_file, store_rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.commands", description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="+", choices=("demo", "test"))
    parser.add_argument("--no-store", action="store_true", help="leave benchmarks/results/ as it is")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON lines")
    arguments = parser.parse_args(argv)
    failed = False
    for target in arguments.targets:
        with tempfile.TemporaryDirectory(prefix="onegpu-clone-") as folder:
            subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
            start = time.perf_counter()
            run = subprocess.run(["make", target], cwd=folder, stdin=subprocess.DEVNULL)
            seconds = round(time.perf_counter() - start, 1)
        if run.returncode:
            print(f"make {target} failed with exit code {run.returncode} after {seconds:.0f} s: not stored")
            failed = True
            continue
        row = {"benchmark": "commands", "case": f"make {target}", "seconds": seconds, "environment": environment()}
        if not arguments.no_store:
            store_rows(results_file("commands", "cpu"), [row])
        print(json.dumps(row) if arguments.json else f"make {target}: {seconds:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
