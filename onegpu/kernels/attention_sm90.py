"""The attention forward for Hopper, in Gluon: compiled with Triton 3.6 and 3.7, elsewhere the portable kernel serves.

A block has two consumers of four warps, 64 query rows each, and one producer warp that draws tiles (128 queries of one
head) from a counter, tells the consumers of each and issues TMA loads. Keys come in blocks of BN, from the last to the
first, so that the blocks with a mask come first and those that only the left side of a window cuts come last. In a step
the product ``S = Q K.T`` of this block and ``O += P V`` of the one before are issued together, and the softmax of S
runs beside the second (``attention_sm90_steps``). The accumulator of S and the 16-bit operand P hold the same elements
in each thread: nothing moves.

Tiles of padded and packed sequences count from each sequence's first row; those without a query are passed over by the
producer, and one more warp fills in what no query owns. Values behind the last key are overwritten with zeros in shared
memory: P is zero there, and 0 * NaN is not.
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
from triton.language.core import _aggregate as aggregate

from onegpu.kernels.attention_sm90_parts import (
    draw,
    fetch,
    filler,
    key_blocks,
    place,
    publish,
    store_rows,
)
from onegpu.kernels.attention_sm90_steps import FREE, Q_FREE, blocks, log_sum_exp, operand, product
from onegpu.kernels.hopper import advance, bar_arrive, bar_sync, sequence, tile_of, warpgroup_barrier

FIELDS = {
    **dict.fromkeys(("q_desc", "k_desc", "v_desc", "o_desc"), tma.tensor_descriptor),
    **dict.fromkeys(("p_o", "p_lse", "p_q_rows", "p_k_rows", "p_counter"), gl.tensor),
    **dict.fromkeys(("q_bufs", "o_bufs", "k_bufs", "v_bufs", "q_full", "q_empty", "k_full", "v_full", "t_buf", "t_full",
                     "t_empty"), gl.shared_memory_descriptor),
    **dict.fromkeys(("B", "H", "G", "SQ", "SK", "NM", "section", "scale_log2", "left", "right"), gl.tensor),
    **dict.fromkeys(("D", "DV", "HEAD", "BN", "ST", "LEFT", "RIGHT", "ALIGNED", "WIDE", "RQ", "RK", "DRAW",
                     "ROTATE", "ALIAS", "ALL", "AHEAD", "HALF"), gl.constexpr),
}  # fmt: skip


class _Args:
    """What the partitions share.

    HEAD: the head dim of v; D and DV: those in shared memory. ALIGNED: the diagonal cuts one block of each consumer's.
    WIDE: no block is cut by both sides of the window. RQ, RK: how rows are told: 0 all, 1 by ranges, 2 packed. DRAW:
    tiles from a counter. ALIAS: O leaves through the buffer of Q. ALL: threads at named barriers. AHEAD: each S is
    issued a block earlier. HALF: of the block that the diagonal cuts, the first (1) or the second (2) consumer sees
    only the first half, the other one all.
    """

    __annotations__ = FIELDS

    @gluon.constexpr_function
    def __init__(self, *values):
        for name, value in zip(FIELDS, values, strict=True):
            setattr(self, name, gl.constexpr(value) if FIELDS[name] is gl.constexpr else value)


Args = aggregate(_Args)


@gluon.jit
def _producer(a):
    BN: gl.constexpr = a.BN
    stage = 0
    count = 0
    q_phase = 1  # a fresh "empty" barrier lets a wait for phase 1 pass
    slot = 0
    slot_phase = 1
    tile = gl.program_id(0)
    while tile < a.NM * a.H * a.B:
        m, h, b = tile_of(a, tile)
        i_q, n_q = sequence(a.p_q_rows, b, a.SQ, a.RQ)
        i_k, n_k = sequence(a.p_k_rows, b, a.SK, a.RK)
        first, n = key_blocks(a, m, n_q, n_k)
        if n > 0:
            slot, slot_phase = publish(a, m, h, b, slot, slot_phase)
            if a.RQ == 2:
                b = b * 0
            for j in range(n):
                row = i_k + (first + n - 1 - j) * BN
                if count >= a.ST:
                    bar_sync(FREE + 2 * stage, a.ALL)
                mbarrier.expect(a.k_full.index(stage), BN * a.D * 2)
                tma.async_copy_global_to_shared(a.k_desc, [b, h // a.G, row, 0], a.k_full.index(stage),
                                                a.k_bufs.index(stage))  # fmt: skip
                if j == 0:  # Q behind the first keys, whose buffer is free before the tile before lets go of Q's
                    for g in gl.static_range(2):
                        if a.ALIAS:
                            mbarrier.wait(a.q_empty.index(g), q_phase)
                        elif count > 0:
                            bar_sync(Q_FREE + g, 128 + 32)
                        mbarrier.expect(a.q_full.index(g), 64 * a.D * 2)
                        at = i_q + m * 64 * 2 + g * 64
                        tma.async_copy_global_to_shared(a.q_desc, [b, h, at, 0], a.q_full.index(g), a.q_bufs.index(g))
                if count >= a.ST:
                    bar_sync(FREE + 2 * stage + 1, a.ALL)
                mbarrier.expect(a.v_full.index(stage), BN * a.DV * 2)
                tma.async_copy_global_to_shared(a.v_desc, [b, h // a.G, row, 0], a.v_full.index(stage),
                                                a.v_bufs.index(stage))  # fmt: skip
                count += 1
                stage += 1
                stage = gl.where(stage == a.ST, 0, stage)
            q_phase = q_phase ^ 1
        tile = draw(a, tile)
    publish(a, -1, 0, 0, slot, slot_phase)


@gluon.jit
def _open(a, m, b, stage, phase, q_phase, WG: gl.constexpr, N: gl.constexpr, layout: gl.constexpr):
    """Issue the first S of a tile, with N keys. Returns it and its buffer.

    Past the last tile it is a product of what lies there.
    """
    live = m >= 0
    _, _, _, _, _, n, mine = place(a, m, b, WG)
    if a.RIGHT:  # blocks that these 64 rows cannot see are passed on
        for _ in range(gl.where(live, n - mine, 0)):
            stage, phase = advance(stage, phase, a.ST)
            mbarrier.wait(a.k_full.index(stage), phase)
            bar_arrive(FREE + 2 * stage, a.ALL)
            mbarrier.wait(a.v_full.index(stage), phase)
            bar_arrive(FREE + 2 * stage + 1, a.ALL)
    stage, phase = advance(stage, phase, a.ST)
    mbarrier.wait(a.q_full.index(WG), q_phase, pred=live)
    mbarrier.wait(a.k_full.index(stage), phase, pred=live)
    q = a.q_bufs.index(WG).reshape([64, a.D])
    return product(q, a.k_bufs.index(stage), N, a, layout), stage, phase


@gluon.jit
def _consumer(a, WG: gl.constexpr):
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, a.BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, a.DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = a.k_bufs.dtype
    N: gl.constexpr = a.BN // 2 if a.HALF == WG + 1 else a.BN
    first_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    stage = a.ST - 1
    phase = 1
    q_phase = 0
    m, h, b, slot, slot_phase = fetch(a, 0, 0)
    s_tok, stage, phase = _open(a, m, b, stage, phase, q_phase, WG, N, first_layout)
    s = warpgroup_mma_wait(0, deps=[s_tok])
    while m >= 0:
        i_q, n_q, n_k, row0, first, _, n = place(a, m, b, WG)
        q = a.q_bufs.index(WG).reshape([64, a.D])
        m_i, l_i, o, c, stage, phase = blocks(a, s, q, row0 + n_k - n_q, first, n, n_k, stage, phase, WG,
                                              first_layout, s_layout, o_layout)  # fmt: skip
        if not a.ALIAS:  # the store of the tile before has read the buffer, as all four warps are to know
            tma.store_wait(0)
            warpgroup_barrier()

        # the last P V, and beside it the log-sum-exp
        mbarrier.wait(a.v_full.index(stage), phase)
        p = operand(c, a, p_layout)
        o_tok = warpgroup_mma(p, a.v_bufs.index(stage).reshape([a.BN, a.DV]), o, is_async=True)
        row = b * 0 if a.RQ == 2 else b
        rows = row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
        l_i = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, s_layout))
        seen = (rows < n_q) & (l_i != 0.0)
        lse = gl.where(seen, log_sum_exp(m_i, l_i, a.scale_log2), -float("inf"))
        inverse = gl.convert_layout(gl.where(seen, 1.0 / l_i, 0.0), row_layout)
        o = warpgroup_mma_wait(0, deps=[o_tok])
        bar_arrive(FREE + 2 * stage + 1, a.ALL)
        # not only * 0: a row that saw nothing may have met 0 * inf
        o = gl.where((inverse != 0.0)[:, None], o * inverse[:, None], 0.0).to(dtype)
        if not a.RQ or row0 + 64 <= n_q:
            gl.store(a.p_lse + (row.to(gl.int64) * a.H + h) * a.SQ + i_q + rows, lse, mask=rows < n_q)
            o_buf = a.q_bufs.index(WG) if a.ALIAS else a.o_bufs.index(WG)
            o_buf.reshape([64, a.DV]).store(o)
            fence_async_shared()
            tma.async_copy_shared_to_global(a.o_desc, [row, h, i_q + row0, 0], o_buf)
        else:
            store_rows(a, o, gl.convert_layout(lse, row_layout), row0, i_q, n_q, row, h, o_layout)
        if a.ALIAS:
            tma.store_wait(0)
            mbarrier.arrive(a.q_empty.index(WG), count=1)
        m, h, b, slot, slot_phase = fetch(a, slot, slot_phase)
        q_phase = q_phase ^ 1
        s_tok, stage, phase = _open(a, m, b, stage, phase, q_phase, WG, N, first_layout)
        s = warpgroup_mma_wait(0, deps=[s_tok])
    tma.store_wait(0)


COUNTS = ["B", "H", "G", "SQ", "SK", "NM", "section", "left", "right"]


@gluon.jit(do_not_specialize=COUNTS)
def forward_kernel(q_desc, k_desc, v_desc, o_desc, p_o, p_lse, p_q_rows, p_k_rows, p_counter, B, H, G, SQ, SK, NM,
                   section, scale_log2, left, right, HEAD: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr,
                   LEFT: gl.constexpr, RIGHT: gl.constexpr, ALIGNED: gl.constexpr, WIDE: gl.constexpr,
                   RQ: gl.constexpr, RK: gl.constexpr, DRAW: gl.constexpr, ROTATE: gl.constexpr,
                   ALIAS: gl.constexpr, AHEAD: gl.constexpr, HALF: gl.constexpr):  # fmt: skip
    """p_o, p_q_rows, p_k_rows, p_counter: None where they are not read."""
    p_o = p_lse if p_o is None else p_o
    p_q_rows = p_lse if p_q_rows is None else p_q_rows
    p_k_rows = p_lse if p_k_rows is None else p_k_rows
    p_counter = p_lse if p_counter is None else p_counter
    dtype: gl.constexpr = q_desc.dtype
    D: gl.constexpr = q_desc.block_shape[3]
    DV: gl.constexpr = v_desc.block_shape[3]
    ALL: gl.constexpr = 128 * 2 + 32
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], q_desc.layout)
    o_bufs = q_bufs
    if not ALIAS:
        o_bufs = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, DV], o_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [ST, 1, 1, BN, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [ST, 1, 1, BN, DV], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [ST, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [ST, 1], bar)
    t_buf = gl.allocate_shared_memory(gl.int32, [6, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    t_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    t_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    for i in gl.static_range(2):
        mbarrier.init(t_full.index(i), count=1)
        mbarrier.init(t_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(ST):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    a = Args(q_desc, k_desc, v_desc, o_desc, p_o, p_lse, p_q_rows, p_k_rows, p_counter, q_bufs, o_bufs, k_bufs, v_bufs,
             q_full, q_empty, k_full, v_full, t_buf, t_full, t_empty, B, H, G, SQ, SK, NM, section, scale_log2, left,
             right, D, DV, HEAD, BN, ST, LEFT, RIGHT, ALIGNED, WIDE, RQ, RK, DRAW, ROTATE, ALIAS, ALL, AHEAD,
             HALF)  # fmt: skip
    if RQ:
        gl.warp_specialize([(_consumer, (a, 0)), (_consumer, (a, 1)), (_producer, (a,)), (filler, (a,))],
                           [4, 1, 1], [240, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([(_consumer, (a, 0)), (_consumer, (a, 1)), (_producer, (a,))], [4, 1], [240, 24])
