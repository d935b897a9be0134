"""The report: what changed, what did not, as a table and as JSON."""

from __future__ import annotations

import json

from onegpu import Report
from onegpu.convert import Change


def report() -> Report:
    swapped = [Change(f"layers.{i}.up", "Linear", "nf4 Linear4bit", "linear") for i in range(3)]
    return Report("optimize", [*swapped, Change("lm_head", "Linear", None, "tied weights")], ["A note."])


def test_the_table_groups_and_hides_nothing():
    lines = str(report()).splitlines()
    assert lines[0] == "onegpu optimize" and lines[-1] == "A note."
    assert lines[1].split() == ["modules", "before", "after", "why"]
    assert lines[2].split() == ["3", "Linear", "nf4", "Linear4bit", "linear"]
    assert lines[3].split() == ["1", "Linear", "left", "tied", "weights"]
    assert lines[1].index("before") == lines[2].index("Linear") == lines[3].index("Linear")


def test_json_is_the_same():
    data = json.loads(report().json())
    assert data == report().to_dict() and data["changes"][3]["after"] is None
    assert [c.name for c in report().left] == ["lm_head"] and len(report().swapped) == 3


def test_nothing_is_said_too():
    assert "nothing matched" in str(Report("restore"))
