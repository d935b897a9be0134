"""The package keeps the shape that docs/architecture.md describes, and `import onegpu` does no work."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import onegpu
from tests import modules, structure

ROOT = Path(onegpu.__file__).parents[1]
Check = Callable[[Path], list[str]]

# The rule asks for a test beside each source, not for a source behind each test: tests/ecosystem/ has none, since what
# it tests is other people's packages on our models (PEFT, Trainer, sentence-transformers, …), each across many sources.
# Sources whose tests stand in another file than the mirror's. Each with its reason; new code has no need to be here.
TESTED_ELSEWHERE: dict[str, str] = {}


def check_mirror(root: Path) -> list[str]:
    return structure.check_mirror(root, TESTED_ELSEWHERE if root == ROOT else {})


CHECKS: list[Check] = [
    structure.check_import_direction,
    structure.check_sizes,
    structure.check_no_environment,
    structure.check_no_swallowed_errors,
    check_mirror,
]


@pytest.mark.parametrize("check", CHECKS)
def test_package(check: Check):
    problems = check(ROOT)
    assert not problems, "\n".join(problems)


def test_the_architecture_page_names_every_file():
    listed = modules.PAGE.read_text(encoding="utf-8").split(modules.BEGIN)[1].split(modules.END)[0]
    for folder in {path.parent for path in modules.files()}:
        (part,) = [part for part in listed.split("**`") if part.startswith(f"{folder}/`**")]
        missing = [path.name for path in modules.files() if path.parent == folder and f"- `{path.name}`: " not in part]
        assert not missing, f"{missing} of {folder}: python -m tests.modules"
        for name in (line.split("`")[1] for line in part.splitlines() if line.startswith("- ")):
            assert (ROOT / folder / name).is_file(), f"{name} is gone: python -m tests.modules"


# Every check on trees that break it, and on trees that only look as if they did: a check that cannot fail is none.


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("onegpu/nn/linear.py", "from onegpu.auto import AutoModel"),
        ("onegpu/nn/linear.py", "import onegpu.engine.cache"),
        ("onegpu/nn/linear.py", "from onegpu import convert"),
        ("onegpu/nn/linear.py", "from onegpu import optimize"),
        ("onegpu/nn/linear.py", "from ..formats import bnb"),
        ("onegpu/nn/linear.py", "from .. import engine"),
        ("onegpu/nn/linear.py", "def f():\n    from onegpu.placement import plan"),
        ("onegpu/nn/linear.py", "import importlib\nimportlib.import_module('onegpu.cli')"),
        ("onegpu/nn/linear.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import onegpu.auto"),
        ("onegpu/hardware.py", "import onegpu.kernels"),
        ("onegpu/kernels/op.py", "import onegpu.functional"),
        ("onegpu/functional.py", "import onegpu.nn"),
        ("onegpu/convert/rules.py", "import onegpu.engine"),
        ("onegpu/engine/cache.py", "import onegpu.auto"),
        ("onegpu/errors.py", "import onegpu.hardware"),
        ("onegpu/utils.py", "import os"),
    ],
)
def test_an_import_that_goes_up_is_found(tmp_path: Path, source: str, line: str):
    parts = ["hardware", "functional", "auto"]
    folders = ["kernels", "nn", "formats", "convert", "placement", "engine", "cli"]
    files = {f"onegpu/{part}.py": "" for part in parts} | {f"onegpu/{folder}/__init__.py": "" for folder in folders}
    assert len(structure.check_import_direction(tree(tmp_path, {**files, source: line}))) == 1


def test_an_import_that_goes_down_is_not(tmp_path: Path):
    good = {
        "onegpu/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from onegpu.cli import main\n",
        "onegpu/errors.py": "import os\n",
        "onegpu/hardware.py": "from onegpu.errors import OneGPUError\n",
        "onegpu/kernels/op.py": "from onegpu import __version__, hardware\nfrom .other import helper\n",
        "onegpu/kernels/other.py": "import torch.nn\nfrom onegpu_other import auto\n",
        "onegpu/functional.py": "import onegpu.kernels.op\n",
        "onegpu/nn/linear.py": "from ..functional import x\nif typing.TYPE_CHECKING:\n    import onegpu.auto\n",
        "onegpu/convert/rules.py": "from onegpu.formats import bnb\nfrom onegpu.nn.linear import x\n",
        "onegpu/formats/bnb.py": "def f():\n    import onegpu.nn.linear\n",
        "onegpu/engine/cache.py": "from onegpu.convert import rules\n",
        "onegpu/auto.py": "import onegpu.engine.cache\n",
        "onegpu/cli/__init__.py": "import onegpu\nfrom onegpu import AutoModelForCausalLM, auto\n",
    }
    assert structure.check_import_direction(tree(tmp_path, good)) == []


def test_a_circle_within_a_layer_is_found(tmp_path: Path):
    files = {
        "onegpu/convert/a.py": "import onegpu.formats.a",
        "onegpu/formats/a.py": "import onegpu.placement.a",
        "onegpu/placement/a.py": "import onegpu.convert.a",
    }
    (problem,) = structure.check_import_direction(tree(tmp_path, files))
    assert "circle" in problem and "convert" in problem


def function(lines: int, decorator: str = "") -> str:
    return f"{decorator}def f():\n" + "    x = 1\n" * (lines - 1)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("x = 1\n" * 400, 0),
        ("x = 1\n" * 401, 1),
        (function(80), 0),
        (function(81), 1),
        ('def f():\n    """Long.' + "\n" * 60 + '    """\n' + "    x = 1\n" * 79, 0),
        ("class C:\n    async " + function(81).replace("\n    ", "\n        "), 1),
        (function(81, "@triton.jit\n"), 0),
        (function(81, "@triton.jit(do_not_specialize=['n'])\n"), 0),
        (function(151, "@gluon.jit\n"), 1),
        (function(81, "@functools.cache\n"), 1),
    ],
)
def test_a_long_file_or_function_is_found(tmp_path: Path, text: str, problems: int):
    assert len(structure.check_sizes(tree(tmp_path, {"onegpu/nn/a.py": text}))) == problems


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("import os\nx = os.environ.get('A')", 1),
        ("import os\nx = os.getenv('A')", 1),
        ("from os import environ as e", 1),
        ("def f():\n    import os\n    os.environ['A'] = '1'", 1),
        ("import os\nx = os.path.join('environ', 'getenv')\ny = self.environ", 0),
    ],
)
def test_an_environment_switch_is_found(tmp_path: Path, text: str, problems: int):
    assert len(structure.check_no_environment(tree(tmp_path, {"onegpu/a.py": text}))) == problems


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("try:\n    f()\nexcept:\n    raise", 1),
        ("try:\n    f()\nexcept Exception:\n    pass", 1),
        ("try:\n    f()\nexcept (ValueError, Exception):\n    x = None", 1),
        ("try:\n    f()\nexcept builtins.BaseException as error:\n    log('no')", 1),
        ("with contextlib.suppress(Exception):\n    f()", 1),
        ("bad_argument('x', 1, 'is bad', 'use 2')", 1),
        ("errors.CheckpointError(file='a', reason='b')", 1),
        ("try:\n    f()\nexcept Exception as error:\n    raise ValueError('x') from error", 0),
        ("try:\n    f()\nexcept Exception as error:\n    report.append(str(error))", 0),
        ("try:\n    f()\nexcept FileNotFoundError:\n    pass", 0),
        ("with contextlib.suppress(FileNotFoundError):\n    f()", 0),
        ("raise bad_argument('x', 1, 'is bad', 'use 2')\n", 0),
    ],
)
def test_a_swallowed_error_is_found(tmp_path: Path, text: str, problems: int):
    assert len(structure.check_no_swallowed_errors(tree(tmp_path, {"onegpu/a.py": text}))) == problems


def test_a_source_without_its_test_is_found(tmp_path: Path):
    root = tree(
        tmp_path,
        {
            "onegpu/__init__.py": "def f(): ...",
            "onegpu/names.py": "X = 1",
            "onegpu/nn/linear.py": "def f(): ...",
            "onegpu/nn/_base.py": "class C: ...",
            "onegpu/nn/norm.py": "def f(): ...",
            "tests/nn/test_linear.py": "",
            "tests/nn/test_base.py": "",
        },
    )
    (problem,) = structure.check_mirror(root, {})
    assert "onegpu/nn/norm.py" in problem and "tests/nn/test_norm.py" in problem
    assert structure.check_mirror(root, {"onegpu/nn/norm.py": "tests/nn/test_linear.py"}) == []
    # An exception that is not needed, or whose test or source has gone, is a problem too.
    gone = {"onegpu/nn/norm.py": "tests/nn/test_gone.py", "onegpu/gone.py": "tests/nn/test_linear.py"}
    assert len(structure.check_mirror(root, gone)) == 2
    (root / "tests/nn/test_norm.py").touch()
    assert len(structure.check_mirror(root, {"onegpu/nn/norm.py": "tests/nn/test_linear.py"})) == 1


# What `import onegpu` costs, in processes of their own.


def in_fresh_process(code: str) -> dict[str, object]:
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    result: dict[str, object] = json.loads(run.stdout.splitlines()[-1])
    return result


def test_import_loads_nothing_else():
    code = """
