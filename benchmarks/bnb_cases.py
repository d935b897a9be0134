"""Which of bitsandbytes' tests do not apply to onegpu, and which it fails on purpose; and the pytest plugin that
counts them (``-p benchmarks.bnb_cases --bnb-results FILE``).
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

COMPILED = r"torch_compile"


class Cases(NamedTuple):
    """Tests whose id the pattern is found in, on these devices, and why they are listed.

    message: found in what a test that is meant to fail says; if it fails with other words, it is broken.
    """

    pattern: str
    why: str
    message: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")


# Not run. A test is here because of what it is about, never because it fails.
EXCLUDED: tuple[Cases, ...] = (
    Cases(r"test_stable_embedding", "an embedding for bitsandbytes' 8-bit optimizers, which onegpu does not have"),
    Cases(r"::test_bench_", "a timing loop without an assertion; bitsandbytes' own configuration leaves it out"),
    Cases(
        COMPILED,
        "torch.compile: Inductor needs a C++ compiler and minutes a case; `--compile` runs them",
    ),
)

# Run, and counted as failed: what is different is meant.
DIFFERENT: tuple[Cases, ...] = (
    Cases(
        r"test_linear8bitlt\.py::test_linear_serialization\[.*deserialize_before_cuda=T",
        "a quantised checkpoint loads into a Linear8bitLt that was not moved to a device yet; bitsandbytes refuses",
        r"DID NOT RAISE",
    ),
    Cases(
        r"test_linear8bit_load_state_dict_raises_runtime_for_tied_weight",
        "the same error is raised, in other words than the test looks for",
        r"Regex pattern did not match",
    ),
    Cases(
        r"test_params4bit_torch_chunk_split",
        "torch.chunk and torch.split of a Params4bit give plain tensors: to keep the class, every access to a weight "
        "would have to go through Python; Linear4bit restores class and state when such a tensor becomes its weight",
        r"should preserve Params4bit",
    ),
    Cases(
        r"test_linear_kbit_fp32_bias",
        "forward casts a float32 bias for the product and leaves the parameter alone; bitsandbytes changes its dtype",
        r"torch\.float32 == torch\.float16",
    ),
    Cases(
        r"test_4bit_linear_warnings",
        "no warning about a float32 compute dtype: with 16-bit inputs it is not slower here",
        r"assert False",
    ),
    Cases(
        r"test_4bit_embedding_warnings",
        "no warning about row lengths: no row length makes a 4-bit embedding dequantise its whole table",
        r"assert False",
    ),
    Cases(
        r"test_linear8bitlt_no_fp16_weights\[2\.0",
        "no list of outlier columns (`state.idx`): on a GPU no activation is rounded, so none is an outlier",
        r"None is not None",
        ("cuda",),
    ),
)

_EXCLUDED = "excluded: "
_BROKEN = pytest.StashKey[bool]()


def find(cases: tuple[Cases, ...], test: str, device: str, message: str = "") -> str | None:
    """Why ``test`` (that failed with ``message``) is among ``cases`` on ``device``; None if it is not."""
    for case in cases:
        if device in case.devices and re.search(case.pattern, test) and re.search(case.message, message):
            return case.why
    return None


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--bnb-results", help="file that gets one JSON line a test")
    parser.addoption("--bnb-device", default="cpu", help="device that the exclusions are looked up for")
    parser.addoption("--bnb-compile", action="store_true", help="run the torch.compile cases too")


def pytest_configure(config: Any) -> None:
    for name in ("benchmark", "deprecated", "slow"):
        config.addinivalue_line("markers", f"{name}: of bitsandbytes' suite")
    if not hasattr(config, "workerinput") and config.getoption("--bnb-results"):
        config.pluginmanager.register(_Recorder(Path(config.getoption("--bnb-results"))))


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    for item in items:
        if config.getoption("--bnb-compile") and re.search(COMPILED, item.nodeid):
            continue
        if why := find(EXCLUDED, item.nodeid, config.getoption("--bnb-device")):
            item.add_marker(pytest.mark.skip(reason=_EXCLUDED + why))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: Any) -> Any:
    result = yield
    if item.config.stash.get(_BROKEN, False) and hasattr(item.config, "workerinput"):
        # After such an error every call to the GPU fails in this process. pytest-xdist starts another one.
        time.sleep(1)  # the report is on its way
        os._exit(3)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    report = yield
    if report.failed and "CUDA error" in str(report.longrepr):
        item.config.stash[_BROKEN] = True
    return report


class _Recorder:
    """Writes what became of each test, as it ends."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        outcome, why = report.outcome, ""
        if report.outcome == "skipped":
            why = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
            why = why.removeprefix("Skipped: ")
            if why.startswith(_EXCLUDED):
                outcome, why = "excluded", why.removeprefix(_EXCLUDED)
            elif hasattr(report, "wasxfail"):
                outcome = "xfailed"
        elif report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            why = (crash.message if crash is not None else str(report.longrepr)).strip().partition("\n")[0][:300]
        with open(self.file, "a", encoding="utf-8") as stream:
            line = {"test": report.nodeid, "outcome": outcome, "why": why, "seconds": round(report.duration, 2)}
            stream.write(json.dumps(line) + "\n")
