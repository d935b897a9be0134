"""Kernels around single pieces of onegpu.kernels.hopper, for test_hopper.py; imported where Triton is."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from onegpu.kernels.hopper import clear_rows


@gluon.jit(do_not_specialize=["n"])
def cleared(p_x, p_y, n):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
    o = rows[:, None] * 128 + cols[None, :]
    buf = gl.allocate_shared_memory(gl.float16, [64, 128], gl.NVMMASharedLayout(128, 16, rank=2))
    buf.store(gl.load(p_x + o))
    clear_rows(buf, n)
    gl.store(p_y + o, buf.load(layout))
