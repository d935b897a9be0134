"""CUDA C++ without a GPU: NVRTC compiles for any architecture where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from onegpu.kernels.launch import CudaKernel

_FOUND = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
needs_nvrtc = pytest.mark.skipif(not _FOUND, reason="NVRTC and cuda-bindings come with torch's CUDA builds")
SCALE = """
template <int TIMES> __global__ void scale(const float* x, float* y, long long n, float factor) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    extern __shared__ float kept[];
    if (SHARED) kept[threadIdx.x] = factor;
    if (i < n) y[i] = x[i] * (SHARED ? kept[threadIdx.x] : factor) * TIMES;
}
"""


def scale_kernel(**constants: Any) -> CudaKernel:
    return CudaKernel("scale", SCALE, "scale<3>", "PPqf", {"SHARED": False, **constants})


# Reads its own element, waits a while in some blocks, writes the next buffer and poisons the one it read.
CHAIN = """
extern "C" __global__ void stage(float* x, float* y, int n, int number) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if ((blockIdx.x + number) % 3 == 0)
        for (int j = 0; j < 4; ++j) __nanosleep(500);
    if (i < n) {
        float value = x[i];
        x[i] = __int_as_float(0x7fffffff);
        y[i] = value + 1.0f;
    }
}
"""
