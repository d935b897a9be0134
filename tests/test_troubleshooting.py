"""The Troubleshooting page names every error and warning of the package, and none that is gone.

Read from the sources by AST, never by a list of names: each call that makes an error (or logs a warning) gives its
longest constant piece of text, and the page must have a row whose first cell contains that piece.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"

# Where the text stands in each call: (position, keyword).
_ERRORS: dict[str, tuple[int, str]] = {
    "bad_argument": (2, "why"),
    "CheckpointError": (-1, "reason"),
    **dict.fromkeys(("ArgumentError", "KernelError", "MemoryBudgetError", "OneGPUError", "SamplingError"), (0, "")),
    **dict.fromkeys(("ValueError", "RuntimeError", "TypeError", "KeyError", "AttributeError", "OSError"), (0, "")),
    **dict.fromkeys(("ImportError", "FileNotFoundError", "FileExistsError", "MemoryError", "IndexError"), (0, "")),
    **dict.fromkeys(("NotImplementedError", "BadParameter", "UsageError", "ClickException"), (0, "")),
}
_WARNINGS = {"warning": (0, ""), "warning_once": (0, ""), "warn": (0, "")}
_SHORTEST = 5  # letters; a shorter piece says nothing on its own
_NO_TEXT = {"Exit", "AssertionError"}  # raised to leave a command, and where nobody gets to
_NO_TEXT |= {"NotCapturableError", "UnservedError", "Declined"}  # caught inside; their text is the reason on generate()'s report
# Messages that cannot be read off the call, as the message stands there: what the page must have for them instead.
_BY_HAND: dict[tuple[str, str], str] = {
    ("onegpu/auto.py", "'%s'"): "in CPU memory",  # placement.text, put together in placement/device_map.py
    ("onegpu/auto.py", "text"): "",  # safetensors' own error, passed on
    ("onegpu/errors.py", "_sentences(f'{name}={_shown.repr(value)} {why}', fix)"): "",  # bad_argument itself
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Site:
    """One text that a user can meet: where it is made, by what, and its longest constant piece."""

    file: str
    line: int
    kind: str
    piece: str


class Package:
    """The syntax trees of a folder of sources, with what is needed to follow a name to the text bound to it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder.parent
        self.unread: set[tuple[str, str]] = set()  # filled by `sites`: messages without text that could be followed
        self.trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))}
        self.parents: dict[ast.AST, ast.AST] = {}
        self.calls: dict[str, list[tuple[Path, ast.Call]]] = defaultdict(list)
        self.functions: dict[str, list[tuple[Path, Function]]] = defaultdict(list)
        for path, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    self.calls[_called(node)].append((path, node))
                elif isinstance(node, Function):
                    self.functions[node.name].append((path, node))
                for child in ast.iter_child_nodes(node):
                    self.parents[child] = node

    def sites(self) -> list[Site]:
        """Every text, in the order of the sources. A message without own text (a caught error's) has no site."""
        found = set()
        for path, tree in self.trees.items():
            for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
                name = _called(call)
                logged = isinstance(call.func, ast.Attribute) and name in _WARNINGS
                if name not in _ERRORS and not logged:
                    continue
                message = _argument(call, *(_WARNINGS if logged else _ERRORS)[name])
                if message is None:  # NotImplementedError() of a base class
                    continue
                file = path.relative_to(self.root).as_posix()
                pieces = {piece for text in self.texts(path, message) if (piece := longest(text))}
                if not pieces:
                    written = ast.unparse(message)
                    self.unread.add((file, written))
                    pieces = {_BY_HAND[file, written]} - {""} if (file, written) in _BY_HAND else set()
                found.update(Site(file, call.lineno, name, piece) for piece in pieces)
        return sorted(found, key=lambda site: (site.file, site.line, site.piece))

    def texts(self, path: Path, node: ast.expr, seen: frozenset[str] = frozenset()) -> Iterator[list[str]]:
        """The constant parts of each text that the expression can be."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield [node.value]
        elif isinstance(node, ast.JoinedStr):
            parts = [p.value for p in node.values if isinstance(p, ast.Constant) and isinstance(p.value, str)]
            if parts and longest(parts):
                yield parts
            else:  # f"{kind}{more}": the text is in what is put together
                inner = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
                choices = [list(self.texts(path, value, seen)) or [[]] for value in inner]
                yield from (list(itertools.chain(*chosen)) for chosen in itertools.product(*choices))
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = ([t for t in self.texts(path, side, seen)] for side in (node.left, node.right))
            yield from ([*a, *b] for a in left or [[]] for b in right or [[]])
        elif isinstance(node, ast.IfExp):
            yield from self.texts(path, node.body, seen)
            yield from self.texts(path, node.orelse, seen)
        elif isinstance(node, ast.BoolOp):
            for value in node.values:
                yield from self.texts(path, value, seen)
        elif isinstance(node, ast.Call) and _called(node) == "str" and node.args:
            yield from self.texts(path, node.args[0], seen)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and f"{node.func.id}()" not in seen:
            for where, function in self.functions[node.func.id]:
                for back in ast.walk(function):
                    if isinstance(back, ast.Return) and back.value is not None:
                        yield from self.texts(where, back.value, seen | {f"{node.func.id}()"})
        elif isinstance(node, ast.Name) and node.id not in seen:
            yield from self._bound(path, node, seen | {node.id})

    def _bound(self, path: Path, node: ast.Name, seen: frozenset[str]) -> Iterator[list[str]]:
        """The texts that a name is bound to: in its function, else by those who call it, else in its module."""
        function = self._function(node)
        while function is not None:
            values = list(_assigned(function, node.id))
            if values:
                for value in values:
                    yield from self.texts(path, value, seen)
                return
            names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
            if node.id in names or node.id in (a.arg for a in function.args.kwonlyargs):
                position = names.index(node.id) if node.id in names else -1
                position -= bool(names) and names[0] in ("self", "cls")
                for caller, call in self.calls[function.name]:
                    value = _argument(call, position, node.id)
                    if value is not None:
                        yield from self.texts(caller, value, seen - {node.id} if caller != path else seen)
                return
            function = self._function(function)
        for statement in self.trees[path].body:
            if not isinstance(statement, Function | ast.ClassDef):
                for value in _assigned(statement, node.id):
                    yield from self.texts(path, value, seen)

    def _function(self, node: ast.AST) -> Function | None:
        while (node := self.parents.get(node)) is not None:  # type: ignore[assignment]
            if isinstance(node, Function):
                return node
        return None


def longest(parts: list[str]) -> str:
    """The longest part that says something, as the page writes it; empty when none does."""
    pieces = [normal(piece) for part in parts for piece in re.split(r"%[sdr]|…", part)]
    best = max(pieces, key=len, default="")
    return best if len(re.findall(r"\w", best)) >= _SHORTEST else ""


def normal(text: str) -> str:
    """Text without what a table's cell changes: runs of white space, code marks, escapes; punctuation at its ends."""
    text = re.sub(r"\s+", " ", text.replace("\\|", "|").replace("\\_", "_").replace("`", ""))
    return text.strip(" ,;:.()='\"")


