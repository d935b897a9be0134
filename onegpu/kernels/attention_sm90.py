"""The attention forward for Hopper, in Gluon: compiled with Triton 3.6 and 3.7, elsewhere the portable kernel serves.

A block has two consumers of four warps, 64 query rows each, and one producer warp that issues TMA loads; blocks stay
and draw tiles (128 queries of one head) from a counter. Keys come in blocks of BN, from the last to the first, so that
the blocks with a mask come first and those that only the left side of a window cuts come last. In a step the product
``S = Q K.T`` of this block and ``O += P V`` of the one before are issued together, and the softmax of S runs beside the
second. The accumulator of S and the 16-bit operand P hold the same elements in each thread: nothing moves.

Tiles of padded and packed sequences count from each sequence's first row. Values behind the last key are overwritten
with zeros in shared memory: P is zero there, and 0 * NaN is not.
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

from onegpu.kernels.hopper import (
    LOG2E,
    advance,
    bar_arrive,
    bar_sync,
    clear_rows,
    fetch_next,
    publish_next,
    sequence,
    tile_of,
)

# Named hardware barriers, of which the compiler takes the lowest: 5 + 2 * stage (+ 1 for V), a buffer is free again.
FREE = gl.constexpr(5)

FIELDS = {
    **dict.fromkeys(("q_desc", "k_desc", "v_desc", "o_desc"), tma.tensor_descriptor),
    **dict.fromkeys(("p_o", "p_lse", "p_q_rows", "p_k_rows", "p_counter"), gl.tensor),
    **dict.fromkeys(("q_bufs", "o_bufs", "k_bufs", "v_bufs", "q_full", "q_empty", "k_full", "v_full", "t_buf", "t_full",
                     "t_empty"), gl.shared_memory_descriptor),
    **dict.fromkeys(("B", "H", "G", "SQ", "SK", "NM", "section", "scale_log2", "left", "right"), gl.tensor),
    **dict.fromkeys(("D", "DV", "HEAD", "BN", "ST", "LEFT", "RIGHT", "ALIGNED", "RQ", "RK", "DRAW", "CARRY",
                     "ALIAS"), gl.constexpr),
}  # fmt: skip


class _Args:
    """What the partitions share.

    HEAD: the head dim of v; D and DV: those in shared memory. ALIGNED: the diagonal cuts one block of each consumer's.
    RQ, RK: how rows are told: 0 all, 1 by ranges, 2 packed. DRAW: tiles from a counter. CARRY: P waits in 16 bits.
    ALIAS: O leaves through the buffer of Q.
    """

    __annotations__ = FIELDS

    @gluon.constexpr_function
    def __init__(self, *values):
        for name, value in zip(FIELDS, values, strict=True):
            setattr(self, name, gl.constexpr(value) if FIELDS[name] is gl.constexpr else value)


Args = aggregate(_Args)


@gluon.jit
def key_blocks(a, m, n_q, n_k):
    """(first, number) of the key blocks that query block m walks; at least one where there is a query, else none."""
    BN: gl.constexpr = a.BN
    at = m * 128 + n_k - n_q
    stop = gl.cdiv(n_k, BN)
    if a.RIGHT:
        stop = gl.minimum(stop, gl.cdiv(gl.maximum(at + 128 + a.right, 0), BN))
    stop = gl.maximum(stop, 1)
    first = stop * 0
    if a.LEFT:
        first = gl.minimum(gl.maximum(at - a.left, 0) // BN, stop - 1)
    n = stop - first
    if a.RQ:
        n = gl.where(m * 128 < n_q, n, 0)
    return first, n


@gluon.jit
def _producer(a):
    BN: gl.constexpr = a.BN
    stage = 0
    count = 0
    q_phase = 1  # a fresh "empty" barrier lets a wait for phase 1 pass
    tile = gl.program_id(0)
    slot = 0
    slot_phase = 1
    while tile < a.NM * a.H * a.B:
        m, h, b = tile_of(a, tile)
        i_q, n_q = sequence(a.p_q_rows, b, a.SQ, a.RQ)
        i_k, n_k = sequence(a.p_k_rows, b, a.SK, a.RK)
        first, n = key_blocks(a, m, n_q, n_k)
        if a.RQ == 2:
            b = b * 0
        if n > 0:
            for g in gl.static_range(2):
                mbarrier.wait(a.q_empty.index(g), q_phase)
                mbarrier.expect(a.q_full.index(g), 64 * a.D * 2)
                tma.async_copy_global_to_shared(a.q_desc, [b, h, i_q + m * 128 + g * 64, 0], a.q_full.index(g),
                                                a.q_bufs.index(g))  # fmt: skip
            q_phase ^= 1
            for j in range(n):
                row = i_k + (first + n - 1 - j) * BN
                if count >= a.ST:
                    bar_sync(FREE + 2 * stage, 288)
                mbarrier.expect(a.k_full.index(stage), BN * a.D * 2)
                tma.async_copy_global_to_shared(a.k_desc, [b, h // a.G, row, 0], a.k_full.index(stage),
                                                a.k_bufs.index(stage))  # fmt: skip
                if count >= a.ST:
                    bar_sync(FREE + 2 * stage + 1, 288)
                mbarrier.expect(a.v_full.index(stage), BN * a.DV * 2)
                tma.async_copy_global_to_shared(a.v_desc, [b, h // a.G, row, 0], a.v_full.index(stage),
                                                a.v_bufs.index(stage))  # fmt: skip
                count += 1
                stage += 1
                stage = gl.where(stage == a.ST, 0, stage)
        tile, slot, slot_phase = publish_next(a, tile, slot, slot_phase)


@gluon.jit
def _hide(a, s, at, n0, n_k, layout: gl.constexpr):
    """-inf where the queries at key positions ``at .. at + 63`` do not see the keys from n0 on."""
    cols = n0 + gl.arange(0, a.BN, layout=gl.SliceLayout(0, layout))
    rows = at + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    if a.RIGHT:  # one bound a row for the diagonal and for the last key
        seen = cols[None, :] <= gl.minimum(rows + a.right, n_k - 1)[:, None]
    else:
        seen = (cols < n_k)[None, :]
    if a.LEFT:
        seen = seen & (cols[None, :] >= (rows - a.left)[:, None])
    return gl.where(seen, s, -float("inf"))


@gluon.jit
def _carry(p, a, layout: gl.constexpr):
    """P as it waits for the next step, in float32 or (CARRY) 16 bits; `_operand` makes the product's operand of it."""
    return gl.convert_layout(p.to(a.k_bufs.dtype), layout) if a.CARRY else p


