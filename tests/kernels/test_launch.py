"""The launching rules of DESIGN.md section 3; (d), (e), (f), (g) and (i) have files of their own beside this one."""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from onegpu.errors import KernelError
from onegpu.kernels import launch
from onegpu.kernels.launch import CudaKernel, triton_launch
from tests.fake_driver import FakeDriver, on_gpu
from tests.host_time import least
from tests.nvrtc_tools import CHAIN, needs_nvrtc, scale_kernel


def test_a_the_device_of_the_first_tensor_is_current(fake: FakeDriver, compiled: list[Any]) -> None:
    kernel, there, here = scale_kernel(), on_gpu(torch.zeros(4), 1), on_gpu(torch.zeros(4))
    fake.streams = {0: 10, 1: 11}
    kernel((1,), 32, 0, there, there, 1, 1.0)
    kernel((1,), 32, 0, here, here, 1, 1.0)
    assert [(seen.device, seen.stream) for seen in fake.launches] == [(1, 11), (0, 10)]
    assert fake.current == 0 and fake.on_device == [1, 0]
    with pytest.raises(KernelError, match=r"scale: a tensor of \(4,\) is on .*, the first one on cuda:1"):
        kernel((1,), 32, 0, there, here, 1, 1.0)
    kernel((1,), 32, 0, None, there, 1, 1.0)
    assert fake.launches[-1].device == 1
    assert int.from_bytes(fake.launches[-1].arguments[0], "little") == 0


def test_b_one_kernel_for_each_architecture_source_and_constants(fake: FakeDriver, compiled: list[Any]) -> None:
    kernel = scale_kernel()
    for index in (0, 1, 0, 1):
        x = on_gpu(torch.zeros(4), index)
        kernel((1,), 32, 60000 if index else 100, x, x, 1, 1.0)
    assert len(compiled) == 1 and fake.on_device == [0, 1]  # compiled once, put on each device once
    assert fake.shared == [(60000, 1)]  # asked for where it is needed, once
    assert kernel.variant("scale<4>") is kernel.variant("scale<4>") is not kernel.variant("scale<4>", SHARED=True)
    for name, constants in (("scale<4>", {}), ("scale<3>", {"SHARED": True}), ("scale<4>", {})):
        kernel.variant(name, **constants)((1,), 32, 0, x, x, 1, 1.0)
    made = [(name, constants["SHARED"]) for _, name, _, constants, _ in compiled]
    assert made == [("scale<3>", False), ("scale<4>", False), ("scale<3>", True)]


