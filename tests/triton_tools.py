"""Triton without a GPU: compile a kernel for an architecture, or run it in the interpreter in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")
ARCHITECTURES = [80, 86, 89, 90, 100]
SHARED_MEMORY_LIMIT = 99 * 1024  # what a block may have on every one of them


def compiled(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], architecture: int, **options: int
) -> Any:
    """The compiled kernel; its pointers are taken as 16-byte aligned."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(arguments.values()) if kind.startswith("*")}
    source = ASTSource(kernel, {**arguments, **dict.fromkeys(constants, "constexpr")}, constants, aligned)
    return compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def interpret(snippet: str) -> None:
    """Run ``snippet`` with Triton's interpreter; it sees ``torch`` and ``F`` (onegpu.functional). Fails as it fails."""
    code = "import contextlib, torch\ntorch.cuda.device = lambda _: contextlib.nullcontext()\n"
    code += "import onegpu.functional as F\ntorch.manual_seed(0)\n" + textwrap.dedent(snippet)
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]


def stack_bytes(kernel: Any) -> int:
    """Bytes of local memory that each thread of a compiled kernel has, which is where registers spill to."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    (stack, local) = re.findall(r" STACK:(\d+) .* LOCAL:(\d+)", text.stdout)[0]
    return int(stack) + int(local)


_PTX_BYTES = {"u64": 8, "b64": 8, "s64": 8, "f64": 8, "u32": 4, "b32": 4, "s32": 4, "f32": 4, "u16": 2, "b16": 2}


def ptx_parameter_bytes(ptx: str) -> list[int]:
    """Size of each parameter of the only kernel in a PTX text, in order."""
    head = re.search(r"\.entry [^(]*\((.*?)\n\)", ptx, re.DOTALL)
    assert head is not None
    sizes = []
    for line in head[1].split(",\n"):
        found = re.search(r"\.param(?: \.align \d+)? \.(\w+)[^,]*? \w+(?:\[(\d+)\])?\s*$", line.strip())
        assert found is not None, line
        sizes.append(_PTX_BYTES.get(found[1], 1) * int(found[2] or 1))
    return sizes


def spills(made: Any) -> int:
    """Bytes of registers that ptxas moves to memory, stores and loads together, in a compiled kernel."""
    import triton.backends.nvidia

    target = re.search(r"\.target (sm_\w+)", made.asm["ptx"])
    assert target is not None
    name = "ptxas-blackwell" if target[1].startswith("sm_10") else "ptxas"
    program = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    command = [program, "-v", f"--gpu-name={target[1]}", "-", "-o", os.devnull]
    run = subprocess.run(command, input=made.asm["ptx"], capture_output=True, text=True, timeout=240)
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", run.stderr)
    assert run.returncode == 0 and found, run.stderr[-3000:]
    return sum(map(int, found))