@gluon.jit
def _operand(c, a, layout: gl.constexpr):
    return c if a.CARRY else gl.convert_layout(c.to(a.k_bufs.dtype), layout)


@gluon.jit
def _step(a, q, m_i, l_i, o, c, stage, phase, at, n0, n_k, more, MASK: gl.constexpr, s_layout: gl.constexpr,
          o_layout: gl.constexpr):  # fmt: skip
    """S of the block in the next buffer, O += P V of the block before."""
    BN: gl.constexpr = a.BN
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    before = stage
    before_phase = phase
    stage, phase = advance(stage, phase, a.ST)
    k = a.k_bufs.index(stage).reshape([BN, a.D]).permute([1, 0])
    s_tok = warpgroup_mma(q, k, gl.full([64, BN], 0.0, gl.float32, s_layout), use_acc=False, is_async=True)
    p = _operand(c, a, p_layout)
    mbarrier.wait(a.v_full.index(before), before_phase)
    o_tok = warpgroup_mma(p, a.v_bufs.index(before).reshape([BN, a.DV]), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s_tok])
    bar_arrive(FREE + 2 * stage, 288)
    if MASK:
        s = _hide(a, s, at, n0, n_k, s_layout)
    m_new = gl.maximum(m_i, gl.max(s, 1))
    # The difference before the scaling: fused, the rounding of m * scale does not cancel while m is at its floor.
    alpha = gl.exp2((m_i - m_new) * a.scale_log2)
    p = gl.exp2(s * a.scale_log2 - (m_new * a.scale_log2)[:, None])
    l_i = l_i * alpha + gl.sum(p, 1)
    # The wait for the next K stands here and not at the top: its branch ends a basic block, so that ptxas cannot move
    # the exponentials behind the wait for the product. p and l_i pass through that for the stages before ptxas.
    k_stage, k_phase = advance(stage, phase, a.ST)
    mbarrier.wait(a.k_full.index(k_stage), k_phase, pred=more)
    o, p, l_i = warpgroup_mma_wait(0, deps=[o_tok, p, l_i])
    bar_arrive(FREE + 2 * before + 1, 288)
    o = o * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
    return m_new, l_i, o, _carry(p, a, p_layout), stage, phase


