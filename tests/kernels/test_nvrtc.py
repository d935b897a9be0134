"""CUDA C++ at run time and its cache on disk, rule (i) of DESIGN.md, "Launching"."""

from __future__ import annotations

from pathlib import Path

import pytest

from onegpu.errors import KernelError
from onegpu.kernels import nvrtc
from onegpu.kernels.launch import CudaKernel
from tests.fake_driver import FakeDriver
from tests.nvrtc_tools import SCALE, needs_nvrtc


@needs_nvrtc
def test_i_a_compiled_kernel_is_found_again(fake: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cubins"
    arguments = (SCALE, "scale<3>", "sm_90a", {"SHARED": True})
    first = nvrtc.cached_cubin(*arguments, folder=folder)
    assert first.code[:4] == b"\x7fELF" and "scale" in first.name
    assert folder.stat().st_mode & 0o777 == 0o700
    (entry,) = folder.iterdir()
    assert entry.stat().st_mode & 0o777 == 0o600
    compile_cubin, calls = nvrtc.compile_cubin, []
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda *a, **k: calls.append(a) or compile_cubin(*a, **k))
    assert nvrtc.cached_cubin(*arguments, folder=folder) == first and not calls
    content = entry.read_bytes()
    for broken in (content[:-1], content[:100], b"", content[:-1] + bytes([content[-1] ^ 1])):
        entry.write_bytes(broken)
        assert nvrtc.cached_cubin(*arguments, folder=folder) == first
    assert len(calls) == 4 and entry.read_bytes() == content


def test_i_the_key_holds_all_that_matters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake: FakeDriver) -> None:
    made = []
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda *a: made.append(a) or nvrtc.Cubin(b"\n1", "k"))
    base = ("source", "k", "sm_90a", {"A": 1}, ("use_fast_math",))
    for index, value in enumerate(("other", "k2", "sm_80", {"A": 2}, ())):
        changed = (*base[:index], value, *base[index + 1 :])
        for arguments in (base, changed, base, changed):
            assert nvrtc.cached_cubin(*arguments, folder=tmp_path) == (b"\n1", "k")
    assert len(made) == 6
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: "13.1")
    nvrtc.cached_cubin(*base, folder=tmp_path)
    fake.cuDriverGetVersion = lambda out: setattr(out._obj, "value", 13010) or 0  # type: ignore[method-assign]
    nvrtc.cached_cubin(*base, folder=tmp_path)
    assert len(made) == 8


@needs_nvrtc
def test_i_a_source_that_does_not_compile_shows_the_compilers_log() -> None:
    with pytest.raises(KernelError, match=r"(?s)scale: NVRTC cannot compile scale<3> for sm_80.*undefined_thing"):
        CudaKernel("scale", SCALE + "__device__ int f() { return undefined_thing; }", "scale<3>", "PPqf",
                   {"SHARED": 0}).compile("sm_80")  # fmt: skip


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120a"])
def test_i_headers_are_found_and_names_come_plain_or_as_templates(arch: str) -> None:
    source = """
    #include <cuda_bf16.h>
    #include <cuda_fp16.h>
    template <typename T> __device__ float up(T x) { return float(x); }
    extern "C" __global__ void plain(const __half* x, float* y) { y[0] = up(x[0]); }
    template <typename T> __global__ void many(const T* x, float* y) { y[0] = up(x[0]); }
    """
    assert CudaKernel("up", source, "plain", "PP").compile(arch).name == "plain"
    assert CudaKernel("up", source, "many<__nv_bfloat16>", "PP", options=("use_fast_math",)).compile(arch).code
