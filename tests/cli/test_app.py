from __future__ import annotations

import subprocess
import sys

import pytest

VERBS = [[], ["generate"], ["chat"], ["env"], ["version"], ["cache"], ["cache", "list"], ["cache", "clear"]]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help(run, verb: list[str]) -> None:
    result = run(*verb, "--help")
    assert result.exit_code == 0 and "Usage" in result.output
    if verb not in ([], ["cache"]):
        assert "Example" in result.output and f"onegpu {' '.join(verb)}" in result.output


@pytest.mark.parametrize("arguments", [["nonsense"], ["generate"], ["generate", "x", "--nonsense"], ["cache", "drop"]])
def test_wrong_usage_is_code_2(run, arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, contextlib\nfrom onegpu.cli import main\nsys.argv = ['onegpu', 'generate', '--help']\n"
        "with contextlib.suppress(SystemExit):\n    main()\n"
        "sys.exit(str([name for name in ('torch', 'transformers', 'triton') if name in sys.modules] or ''))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "Usage" in result.stdout and result.stderr.strip() == "", result.stderr
