"""Triton's compiler for machine code alone, and its kernels on disk: rule (i) of DESIGN.md, "Launching"."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from onegpu.kernels import disk_cache, driver, triton_compile
from tests.triton_tools import needs_triton

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernels on disk: none yet."""
    monkeypatch.setattr(disk_cache, "cache_folder", lambda: tmp_path / "cubins")
    monkeypatch.setattr(driver, "driver_version", lambda: 13000)
    return tmp_path / "cubins"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[triton_compile.Form]:
    """What was compiled."""
    seen: list[triton_compile.Form] = []
    compiled = triton_compile.compiled
    monkeypatch.setattr(triton_compile, "compiled", lambda what, turn: seen.append(what) or compiled(what, turn))
    return seen


def scale(n: Any = 5, x: torch.Tensor | None = None, capability: int = 90, **constants: Any) -> triton_compile.Form:
    from tests.kernels import launch_kernels

    x = torch.zeros(64) if x is None else x
    args = (x, x, None, n, 2.0, 3)
    return triton_compile.form(launch_kernels.scale, capability, args, {"BIAS": False, **constants}, "scale")[0]


def forms() -> list[triton_compile.Form]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from tests.kernels import hopper_kernels, launch_kernels

    x, half, block = torch.zeros(16, 64), torch.zeros(64, 128, dtype=torch.float16), {"ROWS": 16, "COLUMNS": 64}
    described = TensorDescriptor.from_tensor(x, [16, 64])
    return [
        scale(launch_pdl=True),
        triton_compile.form(launch_kernels.through_descriptor, 90, (described, x), block, "op")[0],
        triton_compile.form(launch_kernels.device_descriptor, 90, (x, x, 16), block, "op")[0],
        triton_compile.form(hopper_kernels.cleared, 90, (half, half, 37), {"num_warps": 4}, "op")[0],
    ]


def test_a_canary_what_it_calls_of_triton_is_there(tmp_path: Path) -> None:
    """Of a Triton of another interface the own `compile` serves, and nothing is kept or quicker: then this fails."""
    assert triton_compile._begun(scale()) is not None and triton_compile._key(scale()) is not None
    assert {name.partition("/triton/")[2] for name, *_ in triton_compile._build()} >= {
        "_C/libtriton.so", "compiler/code_generator.py", "language/core.py", "backends/nvidia/compiler.py",
        "backends/nvidia/lib/libdevice.10.bc", "experimental/gluon/_runtime.py",
    }  # fmt: skip
    programs = [told for name, told in triton_compile._settings() if name == "ptxas"]  # type: ignore[misc]
    assert [Path(path).name for path, *_ in programs[0]] == ["ptxas"]


def test_the_machine_code_is_that_of_tritons_own_way(tmp_path: Path) -> None:
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "triton")
        for what in forms():
            assert triton_compile._begun(what) is not None
            ours, theirs = triton_compile.compiled(what), triton_compile.by_triton(what)
            assert (ours.code, ours.name) == (theirs.kernel, theirs.metadata.name)
            assert ours.numbers == triton_compile._numbers(theirs.metadata._asdict())
            assert ours.numbers["num_warps"] == 4 and ours.numbers["launch_pdl"] == what.options.get(
                "launch_pdl", False
            )
            assert triton_compile.cached(what) == triton_compile.cached(what) == ours  # made, and from disk


def test_i_a_kernel_on_disk_is_found_again(folder: Path, asked: list[triton_compile.Form]) -> None:
    first = triton_compile.cached(scale())
    assert triton_compile.cached(scale()) == first and len(asked) == 1
    (entry,) = folder.iterdir()
    content = entry.read_bytes()
    assert entry.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
    assert content.endswith(json.dumps([first.name, first.numbers]).encode() + b"\n" + first.code)
    entry.write_bytes(content[:-1])
    assert triton_compile.cached(scale()) == first and len(asked) == 2 and entry.read_bytes() == content


