"""Tables and plots are what the stored rows say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import plots, tables
from benchmarks.environment import store_rows

WHERE = {
    "device": "A CPU",
    "cores": 2,
    "driver": None,
    "date": "2026-01-02T03:04:05Z",
    "commit": "0123456789",
    "dirty": False,
    "versions": {"torch": "2", "transformers": "5", "bitsandbytes": "0.5"},
}


def perplexity_row(case: str, ours: float, theirs: float) -> dict[str, object]:
    return {
        "benchmark": "perplexity",
        "case": case,
        "ours": {"perplexity": ours, "weight_bytes": 166_000_000},
        "theirs": {"perplexity": theirs},
        "relative_difference": ours / theirs - 1,
        "tokens_scored": 20460,
        "environment": WHERE,
    }


def test_the_repository_is_up_to_date(capsys: pytest.CaptureFixture[str]):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_marked_table_is_replaced_and_the_rest_of_the_page_is_not(tmp_path: Path):
    store_rows(tmp_path / "cpu" / "perplexity.jsonl", [perplexity_row("nf4-double", 10.5, 10.0)])
    page = "before\n<!-- table:fidelity -->\nold | table\n<!-- /table -->\nafter <!-- table:unmarked -->\n"
    new = tables.fill(page, tmp_path)
    assert new.startswith("before\n<!-- table:fidelity -->\n|") and new.endswith("after <!-- table:unmarked -->\n")
    assert "old" not in new
    assert "| nf4 + double quantisation (166 MB) | 10.5000 | 10.0000 | +5.0e-02 |" in new
    assert "20,460 tokens" in new and "commit 0123456" in new
    assert tables.fill(new, tmp_path) == new


def suite_row(case: str, theirs: dict[str, int] | None, **ours: object) -> dict[str, object]:
    counts = {"passed": 1000, "failed": 0, "excluded": {}, "skipped": {}, "different": {}, "unexplained": {}, **ours}
    row = {"benchmark": "bnb_suite", "case": case, "suite_commit": "abcdef0123", "ours": counts, "theirs": theirs}
    return {**row, "environment": WHERE}


def test_the_suite_is_counted_by_file_and_its_exceptions_by_reason(tmp_path: Path):
    rows = [
        suite_row("test_a", None, failed=3, different={"meant": 2}, unexplained={"t": "boom"}, excluded={"no": 4}),
        suite_row("test_b", {"passed": 7}, failed=1, different={"meant": 1}, skipped={"slow": 5, "other": 6}),
    ]
    store_rows(tmp_path / "cpu" / "bnb_suite.jsonl", rows)
    table = tables.render("bnb_suite", tmp_path)
    assert (
        "| `test_a.py` | 1,000 | 3 | 4 | 0 |\n| `test_b.py` | 1,000 | 1 | 0 | 11 |\n| all | 2,000 | 4 | 4 | 11 |"
        in table
    )
    assert (
        "| 3 fail | meant |\n| 4 not run | no |\n| 1 fail | not explained" in table
        and "bitsandbytes at abcdef0" in table
    )
    store_rows(tmp_path / "cpu" / "bnb_suite.jsonl", [suite_row("test_a", {"passed": 5})])
    assert "| all | 2,000 | 1 | 0 | 11 | 12 |" in tables.render("bnb_suite", tmp_path)


def test_without_a_run_there_is_no_claim(tmp_path: Path):
    for name in tables.TABLES:
        assert tables.render(name, tmp_path) == "*No run is stored yet.*\n"


def test_an_unknown_table_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="table:nosuch is unknown"):
        tables.fill("<!-- table:nosuch -->\n<!-- /table -->", tmp_path)


def test_a_plot_of_other_numbers_is_found(tmp_path: Path):
    images = tmp_path / "images"
    assert plots.stale(tmp_path, images) == []
    store_rows(tmp_path / "cpu" / "perplexity.jsonl", [perplexity_row("nf4", 10.0, 10.0)])
    assert plots.stale(tmp_path, images) == ["docs/images/perplexity.svg"]
    pytest.importorskip("matplotlib")
    assert plots.draw_all(["docs/images/perplexity.svg"], tmp_path, images)
    assert plots.stale(tmp_path, images) == []
    first = (images / "perplexity.svg").read_bytes()
    plots.draw_all(["docs/images/perplexity.svg"], tmp_path, images)
    assert (images / "perplexity.svg").read_bytes() == first
    store_rows(tmp_path / "cpu" / "perplexity.jsonl", [perplexity_row("nf4", 10.1, 10.0)])
    assert plots.stale(tmp_path, images) == ["docs/images/perplexity.svg"]