def test_b_threads_compile_once(fake: FakeDriver, compiled: list[Any]) -> None:
    kernel, x = scale_kernel(), on_gpu(torch.zeros(4))
    threads = [threading.Thread(target=kernel, args=((1,), 32, 0, x, x, i, 1.0)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1
    assert sorted(struct.unpack("<q", seen.arguments[2])[0] for seen in fake.launches) == list(range(8))


def test_c_no_compilation_while_a_graph_is_captured(fake: FakeDriver, compiled: list[Any]) -> None:
    kernel, x = scale_kernel(), on_gpu(torch.zeros(4))
    fake.capturing = True
    with pytest.raises(KernelError, match=r"^scale would compile .* onegpu\.warmup"):
        kernel((1,), 32, 0, x, x, 1, 1.0)
    assert not compiled and not fake.on_device
    fake.capturing = False
    kernel.load(0)
    fake.capturing = True
    kernel((1,), 32, 0, x, x, 1, 1.0)
    assert len(fake.launches) == 1


def test_h_no_float_atomics_and_no_tf32_in_any_kernel() -> None:
    folder = Path(launch.__file__).parent
    texts = {path.name: path.read_text() for path in (*folder.glob("*.py"), *folder.glob("*.cu"))}
    atomics = [(name, line) for name, text in texts.items() for line in text.splitlines() if "atomic" in line.lower()]
    sums = [(name, line) for name, line in atomics if "atomicadd(" in line.lower().replace("_", "")]
    # What counts says so on its line: integers in any order add up to the same.
    assert not [found for found in sums if "integer" not in found[1] and "counter" not in found[1]]
    assert not [name for name, text in texts.items() if "allow_tf32=True" in text or 'input_precision="tf32' in text]
    assert not [name for name, text in texts.items() if "set_allocator(" in text]


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [0, 100 * 1024])
def test_gpu_cuda_kernel(shared: int) -> None:
    kernel = scale_kernel(SHARED=bool(shared))
    x, y = torch.randn(1000, device="cuda"), torch.full((1000,), float("nan"), device="cuda")
    for pdl in (False, True):
        kernel((4,), 256, shared, x, y, 1000, 0.5, pdl=pdl)
        assert torch.equal(y, x * 0.5 * 3)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        kernel((4,), 256, shared, y, y, 1000, 2.0)
    side.synchronize()
    assert torch.equal(y, x * 0.5 * 3 * 2.0 * 3)


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_chain_of_programmatic_launches_compiles(arch: str) -> None:
    assert CudaKernel("stage", CHAIN, "stage", "PPii").compile(arch).name == "stage"


@pytest.mark.gpu
def test_gpu_programmatic_launches_wait_for_each_other() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch came with Hopper")
    stage, n = CudaKernel("stage", CHAIN, "stage", "PPii"), 132 * 256
    buffers = [torch.full((n,), float("nan"), device="cuda") for _ in range(8)]
    buffers[0].zero_()
    stage.load(torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(8):  # a ring: a stage that does not wait reads NaN, which no sum loses
            stage((132,), 256, 0, buffers[number], buffers[(number + 1) % 8], n, number, pdl=True)
    for _ in range(1000):
        graph.replay()
    assert torch.equal(buffers[0], torch.full_like(buffers[0], 8000.0))
    assert all(buffer.isnan().all() for buffer in buffers[1:])


@pytest.mark.gpu
def test_gpu_capture_replay_and_refusal() -> None:
    kernel, cold = scale_kernel(), scale_kernel(COLD=1)
    x, y = torch.randn(1000, device="cuda"), torch.zeros(1000, device="cuda")
    kernel.load(0)
    graph, refused = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        kernel((4,), 256, 0, x, y, 1000, 0.5, pdl=True)
        kernel((4,), 256, 0, y, y, 1000, 0.5)
        try:
            cold((4,), 256, 0, x, y, 1000, 0.5)
        except KernelError as error:
            refused = str(error)
    assert refused is not None and "onegpu.warmup" in refused
    x.normal_()
    graph.replay()
    assert torch.equal(y, x * 0.5 * 3 * 0.5 * 3)


@pytest.mark.gpu
def test_gpu_the_second_gpu_while_the_first_is_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    from tests.kernels import launch_kernels as kernels

    x, y = torch.randn(1000, device="cuda:1"), torch.zeros(1000, device="cuda:1")
    scale_kernel()((4,), 256, 60000, x, y, 1000, 0.5)
    assert torch.equal(y, x * 0.5 * 3)
    triton_launch(kernels.scale, (8,), x, y, None, 1000, 2.0, 1, BIAS=False)
    assert torch.equal(y, x * 2.0) and torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_gpu_a_call_costs_little_host_time() -> None:
    from tests.kernels import launch_kernels as kernels

    kernel = scale_kernel()
    x, y = torch.randn(1000, device="cuda"), torch.zeros(1000, device="cuda")
    best = least(
        {
            "CUDA C++": lambda: kernel((4,), 256, 0, x, y, 1000, 0.5),
            "Triton": lambda: triton_launch(kernels.scale, (8,), x, y, None, 1000, 2.0, 1, BIAS=False),
            "torch.add": lambda: torch.add(x, x, out=y),
        }
    )
    # DESIGN's budget of a linear, or, on a core that is slower because others share it, what three launches of torch's
    # own cost there.
    budget = max(12e-6, 3 * best.pop("torch.add"))
    assert max(best.values()) < budget, (best, budget)
