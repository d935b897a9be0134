"""The table of model types in docs/attention.md: ``python -m tests.contract.table`` writes it.

Which modules are served is what ``optimize`` reports of a tiny model; that they then answer as eager attention does is
what ``tests/contract/test_attention.py`` tests for the same types. ``test_table.py`` compares the page with this.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onegpu
from onegpu.convert.attention_rule import of_attention
from tests.contract.harness import LEFT, PACKED, PADDED, SERVED
from tests.tiny import tiny_model

PAGE = Path(onegpu.__file__).parents[1] / "docs" / "attention.md"
BEGIN, END = "<!-- table: python -m tests.contract.table -->\n", "<!-- end of the table -->\n"


def row(name: str) -> str:
    """One type's line."""
    model = tiny_model(name)
    report = of_attention(onegpu.optimize(model))
    # Named without the "Self" that some versions of transformers have there.
    served = Counter(change.before.split(" (")[0].replace("SelfAttention", "Attention") for change in report.swapped)
    kept = {change.before.split(" (")[0]: change.reason.split("; ")[0] for change in report.left}
    window = getattr(model.config, "sliding_window", None) or getattr(model.config, "local_attention", None)
    cells = (
        name,
        ", ".join(served) or "–",
        "yes" if served and window else "",
        "in place" if served and name in PADDED else "",
        ", ".join(f"`{spelling}`" for spelling in PACKED.get(name, ())) if served else "",
        "; ".join(f"{module}: {reason}" for module, reason in kept.items()),
    )
    return "| " + " | ".join(cells) + " |\n"


def table() -> str:
    """All of them."""
    head = "| Type | Served | Window | Padding | Packed by | Keeps its own, and why |\n|---|---|---|---|---|---|\n"
    return head + "".join(row(name) for name in (*SERVED, *LEFT))


def main() -> None:
    """Write the table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
