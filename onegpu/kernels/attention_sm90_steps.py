"""Steps of the Hopper forward over blocks of keys: products, softmax, and what a consumer does with a whole tile."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from onegpu.kernels.attention_sm90_parts import hide, masked
from onegpu.kernels.hopper import advance, bar_arrive, bar_arrive_if, clear_rows

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


@gluon.jit
def operand(c, a, layout: gl.constexpr):
    """P, which waits in float32 for the next step, as operand of its product."""
    return gl.convert_layout(c.to(a.k_bufs.dtype), layout)


@gluon.jit
def quads(x):
    """[64, BN] as a thread holds it: 4 threads have a row's columns in pairs, 8 columns apart."""
    return gl.reshape(x, [64, x.shape[1] // 8, 4, 2])


@gluon.jit
def row_maximum(a, s, layout: gl.constexpr):
    if a.QUADS:
        pairs = gl.max(gl.max(quads(s), 3), 1)
        return gl.convert_layout(gl.max(pairs, 1), gl.SliceLayout(1, layout))
    else:
        return gl.max(s, 1)


@gluon.jit
def row_sum(a, p):
    """Of a row; with QUADS the part of each of its four threads, [64, 4]."""
    if a.QUADS:
        return gl.sum(gl.sum(quads(p), 3), 1)
    else:
        return gl.sum(p, 1)


@gluon.jit
def scaled(a, l_i, alpha):
    if a.QUADS:
        return l_i * gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None]
    else:
        return l_i * alpha


@gluon.jit
def product(q, k, N: gl.constexpr, a, layout: gl.constexpr):
    """S = Q K.T with the first N keys of the block, issued."""
    k = k.reshape([a.BN, a.D])
    if N != a.BN:
        k = k.slice(0, N)
    return warpgroup_mma(q, k.permute([1, 0]), gl.full([64, N], 0.0, gl.float32, layout), use_acc=False, is_async=True)


@gluon.jit
def widened(c, a, layout: gl.constexpr):
    """P of a block of which only the first half is seen, with zeros for the second."""
    if c.shape[1] != a.BN:
        c = gl.reshape(gl.permute(gl.join(c, gl.zeros_like(c)), [0, 2, 1]), [64, a.BN])
    return gl.convert_layout(c, layout)


@gluon.jit
def packed(p, a):
    """P in 16 bits, two of a thread's columns in one number: as numbers of 16 bits ptxas takes them apart in a loop."""
    low, high = gl.split(gl.reshape(p, [64, a.BN // 2, 2]))
    if a.k_bufs.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32,
                                         is_pure=True, pack=1)  # fmt: skip
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32,
                                         is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def unpacked(c, a, layout: gl.constexpr):
    low = c.to(gl.int16).to(a.k_bufs.dtype, bitcast=True)
    high = (c >> 16).to(gl.int16).to(a.k_bufs.dtype, bitcast=True)
    return gl.convert_layout(gl.reshape(gl.join(low, high), [64, a.BN]), layout)


@gluon.jit
def step_ahead(a, q, s, m_i, l_i, o, c, stage, phase, at, n0, n_k, left, MASK: gl.constexpr, WG: gl.constexpr,
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
    t_tok = product(q, a.k_bufs.index(following), a.BN, a, s_layout)
    if a.AHEAD == 2:
        mbarrier.wait(a.v_full.index(before), before_phase)
        o_tok = warpgroup_mma(unpacked(c, a, p_layout), a.v_bufs.index(before).reshape([a.BN, a.DV]), o, is_async=True)
    s = hide(a, s, at, n0, n_k, MASK, s_layout)
    m_new = gl.maximum(m_i, row_maximum(a, s, s_layout))
    if a.AHEAD == 5:
        mbarrier.wait(a.v_full.index(before), before_phase)
        o_tok = warpgroup_mma(unpacked(c, a, p_layout), a.v_bufs.index(before).reshape([a.BN, a.DV]), o, is_async=True)
    alpha = gl.exp2((m_i - m_new) * a.scale_log2)
    p = power(a, s * a.scale_log2 - (m_new * a.scale_log2)[:, None], MASK)
    l_i = scaled(a, l_i, alpha) + row_sum(a, p)
    k_stage, k_phase = advance(following, following_phase, a.ST)
    mbarrier.wait(a.k_full.index(k_stage), k_phase, pred=left > 1)
    t, o, p, l_i = warpgroup_mma_wait(0, deps=[t_tok, o_tok, p, l_i])
    bar_arrive(FREE + 2 * before + 1, a.ALL)
    o = o * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
    return t, m_new, l_i, o, packed(p, a), stage, phase


@gluon.jit
def power(a, x, MASK: gl.constexpr):
    """exp2; with POLY, the last of each POLY elements of a thread as a polynomial, where x <= 0 is no -inf."""
    if a.POLY and not MASK:
        return gl.inline_asm_elementwise(EXP2S if a.POLY == 8 else EXP2S_4, "=f,=f,=f,=f,=f,=f,=f,=f,f,f,f,f,f,f,f,f",
                                         [x], dtype=gl.float32, is_pure=True, pack=8)  # fmt: skip
    else:
        return gl.exp2(x)


@gluon.jit
def step(a, q, m_i, l_i, o, c, stage, phase, at, n0, n_k, more, MASK: gl.constexpr, WG: gl.constexpr,
          s_layout: gl.constexpr, o_layout: gl.constexpr):  # fmt: skip
    """S of the block in the next buffer, O += P V of the block before. MASK: see `hide`."""
    BN: gl.constexpr = a.BN
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    before = stage
    before_phase = phase
    stage, phase = advance(stage, phase, a.ST)
    s_tok = product(q, a.k_bufs.index(stage), BN, a, s_layout)
    p = operand(c, a, p_layout)
    mbarrier.wait(a.v_full.index(before), before_phase)
    o_tok = warpgroup_mma(p, a.v_bufs.index(before).reshape([BN, a.DV]), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s_tok])
    bar_arrive(FREE + 2 * stage, a.ALL)
    if a.EARLY:
        bar_arrive_if(Q_FREE + WG, 128 + 32, more == 0)
    s = hide(a, s, at, n0, n_k, MASK, s_layout)
    m_new = gl.maximum(m_i, row_maximum(a, s, s_layout))
    # The difference before the scaling: fused, the rounding of m * scale does not cancel while m is at its floor.
    alpha = gl.exp2((m_i - m_new) * a.scale_log2)
    p = power(a, s * a.scale_log2 - (m_new * a.scale_log2)[:, None], MASK)
    l_i = scaled(a, l_i, alpha) + row_sum(a, p)
    # The wait for the next K stands here and not at the top: its branch ends a basic block, so that ptxas cannot move
    # the exponentials behind the wait for the product. p and l_i pass through that for the stages before ptxas.
    k_stage, k_phase = advance(stage, phase, a.ST)
    mbarrier.wait(a.k_full.index(k_stage), k_phase, pred=more)
    o, p, l_i = warpgroup_mma_wait(0, deps=[o_tok, p, l_i])
    bar_arrive(FREE + 2 * before + 1, a.ALL)
    o = o * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
    return m_new, l_i, o, p, stage, phase


@gluon.jit
def blocks(a, s, q, at, first, n, n_k, stage, phase, WG: gl.constexpr, first_layout: gl.constexpr,
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
        t_tok = product(q, a.k_bufs.index(following), BN, a, s_layout)
    s = hide(a, s, at, n0, n_k, BOTH, first_layout)
    m_i = gl.maximum(row_maximum(a, s, first_layout), -1.0e30)  # finite where nothing is seen: then P is 0 and not NaN
    c = widened(gl.exp2(s * a.scale_log2 - (m_i * a.scale_log2)[:, None]), a, s_layout)
    m_i = gl.convert_layout(m_i, gl.SliceLayout(1, s_layout))
    l_i = row_sum(a, c)
    o = gl.full([64, a.DV], 0.0, gl.float32, o_layout)
    if a.AHEAD:
        k_stage, k_phase = advance(following, following_phase, a.ST)
        mbarrier.wait(a.k_full.index(k_stage), k_phase, pred=n > 2)
        s, c, l_i = warpgroup_mma_wait(0, deps=[t_tok, c, l_i])
        c = packed(c, a)
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
                s, m_i, l_i, o, c, stage, phase = step_ahead(a, q, s, m_i, l_i, o, c, stage, phase, at, n0, n_k,
                                                         n - 1 - j, BOTH, WG, s_layout, o_layout)  # fmt: skip
            else:
                m_i, l_i, o, c, stage, phase = step(a, q, m_i, l_i, o, c, stage, phase, at, n0, n_k, j + 1 < n, BOTH,
                                                     WG, s_layout, o_layout)  # fmt: skip
        n = whole
    if a.AHEAD > 1:  # two at a time: the registers of S and of the next one change places
        for j in range((n - cut) // 2):
            s, m_i, l_i, o, c, stage, phase = step_ahead(a, q, s, m_i, l_i, o, c, stage, phase, at, 0, n_k, n - 1 - 2 * j,
                                                     0, WG, s_layout, o_layout)  # fmt: skip
            s, m_i, l_i, o, c, stage, phase = step_ahead(a, q, s, m_i, l_i, o, c, stage, phase, at, 0, n_k, n - 2 - 2 * j,
                                                     0, WG, s_layout, o_layout)  # fmt: skip
        for _ in range((n - cut) % 2):
            s, m_i, l_i, o, c, stage, phase = step_ahead(a, q, s, m_i, l_i, o, c, stage, phase, at, 0, n_k, cut, 0, WG,
                                                     s_layout, o_layout)  # fmt: skip
    else:
        for j in range(n - cut):
            if a.AHEAD:
                s, m_i, l_i, o, c, stage, phase = step_ahead(a, q, s, m_i, l_i, o, c, stage, phase, at, 0, n_k, n - 1 - j,
                                                         0, WG, s_layout, o_layout)  # fmt: skip
            else:
                m_i, l_i, o, c, stage, phase = step(a, q, m_i, l_i, o, c, stage, phase, at, 0, n_k, j + 1 < n, 0, WG,
                                                     s_layout, o_layout)  # fmt: skip
    if a.LEFT:
        for j in range(cut):
            n0 = (first + cut - 1 - j) * BN
            if a.AHEAD:
                s, m_i, l_i, o, c, stage, phase = step_ahead(a, q, s, m_i, l_i, o, c, stage, phase, at, n0, n_k,
                                                         cut - 1 - j, 2 if a.WIDE else 3, WG, s_layout,
                                                         o_layout)  # fmt: skip
            else:
                m_i, l_i, o, c, stage, phase = step(a, q, m_i, l_i, o, c, stage, phase, at, n0, n_k, j + 1 < cut,
                                                     2 if a.WIDE else 3, WG, s_layout, o_layout)  # fmt: skip
    return m_i, l_i, o, c, stage, phase