def first_cells(page: str) -> list[str]:
    """The first cell of each row of the page's tables, headings and rulers left out."""
    cells = [re.split(r"(?<!\\)\|", line)[1].strip() for line in page.splitlines() if line.startswith("|")]
    return [cell for cell in cells if cell != "Message" and set(cell) - set("-: ")]


def parts_of(cell: str) -> set[str]:
    """The constant pieces of a first cell: what is between `…`, behind the argument and its value in a code span."""
    return {normal(part) for part in re.sub(r"^`[^`]+=[^`]+`", "…", cell).split("…")}


def _called(call: ast.Call) -> str:
    function = call.func
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def _argument(call: ast.Call, position: int, keyword: str) -> ast.expr | None:
    for given in call.keywords:
        if given.arg == keyword:
            return given.value
    if 0 <= position < len(call.args) and not any(isinstance(a, ast.Starred) for a in call.args[: position + 1]):
        return call.args[position]
    return None


def _assigned(scope: ast.AST, name: str) -> Iterator[ast.expr]:
    """The values bound to a name: by `=`, `+=`, `name: str =` and `:=`, or by `for name in` a literal."""
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield from _matched(target, node.value, name)
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple | ast.List):
            for value in node.iter.elts:
                yield from _matched(node.target, value, name)
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr | ast.AugAssign) and node.value is not None:
            yield from _matched(node.target, node.value, name)


