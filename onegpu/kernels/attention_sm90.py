"""The attention forward for Hopper, in Gluon: compiled with Triton 3.6 and 3.7, elsewhere the portable kernel serves.

A block has two consumers of four warps, 64 query rows each, and one producer warp that draws tiles (128 queries of one
head) from a counter, tells the consumers of each and issues TMA loads. Keys come in blocks of BN, from the last to the
first, so that the blocks with a mask come first and those that only the left side of a window cuts come last. In a step
the product ``S = Q K.T`` of this block and ``O += P V`` of the one before are issued together, and the softmax of S
runs beside the second. The accumulator of S and the 16-bit operand P hold the same elements in each thread: nothing
moves.

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
    hide,
    key_blocks,
    masked,
    place,
    publish,
    store_rows,
)
from onegpu.kernels.hopper import LOG2E, advance, bar_arrive, bar_arrive_if, bar_sync, clear_rows, sequence, tile_of, warpgroup_barrier

# Named hardware barriers, of which the compiler takes the lowest: FREE + 2 * stage (+ 1 for V), a buffer is free again.
FREE = gl.constexpr(6)
Q_FREE = gl.constexpr(14)  # + the consumer: its buffer of Q is free again; so that there are up to four stages

_POLY = """{{
.reg .f32 x, t, f, y;
.reg .b32 i;
max.NaN.ftz.f32 x, ${1}, 0fC2FC0000;
add.rn.ftz.f32 t, x, 0f4B400000;
sub.rn.ftz.f32 f, t, 0f4B400000;
sub.rn.ftz.f32 f, x, f;
fma.rn.ftz.f32 y, f, 0f3D61FB50, 0f3E786EE5;
fma.rn.ftz.f32 y, y, f, 0f3F31798D;
fma.rn.ftz.f32 y, y, f, 0f3F7FFB4A;
mov.b32 i, t;
shl.b32 i, i, 23;
add.s32 i, i, 0x3F800000;
mov.b32 t, i;
mul.rn.ftz.f32 ${0}, y, t;
}}
"""
_EXACT = "ex2.approx.ftz.f32 ${0}, ${1};\n"
EXP2S = gl.constexpr("".join((_POLY if i == 7 else _EXACT).format(i, i + 8) for i in range(8)))
EXP2S_4 = gl.constexpr("".join((_POLY if i % 4 == 3 else _EXACT).format(i, i + 8) for i in range(8)))

FIELDS = {
    **dict.fromkeys(("q_desc", "k_desc", "v_desc", "o_desc"), tma.tensor_descriptor),
    **dict.fromkeys(("p_o", "p_lse", "p_q_rows", "p_k_rows", "p_counter"), gl.tensor),
    **dict.fromkeys(("q_bufs", "o_bufs", "k_bufs", "v_bufs", "q_full", "q_empty", "k_full", "v_full", "t_buf", "t_full",
                     "t_empty"), gl.shared_memory_descriptor),
    **dict.fromkeys(("B", "H", "G", "SQ", "SK", "NM", "section", "scale_log2", "left", "right"), gl.tensor),
    **dict.fromkeys(("D", "DV", "HEAD", "BN", "ST", "LEFT", "RIGHT", "ALIGNED", "WIDE", "RQ", "RK", "DRAW",
                     "ROTATE", "ALIAS", "ALL", "AHEAD", "EARLY", "QUADS", "POLY", "HALF"), gl.constexpr),
}  # fmt: skip


class _Args:
    """What the partitions share.

    HEAD: the head dim of v; D and DV: those in shared memory. ALIGNED: the diagonal cuts one block of each consumer's.
    WIDE: no block is cut by both sides of the window. RQ, RK: how rows are told: 0 all, 1 by ranges, 2 packed. DRAW:
    tiles from a counter. ALIAS: O leaves through the buffer of Q. ALL: threads at named barriers.
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
    again = 0
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
                        if a.EARLY:
                            if again > 0:
                                bar_sync(Q_FREE + g, 128 + 32)
                        else:
                            mbarrier.wait(a.q_empty.index(g), q_phase)
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
            again = 1
        tile = draw(a, tile)
    publish(a, -1, 0, 0, slot, slot_phase)


