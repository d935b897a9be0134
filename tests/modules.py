"""Every file of the package with the first line of what it says of itself, for docs/architecture.md.

``python -m tests.modules`` writes the list into the page; `test_structure.py` asks that each file is in it.
"""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- list: python -m tests.modules -->\n", "<!-- end of the list -->\n"


def files() -> list[Path]:
    """Sources of the package but for those that only gather names, in Python and in CUDA C++."""
    found = [*ROOT.glob("onegpu/**/*.py"), *ROOT.glob("onegpu/**/*.cu")]
    return sorted(path.relative_to(ROOT) for path in found if path.name != "__init__.py")


def about(path: Path) -> str:
    """The first line of its docstring, or the first clause of the comment that it begins with."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".cu":
        comment = itertools.takewhile(lambda line: line.startswith("// "), text.splitlines())
        return re.split("[.:;] ", " ".join(line[3:] for line in comment))[0].rstrip(".") + "."
    return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]


def listed() -> str:
    """The list, a heading for each folder."""
    lines: list[str] = []
    folder = None
    for path in sorted(files(), key=lambda path: (path.parent, path.name)):
        if path.parent != folder:
            folder = path.parent
            lines += ["", f"**`{folder}/`**", ""]
        lines.append(f"- `{path.name}`: {about(path)}")
    return "\n".join(lines[1:]) + "\n"


def main() -> None:
    """Write the list into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{listed()}{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
