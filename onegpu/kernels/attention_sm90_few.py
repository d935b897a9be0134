"""The attention forward for Hopper where all tiles run at once: the same bits from less code.

A first request waits for this kernel to compile, so it has one body for all blocks of keys, the first and the last, cut
by a diagonal or not: four warps have one tile of 64 queries and a buffer each for keys and values, which is sent for as
soon as it is read. Several such blocks share a processor: what one waits for, another computes. Without a diagonal it
gets one behind the last key. Each row goes through the operations of ``attention_sm90`` in their order: blocks from the
last to the first, its sum in four threads.
"""

# Annotations are values here: Gluon looks at them.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from onegpu.kernels.attention_sm90_steps import exponentials, log_sum_exp, row_maximum, row_sums
from onegpu.kernels.hopper import warpgroup_barrier


@gluon.jit
def _load(desc, buf, full, b, h, row, there):
    """Send for a block of keys or values where ``there``."""
    block: gl.constexpr = desc.block_shape
    mbarrier.expect(full, block[2] * block[3] * 2, pred=there)
    tma.async_copy_global_to_shared(desc, [b, h, row, 0], full, buf, pred=there)


@gluon.jit(do_not_specialize=["H", "G", "SQ", "SK", "NM", "left", "right"])
def few_kernel(q_desc, k_desc, v_desc, o_desc, p_lse, H, G, SQ, SK, NM, scale_log2, left, right,
               LEFT: gl.constexpr):  # fmt: skip
    M: gl.constexpr = 64
    D: gl.constexpr = q_desc.block_shape[3]
    BN: gl.constexpr = k_desc.block_shape[2]
    DV: gl.constexpr = v_desc.block_shape[3]
    dtype: gl.constexpr = q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    out_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_buf = gl.allocate_shared_memory(dtype, [1, 1, M, D], q_desc.layout)
    k_buf = gl.allocate_shared_memory(dtype, [1, 1, BN, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(dtype, [1, 1, BN, DV], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    mbarrier.init(q_full, count=1)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    fence_async_shared()

    tile = gl.program_id(0)
    m, h, b = tile % NM, tile // NM % H, tile // NM // H
    at = m * M + SK - SQ  # the tile's first query, among the keys
    stop = gl.maximum(gl.minimum(gl.cdiv(SK, BN), gl.cdiv(gl.maximum(at + M + right, 0), BN)), 1)
    first = stop * 0
    if LEFT:
        first = gl.minimum(gl.maximum(at - left, 0) // BN, stop - 1)
    mbarrier.expect(q_full, M * D * 2)
    tma.async_copy_global_to_shared(q_desc, [b, h, m * M, 0], q_full, q_buf)
    _load(k_desc, k_buf, k_full, b, h // G, (stop - 1) * BN, True)
    _load(v_desc, v_buf, v_full, b, h // G, (stop - 1) * BN, True)
    q = q_buf.reshape([M, D])
    m_i = gl.full([M], -1.0e30, gl.float32, row_layout)  # finite where nothing is seen: then P is 0 and not NaN
    l_i = row_sums(gl.full([M, BN], 0.0, gl.float32, s_layout))
    o = gl.full([M, DV], 0.0, gl.float32, o_layout)
    rows = gl.arange(0, M, layout=row_layout)
    cols = gl.arange(0, BN, layout=gl.SliceLayout(0, s_layout))
    mbarrier.wait(q_full, 0)
    for j in range(stop - first):
        n0 = (stop - 1 - j) * BN
        mbarrier.wait(k_full, j % 2)
        k = k_buf.reshape([BN, D]).permute([1, 0])
        s = warpgroup_mma(q, k, gl.full([M, BN], 0.0, gl.float32, s_layout), use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        warpgroup_barrier()  # all four warps have read the keys
        _load(k_desc, k_buf, k_full, b, h // G, n0 - BN, n0 > first * BN)
        if gl.minimum(at + right, SK - 1) < n0 + BN - 1:
            seen = cols[None, :] <= gl.minimum(at - n0 + rows + right, SK - n0 - 1)[:, None]
            s = gl.where(seen, s, -float("inf"))
        if LEFT:
            s = gl.where(cols[None, :] >= (at - n0 + rows - left)[:, None], s, -float("inf"))
        m_new = gl.maximum(m_i, row_maximum(s, s_layout))
        alpha, p, l_i = exponentials(s, m_i, m_new, l_i, scale_log2)
        m_i = m_new
        o = o * gl.convert_layout(alpha, out_layout)[:, None]
        p = gl.convert_layout(p.to(dtype), p_layout)
        mbarrier.wait(v_full, j % 2)
        o = warpgroup_mma(p, v_buf.reshape([BN, DV]), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=[o])
        warpgroup_barrier()
        _load(v_desc, v_buf, v_full, b, h // G, n0 - BN, n0 > first * BN)
    l_i = gl.convert_layout(gl.sum(l_i, 1), row_layout)
    seen = (m * M + rows < SQ) & (l_i != 0.0)
    lse = gl.where(seen, log_sum_exp(m_i, l_i, scale_log2), -float("inf"))
    gl.store(p_lse + (b.to(gl.int64) * H + h) * SQ + m * M + rows, lse, mask=m * M + rows < SQ)
    inverse = gl.convert_layout(gl.where(seen, 1.0 / l_i, 0.0), out_layout)
    # not only * 0: a row that saw nothing may have met 0 * inf
    o = gl.where((inverse != 0.0)[:, None], o * inverse[:, None], 0.0).to(dtype)
    o_buf = gl.allocate_shared_memory(dtype, [1, 1, M, DV], o_desc.layout)  # where keys and values were
    o_buf.reshape([M, DV]).store(o)
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [b, h, m * M, 0], o_buf)
    tma.store_wait(0)
