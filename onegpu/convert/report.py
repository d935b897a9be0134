"""What a conversion did: nothing is skipped in silence."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Change:
    """One module: its name, what it was, what it is now (None where it was left), and why."""

    name: str
    before: str
    after: str | None
    reason: str


@dataclass
class Report:
    """The changes of one ``optimize``, ``restore`` or load. Prints as a table; ``json()`` gives the same as text."""

    action: str
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def swapped(self) -> list[Change]:
        """What was changed."""
        return [change for change in self.changes if change.after is not None]

    @property
    def left(self) -> list[Change]:
        """What was not, each with the reason."""
        return [change for change in self.changes if change.after is None]

    def leave(self, names: Iterable[str], reason: str) -> None:
        """Note that what was changed under these ``names`` is what it was again."""
        gone = set(names)
        self.changes = [replace(c, after=None, reason=reason) if c.name in gone else c for c in self.changes]

    def to_dict(self) -> dict[str, Any]:
        """Plain types: action, changes, notes."""
        return asdict(self)

    def json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        groups = Counter((c.before, c.after or "left", c.reason) for c in self.changes)
        rows = [("modules", "before", "after", "why")]
        rows += [(str(count), *group) for group, count in groups.items()]
        if len(rows) == 1:
            rows.append(("0", "-", "-", "nothing matched"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"onegpu {self.action}", *lines, *self.notes])