def _matched(target: ast.expr, value: ast.expr, name: str) -> Iterator[ast.expr]:
    """What `target = value` binds to the name, tuples taken apart."""
    if isinstance(target, ast.Name) and target.id == name:
        yield value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for t, v in zip(target.elts, value.elts, strict=False):
            yield from _matched(t, v, name)


def _table(page: str, pieces: set[str]) -> tuple[set[str], list[str]]:
    """The pieces that no first cell has, and the first cells that have none of the pieces."""
    cells = {cell: parts_of(cell) for cell in first_cells(page)}
    named = set().union(*cells.values())
    return pieces - named, [cell for cell, parts in cells.items() if not parts & pieces]


@pytest.fixture(scope="module")
def package() -> Package:
    return Package(ROOT / "onegpu")


@pytest.fixture(scope="module")
def sites(package: Package) -> list[Site]:
    return package.sites()


def test_every_error_and_warning_has_a_row(sites: list[Site]) -> None:
    missing, _ = _table(PAGE.read_text(encoding="utf-8"), {site.piece for site in sites})
    assert len(sites) > 200
    assert not missing, [f"{site.file}:{site.line}: {site.piece}" for site in sites if site.piece in missing]


def test_no_row_is_stale(sites: list[Site]) -> None:
    _, stale = _table(PAGE.read_text(encoding="utf-8"), {site.piece for site in sites})
    assert not stale


def test_every_row_has_a_cause_and_a_fix() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert not [row for row in cells if len(row) != 3 or not all(row)]
    names = [row[0] for row in cells if row[0] not in ("Message", "---")]
    assert len(names) == len(set(names))


@pytest.mark.usefixtures("sites")  # has looked at every call
def test_no_message_escapes_the_collector(package: Package) -> None:
    assert package.unread == set(_BY_HAND)  # a new one: give it a text of its own, or an entry and a row
    made_here = {node.name for tree in package.trees.values() for node in ast.walk(tree) if isinstance(node, Function)}
    unknown = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.exc)}"
        for path, tree in package.trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        if _called(node.exc) not in {*_ERRORS, *_NO_TEXT, *made_here}
    ]
    assert not unknown  # a kind of error that the collector does not know


def test_the_collector_finds_what_it_must(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "a.py").write_text(
        "REASON = 'bound to a name of the module'\n"
        "def f(x, kind):\n"
        "    if x: raise bad_argument('x', x, f'is {x} and this is its why', 'a fix that is no message')\n"
        "    why = 'one branch of it' if x else 'and the other one'\n"
        "    raise CheckpointError(file=x, reason=why, fix='no message')\n"
        "def g():\n"
        "    logger.warning('%s is warned about by %s', 1, 2)\n"
        "    raise ValueError(REASON)\n"
        "def h(text):\n"
        "    try: f()\n"
        "    except OSError as error: raise CheckpointError(file=1, reason=text) from error\n"
        "h('handed over in a call')\n"
    )
    found = {site.piece for site in Package(folder).sites()}
    assert found == {
        "and this is its why",
        "one branch of it",
        "and the other one",
        "is warned about by",
        "bound to a name of the module",
        "handed over in a call",
    }


def test_a_missing_and_a_stale_row_are_seen() -> None:
    page = "| Message | Cause | Fix |\n|---|---|---|\n| `x=…` is wrong \\| bad … here | c | f |\n| is gone | c | f |\n"
    assert _table(page, {"is wrong | bad", "is new"}) == ({"is new"}, ["is gone"])
    assert _table(page, {"is wrong"})[0] == {"is wrong"}  # a part of a longer message is not that message


if __name__ == "__main__":  # what the page must name
    for site in Package(ROOT / "onegpu").sites():
        print(f"{site.file}:{site.line}\t{site.kind}\t{site.piece}")
