"""Host time of a launch: ours beside Triton's own dispatch and cuda-core's, of one small kernel with nine arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks import timing
from benchmarks.case import Case, Context
from benchmarks.spread import paired_ratio, spread

_SOURCES = tuple(f"onegpu/kernels/{name}.py" for name in ("launch", "driver", "guard", "triton_kernel"))
_TESTS = ("tests/kernels/test_launch.py::test_gpu_a_call_costs_little_host_time",)
_SOURCE = """
extern "C" __global__ void scale(const float* x, const float* bias, float* y, float* a, float* b, int n, int stride,
                                 long long offset, float factor) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i * stride + offset] * factor + bias[i];
}
"""


def cases() -> Iterator[Case]:
    for name, sides in (("Triton", _triton), ("CUDA C++", _cuda)):
        measure = partial(_host, sides)
        sources = (*_SOURCES, "benchmarks/cases/launch.py")
        yield Case("launch", name, None, measure, sources, _TESTS, bound=0.6, seconds=2)


def _host(sides: Callable[[], tuple[str, Callable[[], Any], Callable[[], Any]]], context: Context) -> dict[str, Any]:
    if context.device != "cuda":
        return {"peer": None, "ours": {}, "theirs": None, "ratio": None, "note": "there is nothing to launch on a CPU"}
    peer, ours, theirs = sides()
    taken: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(9):
        taken["ours"].append(timing.host_seconds(ours, context.device) * 1e6)
        taken["theirs"].append(timing.host_seconds(theirs, context.device) * 1e6)
    other = {"us": spread(taken["theirs"])}
    return {
        "peer": peer, "ours": {"us": spread(taken["ours"])}, "theirs": other, "peers": {peer: other},
        "ratio": paired_ratio(taken["ours"], taken["theirs"]), "shape": {"arguments": 9},
    }  # fmt: skip


def _tensors() -> list[Any]:
    import torch

    return [torch.zeros(2048, device="cuda") for _ in range(5)]


def _triton() -> tuple[str, Callable[[], Any], Callable[[], Any]]:
    from benchmarks.cases_triton import scale
    from onegpu.kernels.launch import triton_launch

    arguments = (*_tensors(), 1000, 2, 1 << 33, 0.5)
    constants = {"BLOCK": 128, "num_warps": 4}
    return (
        "Triton's own",
        lambda: triton_launch(scale, (8,), *arguments, **constants),
        lambda: scale[(8,)](*arguments, **constants),
    )


def _cuda() -> tuple[str, Callable[[], Any], Callable[[], Any]]:
    import torch
    from cuda.core import Device, LaunchConfig, Program, ProgramOptions, Stream, launch

    from onegpu.kernels.launch import CudaKernel, architecture

    tensors = _tensors()
    kernel = CudaKernel("scale", _SOURCE, "scale", "PPPPPiiqf")
    Device(0).set_current()
    options = ProgramOptions(std="c++17", arch=architecture(0))
    core = Program(_SOURCE, "c++", options).compile("cubin").get_kernel("scale")
    mine = torch.cuda.Stream()
    stream = Stream.from_handle(mine.cuda_stream)
    config = LaunchConfig(grid=8, block=128)

    def theirs(_keep: Any = mine) -> None:
        from ctypes import c_float, c_int, c_longlong

        pointers = [t.data_ptr() for t in tensors]
        launch(stream, config, core, *pointers, c_int(1000), c_int(2), c_longlong(0), c_float(0.5))

    return "cuda-core's", lambda: kernel((8,), 128, 0, *tensors, 1000, 2, 0, 0.5), theirs
