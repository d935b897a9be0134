"""The page's table is the one that the code makes, and its types are those of the contract."""

from __future__ import annotations

from tests.contract import table
from tests.contract.harness import LEFT, SERVED


def test_the_page_has_the_table():
    text = table.PAGE.read_text(encoding="utf-8")
    assert text.split(table.BEGIN)[1].split(table.END)[0] == table.table()
    assert len(SERVED) >= 25 and not set(SERVED) & set(LEFT)