@gluon.jit
def _store_rows(a, o, lse, row0, i_q, n_q, b, h, layout: gl.constexpr):
    """Write 64 rows of the tensor by addresses; a padded row is a ring, whose padding comes after its last real row."""
    rows = row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    at = i_q + rows
    if a.RQ == 1:
        at = gl.where(at >= a.SQ, at - a.SQ, at)
        mine = rows < a.SQ
    else:
        mine = rows < n_q
    cols = gl.arange(0, a.DV, layout=gl.SliceLayout(0, layout))
    bh = b.to(gl.int64) * a.H + h
    gl.store(a.p_lse + bh * a.SQ + at, lse, mask=mine)
    p = a.p_o + ((b.to(gl.int64) * a.SQ + at)[:, None] * a.H + h) * a.HEAD + cols[None, :]
    gl.store(p, o, mask=mine[:, None] & (cols < a.HEAD)[None, :])


@gluon.jit
def _tile(a, m, h, b, stage, phase, q_phase, WG: gl.constexpr):
    """64 queries of a tile. Returns the last buffer and phase."""
    BN: gl.constexpr = a.BN
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, a.DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = a.k_bufs.dtype
    i_q, n_q = sequence(a.p_q_rows, b, a.SQ, a.RQ)
    _, n_k = sequence(a.p_k_rows, b, a.SK, a.RK)
    first, n = key_blocks(a, m, n_q, n_k)
    if a.RQ == 2:
        b = b * 0
    row0 = m * 128 + WG * 64
    if a.RQ and n == 0:  # padding only
        if a.RQ == 1:
            zeros = gl.full([64, a.DV], 0.0, dtype, o_layout)
            _store_rows(a, zeros, gl.full([64], -float("inf"), gl.float32, row_layout), row0, i_q, n_q, b, h, o_layout)
    else:
        at = row0 + n_k - n_q
        if a.RIGHT:
            # blocks that these 64 rows cannot see are passed on
            mine = gl.cdiv(gl.maximum(at + 64 + a.right, 0), BN) - first
            mine = gl.minimum(n, gl.maximum(mine, 1))
            for _ in range(n - mine):
                stage, phase = advance(stage, phase, a.ST)
                mbarrier.wait(a.k_full.index(stage), phase)
                bar_arrive(FREE + 2 * stage, 288)
                mbarrier.wait(a.v_full.index(stage), phase)
                bar_arrive(FREE + 2 * stage + 1, 288)
            n = mine

        # the first block: no P V to run beside
        stage, phase = advance(stage, phase, a.ST)
        n0 = (first + n - 1) * BN
        mbarrier.wait(a.q_full.index(WG), q_phase)
        q = a.q_bufs.index(WG).reshape([64, a.D])
        mbarrier.wait(a.k_full.index(stage), phase)
        k = a.k_bufs.index(stage).reshape([BN, a.D]).permute([1, 0])
        s_tok = warpgroup_mma(q, k, gl.full([64, BN], 0.0, gl.float32, s_layout), use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s_tok])
        bar_arrive(FREE + 2 * stage, 288)
        s = _hide(a, s, at, n0, n_k, s_layout)
        m_i = gl.maximum(gl.max(s, 1), -1.0e30)  # finite where nothing is seen: then P is 0 and not NaN
        p = gl.exp2(s * a.scale_log2 - (m_i * a.scale_log2)[:, None])
        l_i = gl.sum(p, 1)
        c = _carry(p, a, p_layout)
        o = gl.full([64, a.DV], 0.0, gl.float32, o_layout)
        if a.RK and n0 + BN > n_k:
            mbarrier.wait(a.v_full.index(stage), phase)
            clear_rows(a.v_bufs.index(stage).reshape([BN, a.DV]), n_k - n0)
        if n > 1:
            k_stage, k_phase = advance(stage, phase, a.ST)
            mbarrier.wait(a.k_full.index(k_stage), k_phase)

        # blocks that the diagonal cuts, whole blocks, blocks that the left side of the window cuts
        n -= 1
        cut = n * 0
        if a.LEFT:
            whole_from = gl.cdiv(gl.maximum(at + 63 - a.left, 0), BN)
            cut = gl.minimum(gl.maximum(whole_from - first, 0), n)
        if a.RIGHT and not a.ALIGNED:
            whole = gl.maximum(at + a.right + 1, 0) // BN - first
            whole = gl.maximum(gl.minimum(whole, n), cut)
            for j in range(n - whole):
                n0 = (first + n - 1 - j) * BN
                m_i, l_i, o, c, stage, phase = _step(a, q, m_i, l_i, o, c, stage, phase, at, n0, n_k, j + 1 < n, True,
                                                     s_layout, o_layout)  # fmt: skip
            n = whole
        for j in range(n - cut):
            m_i, l_i, o, c, stage, phase = _step(a, q, m_i, l_i, o, c, stage, phase, at, 0, n_k, j + 1 < n, False,
                                                 s_layout, o_layout)  # fmt: skip
        if a.LEFT:
            for j in range(cut):
                n0 = (first + cut - 1 - j) * BN
                m_i, l_i, o, c, stage, phase = _step(a, q, m_i, l_i, o, c, stage, phase, at, n0, n_k, j + 1 < cut, True,
                                                     s_layout, o_layout)  # fmt: skip
        if not a.ALIAS:
            mbarrier.arrive(a.q_empty.index(WG), count=1)

        # the last P V, with the log-sum-exp beside it
        mbarrier.wait(a.v_full.index(stage), phase)
        o_tok = warpgroup_mma(_operand(c, a, p_layout), a.v_bufs.index(stage).reshape([BN, a.DV]), o, is_async=True)
        rows = row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
        seen = (rows < n_q) & (l_i != 0.0)
        lse = gl.where(seen, m_i * (a.scale_log2 / LOG2E) + gl.log(l_i), -float("inf"))
        inverse = gl.convert_layout(gl.where(seen, 1.0 / l_i, 0.0), row_layout)
        tma.store_wait(0)  # the store of the tile before has read the buffer
        o = warpgroup_mma_wait(0, deps=[o_tok])
        bar_arrive(FREE + 2 * stage + 1, 288)
        # not only * 0: a row that saw nothing may have met 0 * inf
        o = gl.where((inverse != 0.0)[:, None], o * inverse[:, None], 0.0).to(dtype)
        if not a.RQ or row0 + 64 <= n_q:
            gl.store(a.p_lse + (b.to(gl.int64) * a.H + h) * a.SQ + i_q + rows, lse, mask=rows < n_q)
            o_buf = a.q_bufs.index(WG) if a.ALIAS else a.o_bufs.index(WG)
            o_buf.reshape([64, a.DV]).store(o)
            fence_async_shared()
            tma.async_copy_shared_to_global(a.o_desc, [b, h, i_q + row0, 0], o_buf)
        else:
            _store_rows(a, o, gl.convert_layout(lse, row_layout), row0, i_q, n_q, b, h, o_layout)
        if a.ALIAS:
            tma.store_wait(0)
            mbarrier.arrive(a.q_empty.index(WG), count=1)
    return stage, phase