import sys, json
import onegpu
onegpu.__version__, dir(onegpu)
heavy = {"torch", "transformers", "triton", "accelerate", "numpy", "cuda", "rich", "typer"}
print(json.dumps({"loaded": sorted(m for m in sys.modules if m in heavy or m.startswith("onegpu."))}))
"""
    assert in_fresh_process(code) == {"loaded": []}


def test_import_takes_no_time_on_top_of_torch_and_transformers():
    code = """
import json, sys, time
import torch, transformers
before, start = set(sys.modules), time.perf_counter()
import onegpu
seconds = time.perf_counter() - start
new = [m for m in sys.modules if m not in before]
print(json.dumps({"seconds": seconds, "cuda": torch.cuda.is_initialized(),
                  "work": [m for m in new if m.startswith(("triton", "cuda", "onegpu.kernels"))]}))
"""
    runs = [in_fresh_process(code) for _ in range(3)]
    assert not any(run["cuda"] or run["work"] for run in runs)
    assert statistics.median(float(str(run["seconds"])) for run in runs) <= 0.3


def test_public_names_need_no_triton_no_cuda_context_and_no_bitsandbytes():
    code = """
import json, sys
for name in ("triton", "bitsandbytes", "cuda", "flash_attn"):
    sys.modules[name] = None  # importing it raises ImportError, as where it is not installed
import torch
import onegpu
for name in onegpu.__all__:
    assert getattr(onegpu, name) is not None, name
from onegpu import *
print(json.dumps({"cuda": torch.cuda.is_initialized()}))
"""
    assert in_fresh_process(code) == {"cuda": False}


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = onegpu.no_such_name
    assert not hasattr(onegpu, "automodel")
    assert set(onegpu.__all__) <= set(dir(onegpu))