@gluon.jit
def _operand(c, a, layout: gl.constexpr):
    """P, which waits in float32 for the next step, as operand of its product."""
    return gl.convert_layout(c.to(a.k_bufs.dtype), layout)


@gluon.jit
def _quads(x):
    """[64, BN] as a thread holds it: 4 threads have a row's columns in pairs, 8 columns apart."""
    return gl.reshape(x, [64, x.shape[1] // 8, 4, 2])


@gluon.jit
def _maximum(a, s, layout: gl.constexpr):
    if a.QUADS:
        pairs = gl.max(gl.max(_quads(s), 3), 1)
        return gl.convert_layout(gl.max(pairs, 1), gl.SliceLayout(1, layout))
    else:
        return gl.max(s, 1)


@gluon.jit
def _sum(a, p):
    """Of a row; with QUADS the part of each of its four threads, [64, 4]."""
    if a.QUADS:
        return gl.sum(gl.sum(_quads(p), 3), 1)
    else:
        return gl.sum(p, 1)


@gluon.jit
def _scaled(a, l_i, alpha):
    if a.QUADS:
        return l_i * gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None]
    else:
        return l_i * alpha


@gluon.jit
def _product(q, k, N: gl.constexpr, a, layout: gl.constexpr):
    """S = Q K.T with the first N keys of the block, issued."""
    k = k.reshape([a.BN, a.D])
    if N != a.BN:
        k = k.slice(0, N)
    return warpgroup_mma(q, k.permute([1, 0]), gl.full([64, N], 0.0, gl.float32, layout), use_acc=False, is_async=True)


@gluon.jit
def _widened(c, a, layout: gl.constexpr):
    """P of a block of which only the first half is seen, with zeros for the second."""
    if c.shape[1] != a.BN:
        c = gl.reshape(gl.permute(gl.join(c, gl.zeros_like(c)), [0, 2, 1]), [64, a.BN])
    return gl.convert_layout(c, layout)


@gluon.jit
def _packed(p, a):
    """P in 16 bits, two of a thread's columns in one number: as numbers of 16 bits ptxas takes them apart in a loop."""
    low, high = gl.split(gl.reshape(p, [64, a.BN // 2, 2]))
    if a.k_bufs.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32,
                                         is_pure=True, pack=1)  # fmt: skip
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32,
                                         is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def _unpacked(c, a, layout: gl.constexpr):
    low = c.to(gl.int16).to(a.k_bufs.dtype, bitcast=True)
    high = (c >> 16).to(gl.int16).to(a.k_bufs.dtype, bitcast=True)
    return gl.convert_layout(gl.reshape(gl.join(low, high), [64, a.BN]), layout)


@gluon.jit
def _ahead(a, q, s, m_i, l_i, o, c, stage, phase, at, n0, n_k, left, MASK: gl.constexpr, WG: gl.constexpr,
           s_layout: gl.constexpr, o_layout: gl.constexpr):  # fmt: skip
    """As `_step`, with S of this block there already, and that of the next one issued; left: how many come after.

    After the last block that is a product of what lies there.
    """
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    before = stage
    before_phase = phase
    stage, phase = advance(stage, phase, a.ST)
    bar_arrive(FREE + 2 * stage, a.ALL)
    if a.EARLY:
        bar_arrive_if(Q_FREE + WG, 128 + 32, left == 0)
    following, following_phase = advance(stage, phase, a.ST)
    if a.AHEAD == 6:
        mbarrier.wait(a.v_full.index(before), before_phase)
        o_tok = warpgroup_mma(_operand(c, a, p_layout), a.v_bufs.index(before).reshape([a.BN, a.DV]), o, is_async=True)
    t_tok = _product(q, a.k_bufs.index(following), a.BN, a, s_layout)
    if a.AHEAD == 6:  # the branch of this wait ends a basic block, so that ptxas cannot issue S behind the exponentials
        mbarrier.wait(a.v_full.index(before), before_phase)
    if a.AHEAD == 2:
        mbarrier.wait(a.v_full.index(before), before_phase)
        o_tok = warpgroup_mma(_unpacked(c, a, p_layout), a.v_bufs.index(before).reshape([a.BN, a.DV]), o, is_async=True)
    s = hide(a, s, at, n0, n_k, MASK, s_layout)
    m_new = gl.maximum(m_i, _maximum(a, s, s_layout))
    if a.AHEAD == 5:
        mbarrier.wait(a.v_full.index(before), before_phase)
        o_tok = warpgroup_mma(_unpacked(c, a, p_layout), a.v_bufs.index(before).reshape([a.BN, a.DV]), o, is_async=True)
    alpha = gl.exp2((m_i - m_new) * a.scale_log2)
    p = _power(a, s * a.scale_log2 - (m_new * a.scale_log2)[:, None], MASK)
    l_i = _scaled(a, l_i, alpha) + _sum(a, p)
    k_stage, k_phase = advance(following, following_phase, a.ST)
    mbarrier.wait(a.k_full.index(k_stage), k_phase, pred=left > 1)
    t, o, p, l_i = warpgroup_mma_wait(0, deps=[t_tok, o_tok, p, l_i])
    bar_arrive(FREE + 2 * before + 1, a.ALL)
    o = o * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
    if a.AHEAD != 6:
        p = _packed(p, a)
    return t, m_new, l_i, o, p, stage, phase


@gluon.jit
def _power(a, x, MASK: gl.constexpr):
    """exp2; with POLY, the last of each POLY elements of a thread as a polynomial, where x <= 0 is no -inf."""
    if a.POLY and not MASK:
        return gl.inline_asm_elementwise(EXP2S if a.POLY == 8 else EXP2S_4, "=f,=f,=f,=f,=f,=f,=f,=f,f,f,f,f,f,f,f,f",
                                         [x], dtype=gl.float32, is_pure=True, pack=8)  # fmt: skip
    else:
        return gl.exp2(x)


@gluon.jit
def _step(a, q, m_i, l_i, o, c, stage, phase, at, n0, n_k, more, MASK: gl.constexpr, WG: gl.constexpr,
          s_layout: gl.constexpr, o_layout: gl.constexpr):  # fmt: skip
    """S of the block in the next buffer, O += P V of the block before. MASK: see `hide`."""
    BN: gl.constexpr = a.BN
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    before = stage
    before_phase = phase
    stage, phase = advance(stage, phase, a.ST)
    s_tok = _product(q, a.k_bufs.index(stage), BN, a, s_layout)
    p = _operand(c, a, p_layout)
    mbarrier.wait(a.v_full.index(before), before_phase)
    o_tok = warpgroup_mma(p, a.v_bufs.index(before).reshape([BN, a.DV]), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s_tok])
    bar_arrive(FREE + 2 * stage, a.ALL)
    if a.EARLY:
        bar_arrive_if(Q_FREE + WG, 128 + 32, more == 0)
    s = hide(a, s, at, n0, n_k, MASK, s_layout)
    m_new = gl.maximum(m_i, _maximum(a, s, s_layout))
    # The difference before the scaling: fused, the rounding of m * scale does not cancel while m is at its floor.
    alpha = gl.exp2((m_i - m_new) * a.scale_log2)
    p = _power(a, s * a.scale_log2 - (m_new * a.scale_log2)[:, None], MASK)
    l_i = _scaled(a, l_i, alpha) + _sum(a, p)
    # The wait for the next K stands here and not at the top: its branch ends a basic block, so that ptxas cannot move
    # the exponentials behind the wait for the product. p and l_i pass through that for the stages before ptxas.
    k_stage, k_phase = advance(stage, phase, a.ST)
    mbarrier.wait(a.k_full.index(k_stage), k_phase, pred=more)
    o, p, l_i = warpgroup_mma_wait(0, deps=[o_tok, p, l_i])
    bar_arrive(FREE + 2 * before + 1, a.ALL)
    o = o * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
    return m_new, l_i, o, p, stage, phase


@gluon.jit
def _open(a, m, b, stage, phase, q_phase, WG: gl.constexpr, N: gl.constexpr, layout: gl.constexpr):
    """Issue the first S of a tile, with N keys. Returns it and its buffer. Past the last tile it is a product of what lies there."""
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
    return _product(q, a.k_bufs.index(stage), N, a, layout), stage, phase


@gluon.jit
def _blocks(a, s, q, at, first, n, n_k, stage, phase, WG: gl.constexpr, first_layout: gl.constexpr,
            s_layout: gl.constexpr, o_layout: gl.constexpr):  # fmt: skip
    """The softmax of the first block, whose S is there, and all further blocks but for the last product with V."""
    BN: gl.constexpr = a.BN
    BOTH: gl.constexpr = 1 if a.WIDE or not a.LEFT else 3
    n0 = (first + n - 1) * BN
    bar_arrive(FREE + 2 * stage, a.ALL)
    if a.EARLY:
        bar_arrive_if(Q_FREE + WG, 128 + 32, n == 1)
    following, following_phase = advance(stage, phase, a.ST)
    if a.AHEAD:
        if a.RK and n0 + BN > n_k:
            mbarrier.wait(a.v_full.index(stage), phase)
            clear_rows(a.v_bufs.index(stage).reshape([BN, a.DV]), n_k - n0)
        mbarrier.wait(a.k_full.index(following), following_phase, pred=n > 1)
        t_tok = _product(q, a.k_bufs.index(following), BN, a, s_layout)
    s = hide(a, s, at, n0, n_k, BOTH, first_layout)
    m_i = gl.maximum(_maximum(a, s, first_layout), -1.0e30)  # finite where nothing is seen: then P is 0 and not NaN
    c = _widened(gl.exp2(s * a.scale_log2 - (m_i * a.scale_log2)[:, None]), a, s_layout)
    m_i = gl.convert_layout(m_i, gl.SliceLayout(1, s_layout))
    l_i = _sum(a, c)
    o = gl.full([64, a.DV], 0.0, gl.float32, o_layout)
    if a.AHEAD:
        k_stage, k_phase = advance(following, following_phase, a.ST)
        mbarrier.wait(a.k_full.index(k_stage), k_phase, pred=n > 2)
        s, c, l_i = warpgroup_mma_wait(0, deps=[t_tok, c, l_i])
        if a.AHEAD != 6:
            c = _packed(c, a)
    else:
        if a.RK and n0 + BN > n_k:
            mbarrier.wait(a.v_full.index(stage), phase)
            clear_rows(a.v_bufs.index(stage).reshape([BN, a.DV]), n_k - n0)
        if n > 1:
            mbarrier.wait(a.k_full.index(following), following_phase)

    # blocks that the diagonal cuts, whole blocks, blocks that the left side of the window cuts
    n -= 1
    whole, cut = masked(a, at, first, n)
    if a.RIGHT and not a.ALIGNED:
        for j in range(n - whole):
            n0 = (first + n - 1 - j) * BN
            if a.AHEAD:
                s, m_i, l_i, o, c, stage, phase = _ahead(a, q, s, m_i, l_i, o, c, stage, phase, at, n0, n_k,
                                                         n - 1 - j, BOTH, WG, s_layout, o_layout)  # fmt: skip
            else:
                m_i, l_i, o, c, stage, phase = _step(a, q, m_i, l_i, o, c, stage, phase, at, n0, n_k, j + 1 < n, BOTH,
                                                     WG, s_layout, o_layout)  # fmt: skip
        n = whole
    if a.AHEAD > 1:  # two at a time: the registers of S and of the next one change places
        for j in range((n - cut) // 2):
            s, m_i, l_i, o, c, stage, phase = _ahead(a, q, s, m_i, l_i, o, c, stage, phase, at, 0, n_k, n - 1 - 2 * j,
                                                     0, WG, s_layout, o_layout)  # fmt: skip
            s, m_i, l_i, o, c, stage, phase = _ahead(a, q, s, m_i, l_i, o, c, stage, phase, at, 0, n_k, n - 2 - 2 * j,
                                                     0, WG, s_layout, o_layout)  # fmt: skip
        for _ in range((n - cut) % 2):
            s, m_i, l_i, o, c, stage, phase = _ahead(a, q, s, m_i, l_i, o, c, stage, phase, at, 0, n_k, cut, 0, WG,
                                                     s_layout, o_layout)  # fmt: skip
    else:
        for j in range(n - cut):
            if a.AHEAD:
                s, m_i, l_i, o, c, stage, phase = _ahead(a, q, s, m_i, l_i, o, c, stage, phase, at, 0, n_k, n - 1 - j,
                                                         0, WG, s_layout, o_layout)  # fmt: skip
            else:
                m_i, l_i, o, c, stage, phase = _step(a, q, m_i, l_i, o, c, stage, phase, at, 0, n_k, j + 1 < n, 0, WG,
                                                     s_layout, o_layout)  # fmt: skip
    if a.LEFT:
        for j in range(cut):
            n0 = (first + cut - 1 - j) * BN
            if a.AHEAD:
                s, m_i, l_i, o, c, stage, phase = _ahead(a, q, s, m_i, l_i, o, c, stage, phase, at, n0, n_k,
                                                         cut - 1 - j, 2 if a.WIDE else 3, WG, s_layout,
                                                         o_layout)  # fmt: skip
            else:
                m_i, l_i, o, c, stage, phase = _step(a, q, m_i, l_i, o, c, stage, phase, at, n0, n_k, j + 1 < cut,
                                                     2 if a.WIDE else 3, WG, s_layout, o_layout)  # fmt: skip
    return m_i, l_i, o, c, stage, phase


@gluon.jit
def _consumer(a, WG: gl.constexpr):
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, a.BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, a.DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = a.k_bufs.dtype
    # of the block that the diagonal cuts, one consumer sees the first half
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
        m_i, l_i, o, c, stage, phase = _blocks(a, s, q, row0 + n_k - n_q, first, n, n_k, stage, phase, WG,
                                               first_layout, s_layout, o_layout)  # fmt: skip
        if not a.ALIAS:
            tma.store_wait(0)  # the store of the tile before has read the buffer
            if a.EARLY:
                warpgroup_barrier()
            else:
                mbarrier.arrive(a.q_empty.index(WG), count=1)

        # the last P V, and beside it the log-sum-exp
        mbarrier.wait(a.v_full.index(stage), phase)
        if a.AHEAD and a.AHEAD != 6:
            c = _unpacked(c, a, p_layout)
        else:
            c = _operand(c, a, p_layout)
        o_tok = warpgroup_mma(c, a.v_bufs.index(stage).reshape([a.BN, a.DV]), o, is_async=True)
        row = b * 0 if a.RQ == 2 else b
        rows = row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
        if a.QUADS:
            l_i = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, s_layout))
        seen = (rows < n_q) & (l_i != 0.0)
        lse = gl.where(seen, m_i * (a.scale_log2 / LOG2E) + gl.log(l_i), -float("inf"))
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
                   ALIAS: gl.constexpr, AHEAD: gl.constexpr = 0, EARLY: gl.constexpr = 0,
                   QUADS: gl.constexpr = 0, POLY: gl.constexpr = 0,
                   HALF: gl.constexpr = 0):  # fmt: skip
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
             right, D, DV, HEAD, BN, ST, LEFT, RIGHT, ALIGNED, WIDE, RQ, RK, DRAW, ROTATE, ALIAS, ALL, AHEAD, EARLY, QUADS, POLY, HALF)  # fmt: skip
    if RQ:
        gl.warp_specialize([(_consumer, (a, 0)), (_consumer, (a, 1)), (_producer, (a,)), (filler, (a,))],
                           [4, 1, 1], [240, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([(_consumer, (a, 0)), (_consumer, (a, 1)), (_producer, (a,))], [4, 1], [240, 24])
