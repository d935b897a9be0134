"""The environment record, and the files that rows are kept in."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
from pathlib import Path

import pytest

from benchmarks.environment import RESULTS, device_slug, environment, package_version, read_rows, store_rows


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in strings(part)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def private(texts: list[str]) -> list[str]:
    """Texts with a path, or the name of this machine or user, in them."""
    names = {socket.gethostname(), socket.getfqdn(), getpass.getuser()} - {"localhost", ""}
    path = re.compile(r"(?:^|\s)(?:~|[A-Za-z]:)?[/\\]\w")
    return [text for text in texts if path.search(text) or any(text == name for name in names)]


def test_the_record_names_what_matters_and_no_machine():
    record = environment("cpu")
    assert record["device"] and record["cores"] >= 1 and record["driver"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["date"])
    assert {"onegpu", "torch", "triton", "transformers", "bitsandbytes"} <= set(record["versions"])
    assert record["versions"]["torch"] and record["versions"]["onegpu"]
    assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{40}", record["commit"])
    assert not private(strings(record))
    json.dumps(record)


def test_a_commit_can_be_given_where_there_is_no_repository():
    record = environment("cpu", commit="0" * 40)
    assert (record["commit"], record["dirty"]) == ("0" * 40, None)


def test_stored_results_name_no_machine_and_carry_their_environment():
    for file in RESULTS.rglob("*.jsonl"):
        rows = read_rows(file)
        assert rows, file
        for row in rows:
            assert {"benchmark", "case", "environment"} <= set(row)
            assert not private(strings(row)), file


@pytest.mark.parametrize(
    ("text", "found"),
    [("/home/me", 1), ("see C:\\Users", 1), ("~/x", 1), ("tokens/s", 0), ("AMD EPYC", 0), ("2.13.0+cpu", 0)],
)
def test_a_path_is_found(text: str, found: int):
    assert len(private([text])) == found


def test_a_row_replaces_the_one_of_its_case_and_leaves_the_others(tmp_path: Path):
    file = tmp_path / "new" / "x.jsonl"
    assert read_rows(file) == []
    store_rows(file, [{"benchmark": "x", "case": "a", "v": 1}, {"benchmark": "x", "case": "b", "v": 2}])
    store_rows(file, [{"benchmark": "x", "case": "a", "v": 3}, {"benchmark": "x", "case": "c", "v": "line\u2028end"}])
    assert [(row["case"], row["v"]) for row in read_rows(file)] == [("a", 3), ("b", 2), ("c", "line\u2028end")]
    assert os.listdir(file.parent) == ["x.jsonl"]


def test_names():
    assert device_slug("cpu") == "cpu"
    assert package_version("no-such-package") is None
