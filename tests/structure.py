"""The shape of the package, as rules that a machine can check; `test_structure.py` applies them.

Each check takes the root of a tree that has `onegpu/` (and `tests/`) in it, and returns one line for each violation, so
that the checks themselves are tested on small trees that break them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "onegpu"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_KERNEL_LINES = 150  # a kernel cannot be cut into pieces as a function can

# DESIGN.md section 2: a part imports from lower layers only. Parts of one layer may use each other, without a cycle.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"hardware"}),
    frozenset({"kernels"}),
    frozenset({"functional", "flash_attn"}),
    frozenset({"nn"}),
    frozenset({"formats", "convert", "placement"}),
    frozenset({"engine"}),
    frozenset({"arguments"}),
    frozenset({"auto", "cli", PACKAGE}),  # PACKAGE: the public names, `import onegpu`
)
FREE = frozenset({"errors"})  # imported by every part; imports none
_LAYER_OF = {part: number for number, layer in enumerate(LAYERS) for part in layer}


def check_import_direction(root: Path) -> list[str]:
    """No import goes up, none makes a cycle between parts, and every part has its place in LAYERS."""
    problems = []
    edges: dict[str, set[str]] = {}
    for path in _sources(root):
        part = _part_of(path.relative_to(root))
        if part not in _LAYER_OF and part not in FREE:
            problems.append(f"{path.relative_to(root)}: {part!r} has no layer; give it one in tests/structure.py")
            continue
        for target, line in _imported_parts(root, path):
            where = f"{path.relative_to(root)}:{line}"
            if target == part or target in FREE:
                continue
            if part in FREE:
                problems.append(f"{where}: {part} imports {target}, but everything imports {part}")
            elif target not in _LAYER_OF:
                problems.append(f"{where}: imports {target!r}, which has no layer")
            elif _LAYER_OF[target] > _LAYER_OF[part]:
                problems.append(f"{where}: {part} imports {target}, which is above it")
            else:
                edges.setdefault(part, set()).add(target)
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        problems.append("imports go round in a circle: " + " -> ".join(error.args[1]))
    return problems


def check_sizes(root: Path) -> list[str]:
    """No long files, no long functions (without their docstrings; kernels may be longer)."""
    problems = []
    for path in _sources(root):
        text = path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        if lines > MAX_FILE_LINES:
            problems.append(f"{path.relative_to(root)}: {lines} lines, more than {MAX_FILE_LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                limit = MAX_KERNEL_LINES if _is_kernel(node) else MAX_FUNCTION_LINES
                if (length := _code_lines(node)) > limit:
                    problems.append(
                        f"{path.relative_to(root)}:{node.lineno}: {node.name} has {length} lines, more than {limit}"
                    )
    return problems


def check_no_environment(root: Path) -> list[str]:
    """No environment variable changes what the package does: arguments do."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    problems = []
    for path, node in _nodes(root):
        if isinstance(node, ast.Attribute):
            used = node.attr in names and ast.unparse(node.value) == "os"
        else:
            used = isinstance(node, ast.ImportFrom) and node.module == "os" and any(a.name in names for a in node.names)
        if used:
            problems.append(f"{path.relative_to(root)}:{_line(node)}: reads or sets an environment variable")
    return problems


def check_no_swallowed_errors(root: Path) -> list[str]:
    """A handler for everything raises or uses what it caught; an error that is made is raised."""
    problems = []
    for path, node in _nodes(root):
        where = f"{path.relative_to(root)}:{_line(node)}"
        if isinstance(node, ast.ExceptHandler) and _is_broad(node.type):
            inside = [inner for statement in node.body for inner in ast.walk(statement)]
            raises = any(isinstance(inner, ast.Raise) for inner in inside)
            uses = any(isinstance(inner, ast.Name) and inner.id == node.name for inner in inside)
            if node.type is None or not (raises or uses):
                problems.append(f"{where}: swallows every exception; name those that are meant")
        elif isinstance(node, ast.Call) and _called(node) == "suppress" and any(map(_is_broad, node.args)):
            problems.append(f"{where}: swallows every exception; name those that are meant")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            name = _called(node.value)
            if name == "bad_argument" or name.endswith("Error"):
                problems.append(f"{where}: makes an error and does not raise it")
    return problems


def check_mirror(root: Path, elsewhere: dict[str, str]) -> list[str]:
    """onegpu/x/y.py has tests/x/test_y.py, unless it defines nothing or `elsewhere` names the file that tests it.

    Args:
        elsewhere: path of a source -> path of the test file that covers it, both from the root.
    """
    problems = []
    for path in _sources(root):
        source = path.relative_to(root)
        if path.name in ("__init__.py", "__main__.py") or not _defines_something(path):
            continue
        mirror = Path("tests", *source.parts[1:-1], f"test_{path.stem.lstrip('_')}.py")
        test = elsewhere.get(source.as_posix(), mirror.as_posix())
        if not (root / test).is_file():
            problems.append(f"{source}: {test} does not exist")
        elif source.as_posix() in elsewhere and (root / mirror).is_file():
            problems.append(f"{source}: has {mirror} by now; drop it from the list of exceptions")
    problems += [f"{source}: is excepted, but does not exist" for source in elsewhere if not (root / source).is_file()]
    return problems


def _sources(root: Path) -> list[Path]:
    return sorted((root / PACKAGE).rglob("*.py"))


def _nodes(root: Path) -> Iterator[tuple[Path, ast.AST]]:
    for path in _sources(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield path, node


def _part_of(source: Path) -> str:
    """onegpu/nn/linear.py -> nn; onegpu/auto.py -> auto; onegpu/__init__.py -> onegpu."""
    name = source.parts[1].removesuffix(".py")
    return PACKAGE if name == "__init__" else name


def _imported_parts(root: Path, path: Path) -> Iterator[tuple[str, int]]:
    """(part, line) of each import of the package in one file, inside functions too, but not those for type checkers."""
    package = path.relative_to(root).parent.parts
    for node in _runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from onegpu import x` is the part x where there is one, else a public name; dunders cost nothing
            names = [alias.name for alias in node.names if not alias.name.startswith("__")]
            modules = [f"{module}.{name}" for name in names] if module == PACKAGE else [module]
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            first = node.args[0]
            modules = [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
        for module in modules:
            pieces = module.split(".")
            if pieces[0] == PACKAGE:
                yield _existing_part(root, pieces), _line(node)


def _existing_part(root: Path, pieces: list[str]) -> str:
    if len(pieces) == 1:
        return PACKAGE
    place = root / PACKAGE / pieces[1]
    return pieces[1] if place.is_dir() or place.with_suffix(".py").is_file() else PACKAGE


def _runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children = node.orelse
    for child in children:
        yield from _runtime_nodes(child)


def _is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator).split("(")[0].split(".") for decorator in node.decorator_list)


def _code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None:
        length -= (first.end_lineno or first.lineno) - first.lineno + 1
    return length


def _is_broad(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(map(_is_broad, kind.elts))
    return kind is None or ast.unparse(kind).split(".")[-1] in ("Exception", "BaseException")


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func).split(".")[-1]


def _defines_something(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for node in ast.walk(tree))


def _line(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)
