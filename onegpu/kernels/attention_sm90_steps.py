"""Steps of the Hopper forward over blocks of keys: products, softmax, and what a consumer does with a whole tile."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from onegpu.kernels.attention_sm90_parts import hide, masked
from onegpu.kernels.hopper import LOG2E, advance, bar_arrive, bar_arrive_if, clear_rows

# Named hardware barriers, of which the compiler takes the lowest: FREE + 2 * stage (+ 1 for V), a buffer is free again.
FREE = gl.constexpr(6)
Q_FREE = gl.constexpr(14)  # + the consumer: its buffer of Q is free again; so that there are up to four stages


@gluon.jit
def product(q, k, N: gl.constexpr, a, layout: gl.constexpr):
    """S = Q K.T with the first N keys of the block, issued."""
    k = k.reshape([a.BN, a.D])
    if N != a.BN:
        k = k.slice(0, N)
    return warpgroup_mma(q, k.permute([1, 0]), gl.full([64, N], 0.0, gl.float32, layout), use_acc=False, is_async=True)


@gluon.jit
def _quads(x):
    """[rows, n] as threads hold it: four have a row's columns, each of them pairs that are 8 columns apart."""
    return gl.reshape(x, [x.shape[0], x.shape[1] // 8, 4, 2])


@gluon.jit
def row_maximum(s, layout: gl.constexpr):
    within = gl.max(gl.max(_quads(s), 3), 1)
    return gl.convert_layout(gl.max(within, 1), gl.SliceLayout(1, layout))


@gluon.jit
def row_sums(p):
    """[rows, 4]: of a row, what each of its four threads has. They are added up once a tile."""
    return gl.sum(gl.sum(_quads(p), 3), 1)


@gluon.jit
def exponentials(s, m_i, m_new, l_i, scale_log2):
    """(what O is to be multiplied by, P, row sums) with S of one more block and the row maxima of both."""
    # The difference before the scaling: fused, the rounding of m * scale does not cancel while m is at its floor.
    alpha = gl.exp2((m_i - m_new) * scale_log2)
    p = gl.exp2(s * scale_log2 - (m_new * scale_log2)[:, None])
    return alpha, p, l_i * gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None] + row_sums(p)


@gluon.jit
def log_sum_exp(m_i, l_i, scale_log2):
    """Of rows whose sums are whole. Fused by name: left to the compiler, it is in one kernel and not in another."""
    return gl.fma(m_i, gl.full(m_i.shape, scale_log2 / LOG2E, gl.float32, m_i.type.layout), gl.log(l_i))


@gluon.jit
def _kept(p, a):
    """P as it waits for the next step: in float32.

    AHEAD: two of a thread's columns in one number of 32 bits, since S of the next block has its registers by then. As
    numbers of 16 bits ptxas takes them apart in a loop.
    """
    if not a.AHEAD:
        return p
    low, high = gl.split(gl.reshape(p, [64, a.BN // 2, 2]))
    if a.k_bufs.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32,
                                         is_pure=True, pack=1)  # fmt: skip
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32,
                                         is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def operand(c, a, layout: gl.constexpr):
    """P, as it was kept, as operand of its product."""
    if a.AHEAD:
        low = c.to(gl.int16).to(a.k_bufs.dtype, bitcast=True)
        high = (c >> 16).to(gl.int16).to(a.k_bufs.dtype, bitcast=True)
        c = gl.reshape(gl.join(low, high), [64, a.BN])
    return gl.convert_layout(c.to(a.k_bufs.dtype), layout)


@gluon.jit
def _widened(c, a, layout: gl.constexpr):
    """P of a block of which only the first half is seen, with zeros for the second."""
    if c.shape[1] != a.BN:
        c = gl.reshape(gl.permute(gl.join(c, gl.zeros_like(c)), [0, 2, 1]), [64, a.BN])
    return gl.convert_layout(c, layout)


@gluon.jit
def _step_ahead(a, q, s, m_i, l_i, o, c, stage, phase, left, WG: gl.constexpr, s_layout: gl.constexpr,
                o_layout: gl.constexpr):  # fmt: skip
    """As `_step`, of a block without a mask whose S is there, with that of the next issued; left: how many come after.

    After the last block, that is a product of what lies there. P V follows the row maxima: ptxas puts one that is
    issued with S behind the exponentials.
    """
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    before = stage
    before_phase = phase
    stage, phase = advance(stage, phase, a.ST)
    bar_arrive(FREE + 2 * stage, a.ALL)
    bar_arrive_if(Q_FREE + WG, 128 + 32, left == 0)
    following, following_phase = advance(stage, phase, a.ST)
    t_tok = product(q, a.k_bufs.index(following), a.BN, a, s_layout)
    m_new = gl.maximum(m_i, row_maximum(s, s_layout))
    mbarrier.wait(a.v_full.index(before), before_phase)
    v = a.v_bufs.index(before).reshape([a.BN, a.DV])
    o_tok = warpgroup_mma(operand(c, a, p_layout), v, o, is_async=True)
    alpha, p, l_i = exponentials(s, m_i, m_new, l_i, a.scale_log2)
    k_stage, k_phase = advance(following, following_phase, a.ST)
    mbarrier.wait(a.k_full.index(k_stage), k_phase, pred=left > 1)
    t, o, p, l_i = warpgroup_mma_wait(0, deps=[t_tok, o_tok, p, l_i])
    bar_arrive(FREE + 2 * before + 1, a.ALL)
    o = o * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
    return t, m_new, l_i, o, _kept(p, a), stage, phase


@gluon.jit
def _step(a, q, m_i, l_i, o, c, stage, phase, at, n0, n_k, more, MASK: gl.constexpr, WG: gl.constexpr,
          s_layout: gl.constexpr, o_layout: gl.constexpr):  # fmt: skip
    """S of the block in the next buffer, O += P V of the block before. MASK: see `hide`; more: one comes after."""
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    before = stage
    before_phase = phase
    stage, phase = advance(stage, phase, a.ST)
    s_tok = product(q, a.k_bufs.index(stage), a.BN, a, s_layout)
    p = operand(c, a, p_layout)
    mbarrier.wait(a.v_full.index(before), before_phase)
    o_tok = warpgroup_mma(p, a.v_bufs.index(before).reshape([a.BN, a.DV]), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s_tok])
    bar_arrive(FREE + 2 * stage, a.ALL)
    if not a.ALIAS:
        bar_arrive_if(Q_FREE + WG, 128 + 32, more == 0)
    s = hide(a, s, at, n0, n_k, MASK, s_layout)
    m_new = gl.maximum(m_i, row_maximum(s, s_layout))
    alpha, p, l_i = exponentials(s, m_i, m_new, l_i, a.scale_log2)
    # The wait for the next K stands here and not at the top: its branch ends a basic block, so that ptxas cannot move
    # the exponentials behind the wait for the product. p and l_i pass through that for the stages before ptxas.
    k_stage, k_phase = advance(stage, phase, a.ST)
    mbarrier.wait(a.k_full.index(k_stage), k_phase, pred=more)
    o, p, l_i = warpgroup_mma_wait(0, deps=[o_tok, p, l_i])
    bar_arrive(FREE + 2 * before + 1, a.ALL)
    o = o * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
    return m_new, l_i, o, p, stage, phase


@gluon.jit
def _walk(a, q, m_i, l_i, o, c, stage, phase, at, first, n, n_k, WG: gl.constexpr, s_layout: gl.constexpr,
          o_layout: gl.constexpr):  # fmt: skip
    """Blocks that the diagonal cuts, whole blocks, blocks that the left side of the window cuts: n in all."""
    whole, cut = masked(a, at, first, n)
    if a.RIGHT and not a.ALIGNED:
        for j in range(n - whole):
            n0 = (first + n - 1 - j) * a.BN
            m_i, l_i, o, c, stage, phase = _step(a, q, m_i, l_i, o, c, stage, phase, at, n0, n_k, j + 1 < n,
                                                 1 if a.WIDE or not a.LEFT else 3, WG, s_layout, o_layout)  # fmt: skip
        n = whole
    for j in range(n - cut):
        m_i, l_i, o, c, stage, phase = _step(a, q, m_i, l_i, o, c, stage, phase, at, 0, n_k, j + 1 < n, 0, WG, s_layout,
                                             o_layout)  # fmt: skip
    if a.LEFT:
        for j in range(cut):
            n0 = (first + cut - 1 - j) * a.BN
            m_i, l_i, o, c, stage, phase = _step(a, q, m_i, l_i, o, c, stage, phase, at, n0, n_k, j + 1 < cut,
                                                 2 if a.WIDE else 3, WG, s_layout, o_layout)  # fmt: skip
    return m_i, l_i, o, c, stage, phase


@gluon.jit
def _walk_ahead(a, q, s, m_i, l_i, o, c, stage, phase, n, WG: gl.constexpr, s_layout: gl.constexpr,
                o_layout: gl.constexpr):  # fmt: skip
    """The same with `_step_ahead`, two at a time: the registers of S and of the next one change places."""
    for j in range(n // 2):
        s, m_i, l_i, o, c, stage, phase = _step_ahead(a, q, s, m_i, l_i, o, c, stage, phase, n - 1 - 2 * j, WG,
                                                      s_layout, o_layout)  # fmt: skip
        s, m_i, l_i, o, c, stage, phase = _step_ahead(a, q, s, m_i, l_i, o, c, stage, phase, n - 2 - 2 * j, WG,
                                                      s_layout, o_layout)  # fmt: skip
    for _ in range(n % 2):
        s, m_i, l_i, o, c, stage, phase = _step_ahead(a, q, s, m_i, l_i, o, c, stage, phase, 0, WG, s_layout,
                                                      o_layout)  # fmt: skip
    return m_i, l_i, o, c, stage, phase


@gluon.jit
def blocks(a, s, q, at, first, n, n_k, stage, phase, WG: gl.constexpr, first_layout: gl.constexpr,
           s_layout: gl.constexpr, o_layout: gl.constexpr):  # fmt: skip
    """The softmax of the first block, whose S is there, and all further blocks but for the last product with V."""
    FITS: gl.constexpr = a.ST > 2 and not (a.LEFT or a.RK or a.ALIAS) and (a.ALIGNED or not a.RIGHT)
    gl.static_assert(
        FITS or not a.AHEAD, "AHEAD takes three stages, or it waits forever, and no mask past the first block"
    )
    n0 = (first + n - 1) * a.BN
    bar_arrive(FREE + 2 * stage, a.ALL)
    if not a.ALIAS:
        bar_arrive_if(Q_FREE + WG, 128 + 32, n == 1)
    following, following_phase = advance(stage, phase, a.ST)
    if a.AHEAD:
        mbarrier.wait(a.k_full.index(following), following_phase, pred=n > 1)
        t_tok = product(q, a.k_bufs.index(following), a.BN, a, s_layout)
    s = hide(a, s, at, n0, n_k, 1 if a.WIDE or not a.LEFT else 3, first_layout)
    m_i = gl.maximum(row_maximum(s, first_layout), -1.0e30)  # finite where nothing is seen: then P is 0 and not NaN
    c = _widened(gl.exp2(s * a.scale_log2 - (m_i * a.scale_log2)[:, None]), a, s_layout)
    m_i = gl.convert_layout(m_i, gl.SliceLayout(1, s_layout))
    l_i = row_sums(c)
    o = gl.full([64, a.DV], 0.0, gl.float32, o_layout)
    if a.AHEAD:
        following, following_phase = advance(following, following_phase, a.ST)
        mbarrier.wait(a.k_full.index(following), following_phase, pred=n > 2)
        t, c, l_i = warpgroup_mma_wait(0, deps=[t_tok, c, l_i])
        m_i, l_i, o, c, stage, phase = _walk_ahead(a, q, t, m_i, l_i, o, _kept(c, a), stage, phase, n - 1, WG,
                                                   s_layout, o_layout)  # fmt: skip
    else:
        if a.RK and n0 + a.BN > n_k:
            mbarrier.wait(a.v_full.index(stage), phase)
            clear_rows(a.v_bufs.index(stage).reshape([a.BN, a.DV]), n_k - n0)
        if n > 1:
            mbarrier.wait(a.k_full.index(following), following_phase)
        m_i, l_i, o, c, stage, phase = _walk(a, q, m_i, l_i, o, c, stage, phase, at, first, n - 1, n_k, WG, s_layout,
                                             o_layout)  # fmt: skip
    return m_i, l_i, o, c, stage, phase