@gluon.jit
def _fill_rest(a, WG: gl.constexpr):
    """Zeros in the rows of a packed tensor that belong to no sequence."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, a.DV, 16])
    zeros = gl.full([64, a.DV], 0.0, a.k_bufs.dtype, layout)
    empty = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, layout))
    begin = gl.load(a.p_q_rows)
    end = gl.load(a.p_q_rows + a.B)
    before = gl.cdiv(begin, 64)
    n = before + gl.cdiv(a.SQ - end, 64)
    for i in range(gl.program_id(0) * 2 + WG, n * a.H, gl.num_programs(0) * 2):
        block = i // a.H
        row0 = gl.where(block < before, block * 64, end + (block - before) * 64)
        stop = gl.where(block < before, begin, a.SQ)
        _store_rows(a, zeros, empty, row0, 0, stop, begin * 0, i % a.H, layout)


@gluon.jit
def _consumer(a, WG: gl.constexpr):
    stage = a.ST - 1
    phase = 1
    q_phase = 0
    slot = 0
    slot_phase = 0
    tile = gl.program_id(0)
    while tile < a.NM * a.H * a.B:
        m, h, b = tile_of(a, tile)
        stage, phase = _tile(a, m, h, b, stage, phase, q_phase, WG)
        if a.RQ:  # a tile of padding took no buffer
            _, n_q = sequence(a.p_q_rows, b, a.SQ, a.RQ)
            q_phase = gl.where(m * 128 < n_q, q_phase ^ 1, q_phase)
        else:
            q_phase ^= 1
        tile, slot, slot_phase = fetch_next(a, tile, slot, slot_phase)
    if a.RQ == 2:
        _fill_rest(a, WG)
    tma.store_wait(0)


COUNTS = ["B", "H", "G", "SQ", "SK", "NM", "section", "left", "right"]


@gluon.jit(do_not_specialize=COUNTS)
def forward_kernel(q_desc, k_desc, v_desc, o_desc, p_o, p_lse, p_q_rows, p_k_rows, p_counter, B, H, G, SQ, SK, NM,
                   section, scale_log2, left, right, HEAD: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr,
                   LEFT: gl.constexpr, RIGHT: gl.constexpr, ALIGNED: gl.constexpr, RQ: gl.constexpr, RK: gl.constexpr,
                   DRAW: gl.constexpr, CARRY: gl.constexpr, ALIAS: gl.constexpr):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    D: gl.constexpr = q_desc.block_shape[3]
    DV: gl.constexpr = v_desc.block_shape[3]
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
    t_buf = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    t_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    t_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    for i in gl.static_range(2):
        mbarrier.init(t_full.index(i), count=1)
        mbarrier.init(t_empty.index(i), count=2)
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(ST):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    a = Args(q_desc, k_desc, v_desc, o_desc, p_o, p_lse, p_q_rows, p_k_rows, p_counter, q_bufs, o_bufs, k_bufs, v_bufs,
             q_full, q_empty, k_full, v_full, t_buf, t_full, t_empty, B, H, G, SQ, SK, NM, section, scale_log2, left,
             right, D, DV, HEAD, BN, ST, LEFT, RIGHT, ALIGNED, RQ, RK, DRAW, CARRY, ALIAS)  # fmt: skip
    gl.warp_specialize([(_consumer, (a, 0)), (_consumer, (a, 1)), (_producer, (a,))], [4, 1], [240, 24])