def test_i_another_process_asks_triton_for_nothing(tmp_path: Path) -> None:
    code = """
        import json, torch, triton.runtime.cache
        from triton.backends.nvidia.compiler import CUDABackend
        from onegpu.kernels import driver, triton_compile
        from tests.kernels import hopper_kernels, launch_kernels
        driver.driver_version = lambda: 13000
        calls = []
        for name in ("make_ttir", "make_ttgir", "gluon_to_ttgir", "make_llir", "make_ptx", "make_cubin"):
            def counted(*args, old=getattr(CUDABackend, name), name=name, static=name in ("make_ttir", "make_ttgir")):
                calls.append(name)
                return old(*args[static:])
            setattr(CUDABackend, name, counted)
        x, half = torch.zeros(64), torch.zeros(64, 128, dtype=torch.float16)
        for function, args, constants in (
            (launch_kernels.scale, (x, x, None, 5, 2.0, 3), {"BIAS": False}),
            (hopper_kernels.cleared, (half, half, 37), {"num_warps": 4}),
        ):
            made = triton_compile.cached(triton_compile.form(function, 90, args, constants, "op")[0])
            calls.append(len(made.code))
        print(json.dumps([calls, triton.runtime.cache.triton_key.cache_info().misses]))
    """
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    seen = []
    for _ in range(2):
        command = [sys.executable, "-c", "import textwrap; exec(textwrap.dedent('''" + code + "'''))"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        seen.append(json.loads(run.stdout))
    (first, hashed), (again, _) = seen
    assert sum(name == "make_cubin" for name in first) == 2 and "gluon_to_ttgir" in first and hashed == 0
    assert again == [size for size in first if isinstance(size, int)]
    assert len(list((tmp_path / ".cache" / "onegpu" / "cubins").iterdir())) == 2 and not (tmp_path / ".triton").exists()


def test_i_the_key_holds_all_that_matters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import triton

    key = triton_compile._key
    x = torch.zeros(64)
    keys = [
        key(what)
        for what in (
            scale(), scale(16), scale(1 << 40), scale(x=x.half()), scale(x=x[1:]), scale(capability=80),
            scale(BLOCK=256), scale(BLOCK=128.0), scale(num_warps=8), scale(launch_pdl=True), scale(BIAS=0),
            *forms()[1:],
        )
    ]  # fmt: skip
    assert None not in keys and keys[0] == key(scale()) and keys[0] == key(scale(7)) == key(scale(x=x[4:]))
    assert keys[1] == keys[0], "n is not specialised"
    del keys[1]
    for owner, name, value in (
        (triton, "__version__", "3.6.1"),
        (triton_compile, "_build", lambda: [("libtriton.so", 1, 2)]),
        (driver, "driver_version", lambda: 13010),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, value)
            keys.append(key(scale()))
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        keys.append(key(scale()))
        triton.knobs.nvidia.ptxas = str(tmp_path / "ptxas")
        (tmp_path / "ptxas").write_text("another build")
        keys.append(key(scale()))
        (tmp_path / "ptxas").write_text("one more build")
        keys.append(key(scale()))
    assert len({repr(one) for one in keys}) == len(keys) and key(scale()) == keys[0]


def test_i_every_kernel_of_ours_has_a_text_of_its_own() -> None:
    from triton.runtime.jit import JITFunction

    import onegpu.kernels

    found = set()
    for path in Path(onegpu.kernels.__file__).parent.glob("*.py"):
        if "triton.jit" in (text := path.read_text(encoding="utf-8")) or "gluon.jit" in text:
            module = importlib.import_module(f"onegpu.kernels.{path.stem}")
            for function in vars(module).values():
                if isinstance(function, JITFunction) and function.fn.__module__.startswith("onegpu."):
                    sources, named = triton_compile._sources(function)
                    assert sources and " at 0x" not in repr(named), (function, named)
                    found.add(repr((sources, named)))
    assert len(found) > 50


def test_i_a_build_of_triton_is_told_by_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import triton
    from triton._C import libtriton

    for part in ("_C/libtriton.so", "compiler/compiler.py", "language/core.py", "backends/nvidia/compiler.py"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / part).write_text("a build")
    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(libtriton, "__file__", str(tmp_path / "_C" / "libtriton.so"))
    build = triton_compile._build.__wrapped__
    builds = [build()]
    assert build() == builds[0] and len(builds[0]) == 4
    for path in tmp_path.rglob("*.*"):
        if path.is_file():
            os.utime(path, (1, 2))
            builds.append(build())
    assert len({repr(one) for one in builds}) == 5


def test_i_the_source_of_what_it_calls_and_names_is_in_the_key(tmp_path: Path) -> None:
    text = """
import triton
import triton.language as tl
{constant}
ORDER = {order}
@triton.constexpr_function
def picked():
    return ORDER[0]
@triton.jit
def called(x):
    return x {sign} 1

@triton.jit
def kernel(p_x):
    tl.store(p_x, called(tl.load(p_x)) + FACTOR + picked())
"""

    def key(folder: str, sign: str, constant: str, order: tuple[int, ...] = (1, 2), asked: bool = False) -> Any:
        path = tmp_path / folder / "of_a_test.py"
        path.parent.mkdir()
        path.write_text(text.format(sign=sign, constant=constant, order=order))
        spec = importlib.util.spec_from_file_location("of_a_test", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if asked:
            assert module.called.cache_key
        return triton_compile._key(triton_compile.form(module.kernel, 90, (torch.zeros(4),), {}, "op")[0])

    two = "FACTOR: tl.constexpr = tl.constexpr(2)"
    keys = [key("a", "+", two), key("b", "-", two), key("c", "+", two.replace("2", "3")), key("d", "+", two, (2, 1))]
    assert key("e", "+", two) == key("f", "+", two, asked=True) == keys[0] and None not in keys
    assert len({repr(one) for one in keys}) == 4


def test_a_constant_that_only_its_address_tells_from_others_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.kernels import launch_kernels

    def form(value: Any) -> triton_compile.Form:
        x = torch.zeros(64)
        args = (x, x, None, 5, 2.0, 3)
        return triton_compile.form(launch_kernels.scale, 90, args, {"BIAS": value}, "scale")[0]

    for vague in ((object(),), {"called": launch_kernels.scale}):
        assert triton_compile._key(form(vague)) is None
    assert triton_compile._key(form([1, None])) is not None
    first, second = (
        triton_compile._key(form(value)) for value in (launch_kernels.scale, launch_kernels.device_descriptor)
    )
    assert first != second and None not in (first, second)
    made = triton_compile.Compiled(b"code", "scale", {})
    monkeypatch.setattr(triton_compile, "compiled", lambda *_: made)
    assert triton_compile.cached(form((object(),))) == made and not folder.exists()


def test_tools_that_look_into_tritons_compiler_get_its_own_way(folder: Path, tmp_path: Path) -> None:
    import triton

    seen: list[bool] = []
    with triton.knobs.compilation.scope(), triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "triton")
        triton.knobs.compilation.listener = lambda cache_hit, **_: seen.append(cache_hit)
        assert triton_compile.cached(scale()).code and seen == [False] and not folder.exists()
    assert triton_compile.cached(scale()).code and len(seen) == 1 and folder.exists()


@pytest.mark.parametrize("missing", ["get_module_map", "add_stages"])
def test_a_triton_of_another_interface_compiles_its_own_way(
    missing: str, monkeypatch: pytest.MonkeyPatch, asked: list[triton_compile.Form]
) -> None:
    from triton.backends.nvidia.compiler import CUDABackend

    ours, own = triton_compile.compiled(scale(), None), triton_compile.by_triton
    monkeypatch.setattr(CUDABackend, missing, None)

    def by_triton(what: triton_compile.Form) -> Any:
        monkeypatch.undo()
        return own(what)

    with monkeypatch.context() as changed:
        changed.setattr(triton_compile, "by_triton", by_triton)
        found = triton_compile.compiled(scale(), None)
    assert found.numbers == ours.numbers and found.name == ours.name and found.code[:4] == b"\x7fELF"


@pytest.mark.gpu
def test_gpu_a_kernel_from_disk_runs(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from onegpu.kernels import launch
    from tests.kernels import hopper_kernels, launch_kernels

    x, block, seen = torch.randn(16, 64, device="cuda"), {"ROWS": 16, "COLUMNS": 64}, []
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for _ in range(2):
        monkeypatch.setattr(launch, "_TRITON", {})
        made = [torch.full((16, 64), float("nan"), device="cuda") for _ in range(3)]
        launch.triton_launch(launch_kernels.scale, (8,), x, made[0], None, 1024, 2.0, 1, BIAS=False)
        assert torch.equal(made[0], 2 * x)
        if hopper:
            described = TensorDescriptor.from_tensor(x, [16, 64])
            launch.triton_launch(launch_kernels.through_descriptor, (1,), described, made[1], **block)
            launch.triton_launch(launch_kernels.device_descriptor, (1,), x, made[2], 16, **block)
            assert torch.equal(made[1], x) and torch.equal(made[2], x)
            half = torch.ones(64, 128, dtype=torch.float16, device="cuda")
            launch.triton_launch(hopper_kernels.cleared, (1,), half, cleared := half + 1, 37, num_warps=4)
            seen.append(cleared)
        monkeypatch.setattr(triton_compile, "compiled", None)  # nothing compiles any more
    assert len(list(folder.iterdir())) == (4 if hopper else 1) and all(torch.equal(one, seen[0]) for one in seen)


def test_an_error_of_the_front_end_is_tritons(folder: Path) -> None:
    from triton.compiler import CompilationError

    with pytest.raises(CompilationError, match="power of 2"):
        triton_compile.cached(scale(BLOCK=100))
    assert not list(folder.iterdir())


def test_two_threads_at_once_get_the_same(folder: Path) -> None:
    turn, both, found = threading.Lock(), threading.Barrier(2), []

    def get() -> None:
        what = scale()
        both.wait(60)
        found.append(triton_compile.cached(what, turn))

    threads = [threading.Thread(target=get) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] and len(list(folder.iterdir())) == 1 and not turn.locked()
