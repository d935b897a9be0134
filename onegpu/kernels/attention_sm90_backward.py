"""The attention backward for Hopper, in Gluon: compiled with Triton 3.6 and 3.7, elsewhere the portable kernels serve.

A tile is 128 keys of one key head; the loop walks the queries that see them, M at a time, of every head that shares
them. Two consumers of four warps hold 64 keys each, one producer warp issues TMA loads. A step, all scores transposed
(keys by queries): ``S.T = K Q.T`` and ``dP.T = V dO.T`` from shared memory, ``P.T = exp2(scale * S.T - lse)``,
``dS.T = P.T (dP.T - delta)``, then ``dV += P.T dO`` and ``dK += dS.T Q`` with the first operand in registers. dS.T goes
to shared memory too, and the consumers make a 64 x 64 tile each of ``dQ = dS K`` over all 128 keys: halves of D for
D = 128 (M = 64), halves of the queries for D = 64 (M = 128).

dQ is added up in float32 in memory, so its last bits differ from run to run, unless ORDER has the tiles take turns at
each query block, the last keys first: under a causal mask every tile then begins where its turn has come. dK and dV are
the same on every run.
Rows of Q and dO behind the last query, and of K and V behind the last key, are overwritten with zeros in shared memory.
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
    advance,
    bar_arrive,
    bar_sync,
    clear_rows,
    fetch_next,
    first_block,
    key_tile_of,
    pass_turn,
    publish_next,
    query_blocks,
    sequence,
    tma_add,
    turn_of,
    wait_turn,
    whole_blocks,
)

# Named hardware barriers; the compiler takes the lowest.
FREE = gl.constexpr(5)  # + stage: a buffer of Q and dO is free again
READY = gl.constexpr(8)  # + 2 * consumer + parity: a consumer's dS is in shared memory
ADDED = gl.constexpr(12)  # + consumer: what it added to dQ is in memory
NOBODY = gl.constexpr(1)  # behind p_counter: the tile counter, what nobody waits for, each 64 x 64 tile of dQ's turns

FIELDS = {
    **dict.fromkeys(("q_desc", "k_desc", "v_desc", "do_desc", "dk_desc", "dv_desc", "rows_desc", "sum_desc"),
                    tma.tensor_descriptor),
    **dict.fromkeys(("p_dk", "p_dv", "p_q_rows", "p_k_rows", "p_counter"), gl.tensor),
    **dict.fromkeys(("q_bufs", "do_bufs", "row_bufs", "k_bufs", "v_bufs", "ds_bufs", "out_bufs", "q_full", "do_full",
                     "k_full", "v_full", "kv_empty", "t_buf", "t_full", "t_empty"), gl.shared_memory_descriptor),
    **dict.fromkeys(("B", "H", "HK", "SQ", "SK", "NB", "NN", "section", "scale", "scale_log2", "left", "right"),
                    gl.tensor),
    **dict.fromkeys(("M", "D", "HEAD", "HEAD_V", "ST", "LEFT", "RIGHT", "EVEN", "RQ", "RK", "DRAW", "LOADERS",
                     "SPLIT", "ORDER"), gl.constexpr),
}  # fmt: skip


class _Args:
    """What the partitions share.

    NB: blocks of M queries that a head has in the scratch memory. NN: tiles of a head. HEAD and HEAD_V: the real head
    dims, D the one in shared memory. EVEN: every tile has 128 keys. RQ, RK: how rows are told: 0 all, 1 by ranges, 2
    packed. DRAW: tiles from a counter, 2 the first too. LOADERS: threads of the producer. SPLIT: query blocks with a
    mask have a loop of their own, which ORDER has no use for. ORDER: dQ is added in one order.
    """

    __annotations__ = FIELDS

    @gluon.constexpr_function
    def __init__(self, *values):
        for name, value in zip(FIELDS, values, strict=True):
            setattr(self, name, gl.constexpr(value) if FIELDS[name] is gl.constexpr else value)


Args = aggregate(_Args)


@gluon.jit
def _add_dq(a, dq, block, turn, last, WG: gl.constexpr):
    """Add this consumer's 64 x 64 tile of dQ to the sum. last: where the turn is counted."""
    tma.store_wait(0)  # what went out before has left the buffer
    buf = a.out_bufs._reinterpret(gl.float32, [2, 64, 64], a.sum_desc.layout).index(WG)
    buf.store(dq)
    fence_async_shared()
    row = block * 64 if a.D == 128 else block * 128 + WG * 64
    column: gl.constexpr = WG * 64 if a.D == 128 else 0
    if a.ORDER:
        wait_turn(a.p_counter + last, turn)
    tma_add(a.sum_desc, [row, column], buf)


@gluon.jit
def _producer(a):
    M: gl.constexpr = a.M
    D: gl.constexpr = a.D
    stage = 0
    count = 0
    kv_phase = 1  # a fresh "empty" barrier lets a wait for phase 1 pass
    slot = 0
    slot_phase = 1
    tile = gl.program_id(0)
    if a.DRAW == 2:
        tile, slot, slot_phase = publish_next(a, tile, slot, slot_phase)
    while tile < a.NN * a.HK * a.B:
        n, hk, b = key_tile_of(a, tile)
        i_q, n_q = sequence(a.p_q_rows, b, a.SQ, a.RQ)
        i_k, n_k = sequence(a.p_k_rows, b, a.SK, a.RK)
        first, stop = query_blocks(a, n, n_q, n_k)
        row = gl.where(a.RQ == 2, 0, b)  # of the tensors
        group = a.H // a.HK
        h = hk * group
        m = first
        steps = (stop - first) * group
        for t in range(steps):
            if count >= a.ST:
                bar_sync(FREE + stage, 256 + a.LOADERS)
            mbarrier.expect(a.q_full.index(stage), M * D * 2 + M * 8)
            tma.async_copy_global_to_shared(a.q_desc, [row, h, i_q + m * M, 0], a.q_full.index(stage),
                                            a.q_bufs.index(stage))  # fmt: skip
            tma.async_copy_global_to_shared(a.rows_desc, [first_block(a, b, h, i_q) + m, 0], a.q_full.index(stage),
                                            a.row_bufs.index(stage))  # fmt: skip
            if t == 0:
                mbarrier.wait(a.kv_empty.index(0), kv_phase)
                mbarrier.expect(a.k_full.index(0), 128 * D * 2)
                for w in gl.static_range(2):
                    tma.async_copy_global_to_shared(a.k_desc, [row, hk, i_k + n * 128 + w * 64, 0], a.k_full.index(0),
                                                    a.k_bufs.index(w))  # fmt: skip
            mbarrier.expect(a.do_full.index(stage), M * D * 2)
            tma.async_copy_global_to_shared(a.do_desc, [row, h, i_q + m * M, 0], a.do_full.index(stage),
                                            a.do_bufs.index(stage))  # fmt: skip
            if t == 0:
                mbarrier.expect(a.v_full.index(0), 128 * D * 2)
                for w in gl.static_range(2):
                    tma.async_copy_global_to_shared(a.v_desc, [row, hk, i_k + n * 128 + w * 64, 0], a.v_full.index(0),
                                                    a.v_bufs.index(w))  # fmt: skip
            count += 1
            stage += 1
            stage = gl.where(stage == a.ST, 0, stage)
            m += 1
            h = gl.where(m == stop, h + 1, h)
            m = gl.where(m == stop, first, m)
        kv_phase = gl.where(steps > 0, kv_phase ^ 1, kv_phase)
        tile, slot, slot_phase = publish_next(a, tile, slot, slot_phase)


@gluon.jit
def _hide(a, p, row0, at, n_k, layout: gl.constexpr):
    """Zeros in P.T where the queries at key positions ``at .. at + M - 1`` do not see the keys from row0 on."""
    rows = row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    queries = at + gl.arange(0, a.M, layout=gl.SliceLayout(0, layout))
    if a.RIGHT:
        seen = rows[:, None] <= gl.minimum(queries + a.right, n_k - 1)[None, :]
    else:
        seen = (rows < n_k)[:, None]
    if a.LEFT:
        seen = seen & (rows[:, None] >= (queries - a.left)[None, :])
    return gl.where(seen, p, 0.0)


@gluon.jit
def _issue_dq(a, buf, WG: gl.constexpr):
    """Start this consumer's 64 x 64 tile of dQ = dS K, over both consumers' keys."""
    M: gl.constexpr = a.M
    D: gl.constexpr = a.D
    dtype: gl.constexpr = a.k_bufs.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    swizzle: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    PART_M: gl.constexpr = WG if M == 128 else 0
    PART_D: gl.constexpr = WG if D == 128 else 0
    # K and dS as 64 x 64 pieces: the 128-byte swizzle splits wider ones by columns
    k_part = a.k_bufs._reinterpret(dtype, [2 * (D // 64), 64, 64], swizzle)
    ds_part = a.ds_bufs._reinterpret(dtype, [4 * (M // 64), 64, 64], swizzle)
    token = gl.full([64, 64], 0.0, gl.float32, layout)
    for w in gl.static_range(2):
        ds = ds_part.index((buf * 2 + w) * (M // 64) + PART_M).permute([1, 0])
        token = warpgroup_mma(ds, k_part.index(w * (D // 64) + PART_D), token, use_acc=w > 0, is_async=True)
    return token


@gluon.jit
def _step(a, dk, dv, last, stage, phase, buf, kv_phase, is_first, row0, block, m, n_q, n_k, MASK: gl.constexpr,
          WG: gl.constexpr):  # fmt: skip
    """Query block m: dk and dv [64, D] get their share, dQ goes to memory.

    last: where the turn of the step before is counted. is_first: V may still be on its way. MASK: 0 no block needs
    one, 1 this one does, 2 it is to be seen.
    """
    M: gl.constexpr = a.M
    D: gl.constexpr = a.D
    dtype: gl.constexpr = a.k_bufs.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, kv_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    values = a.row_bufs._reinterpret(gl.float32, [a.ST * 2, M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k = a.k_bufs.index(WG).reshape([64, D])
    v = a.v_bufs.index(WG).reshape([64, D])
    q = a.q_bufs.index(stage).reshape([M, D])
    do = a.do_bufs.index(stage).reshape([M, D])
    zero = gl.full([64, M], 0.0, gl.float32, s_layout)

    mbarrier.wait(a.q_full.index(stage), phase)
    if a.RQ and m * M + M > n_q:
        clear_rows(q, n_q - m * M)
        mbarrier.wait(a.do_full.index(stage), phase)
        clear_rows(do, n_q - m * M)
    s_tok = warpgroup_mma(k, q.permute([1, 0]), zero, use_acc=False, is_async=True)
    mbarrier.wait(a.v_full.index(0), kv_phase, pred=is_first)
    mbarrier.wait(a.do_full.index(stage), phase)
    dp_tok = warpgroup_mma(v, do.permute([1, 0]), zero, use_acc=False, is_async=True)
    lse = values.index(2 * stage).load(row_layout)
    s = warpgroup_mma_wait(1, deps=[s_tok])
    p = gl.exp2(s * a.scale_log2 - lse[None, :])
    at = m * M + n_k - n_q
    if MASK == 1:
        p = _hide(a, p, row0, at, n_k, s_layout)
    elif MASK == 2:
        edge = row0 + 64 > n_k  # keys past the end would give P = exp(-lse)
        if a.RIGHT:
            edge = edge | (at + a.right < row0 + 63)
        if a.LEFT:
            edge = edge | (at + M - 1 - a.left > row0)
        if edge:
            p = _hide(a, p, row0, at, n_k, s_layout)
    delta = values.index(2 * stage + 1).load(row_layout)
    # dS before dV: P in float32 and in 16 bits are not alive at the same time
    dp, p = warpgroup_mma_wait(0, deps=[dp_tok, p])
    ds = (p * (dp - delta[None, :])).to(dtype)
    dv_tok = warpgroup_mma(gl.convert_layout(p.to(dtype), p_layout), do, dv, is_async=True)
    # The buffer was read two steps ago, by both consumers: each signs off its dS after it has ended the step before.
    a.ds_bufs.index(buf * 2 + WG).store(ds)
    fence_async_shared()
    bar_arrive(READY + 2 * WG + buf, 256)
    dk_tok = warpgroup_mma(gl.convert_layout(ds, p_layout), q, dk, is_async=True)
    if a.ORDER:
        pass_turn(a.p_counter, last, row0, ADDED + WG)  # of the step before, which has had time to arrive
    bar_sync(READY + 2 * (1 - WG) + buf, 256)
    dq_tok = _issue_dq(a, buf, WG)
    dk, dv, dq = warpgroup_mma_wait(0, deps=[dk_tok, dv_tok, dq_tok])
    bar_arrive(FREE + stage, 256 + a.LOADERS)
    turn = m
    if a.ORDER:
        turn = turn_of(a, m, row0, n_q, n_k)
        last = NOBODY + 1 + (block + m) * 2 + WG
    _add_dq(a, dq, block + m, turn, last, WG)
    return dk, dv, last


@gluon.jit
def _store(a, desc, p, x, b, hk, row0, i_k, n_k, HEAD: gl.constexpr, WG: gl.constexpr):
    """Write a [64, D] tile of dK or dV; a padded row is a ring, whose padding comes after its last real row."""
    if not a.RK or row0 + 64 <= n_k:
        tma.store_wait(0)  # the store before has read the buffer
        buf = a.out_bufs.index(WG * (128 // a.D))
        buf.reshape([64, a.D]).store(x)
        fence_async_shared()
        tma.async_copy_shared_to_global(desc, [b, hk, i_k + row0, 0], buf)
    else:
        layout: gl.constexpr = x.type.layout
        rows = row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        cols = gl.arange(0, a.D, layout=gl.SliceLayout(0, layout))
        at = i_k + rows
        if a.RK == 1:
            at = gl.where(at >= a.SK, at - a.SK, at)
            mine = rows < a.SK
        else:
            mine = rows < n_k
        o = ((b.to(gl.int64) * a.SK + at)[:, None] * a.HK + hk) * HEAD + cols[None, :]
        x = gl.where((rows < n_k)[:, None], x, 0.0)
        gl.store(p + o, x, mask=mine[:, None] & (cols < HEAD)[None, :])


@gluon.jit
def _consumer(a, WG: gl.constexpr):
    D: gl.constexpr = a.D
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dtype: gl.constexpr = a.k_bufs.dtype
    stage = 0
    phase = 0
    kv_phase = 0
    buf = 0
    slot = 0
    slot_phase = 0
    tile = gl.program_id(0)
    if a.DRAW == 2:
        tile, slot, slot_phase = fetch_next(a, tile, slot, slot_phase)
    while tile < a.NN * a.HK * a.B:
        n, hk, b = key_tile_of(a, tile)
        i_q, n_q = sequence(a.p_q_rows, b, a.SQ, a.RQ)
        i_k, n_k = sequence(a.p_k_rows, b, a.SK, a.RK)
        first, stop = query_blocks(a, n, n_q, n_k)
        group = a.H // a.HK
        row0 = n * 128 + WG * 64
        dk = gl.full([64, D], 0.0, gl.float32, kv_layout)
        dv = gl.full([64, D], 0.0, gl.float32, kv_layout)
        steps = (stop - first) * group
        last = n * 0 + NOBODY
        mbarrier.wait(a.k_full.index(0), kv_phase, pred=steps > 0)
        if a.RK and steps > 0 and row0 + 64 > n_k:
            clear_rows(a.k_bufs.index(WG).reshape([64, D]), n_k - row0)
            mbarrier.wait(a.v_full.index(0), kv_phase)
            clear_rows(a.v_bufs.index(WG).reshape([64, D]), n_k - row0)
        if a.SPLIT:
            gl.static_assert(not a.ORDER)
            whole, end = whole_blocks(a, n, n_q, n_k, first, stop)
            mbarrier.wait(a.v_full.index(0), kv_phase, pred=steps > 0)
            for h in range(hk * group, hk * group + group):
                block = first_block(a, b, h, i_q)
                for part in gl.static_range(3):
                    lo = first if part == 0 else whole if part == 1 else end
                    hi = whole if part == 0 else end if part == 1 else stop
                    if part == 1 or a.LEFT or not a.EVEN or (a.RIGHT and part == 0):
                        for m in range(lo, hi):
                            dk, dv, _ = _step(a, dk, dv, last, stage, phase, buf, kv_phase, False, row0, block, m,
                                              n_q, n_k, 1 - part % 2, WG)  # fmt: skip
                            stage, phase = advance(stage, phase, a.ST)
                            buf ^= 1
        else:
            MASK: gl.constexpr = 2 if a.RIGHT or a.LEFT or not a.EVEN else 0
            h = hk * group
            m = first
            for t in range(steps):
                block = first_block(a, b, h, i_q)
                dk, dv, last = _step(a, dk, dv, last, stage, phase, buf, kv_phase, t == 0, row0, block, m, n_q, n_k,
                                     MASK, WG)  # fmt: skip
                stage, phase = advance(stage, phase, a.ST)
                buf ^= 1
                m += 1
                h = gl.where(m == stop, h + 1, h)
                m = gl.where(m == stop, first, m)
        if a.ORDER:
            pass_turn(a.p_counter, last, row0, ADDED + WG)
        if steps > 0:
            mbarrier.arrive(a.kv_empty.index(0), count=1)
        kv_phase = gl.where(steps > 0, kv_phase ^ 1, kv_phase)
        row = gl.where(a.RQ == 2, 0, b)
        if a.RK != 2 or row0 < n_k:
            _store(a, a.dv_desc, a.p_dv, dv.to(dtype), row, hk, row0, i_k, n_k, a.HEAD_V, WG)
            _store(a, a.dk_desc, a.p_dk, (dk * a.scale).to(dtype), row, hk, row0, i_k, n_k, a.HEAD, WG)
        tile, slot, slot_phase = fetch_next(a, tile, slot, slot_phase)
    tma.store_wait(0)


COUNTS = ["B", "H", "HK", "SQ", "SK", "NB", "NN", "section", "left", "right"]


@gluon.jit(do_not_specialize=COUNTS)
def backward_kernel(q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, rows_desc, sum_desc, p_dk, p_dv,
                    p_q_rows, p_k_rows, p_counter, B, H, HK, SQ, SK, NB, NN, section, scale, scale_log2, left, right,
                    HEAD: gl.constexpr, HEAD_V: gl.constexpr, ST: gl.constexpr, LEFT: gl.constexpr,
                    RIGHT: gl.constexpr, EVEN: gl.constexpr, RQ: gl.constexpr, RK: gl.constexpr, DRAW: gl.constexpr,
                    SWAP: gl.constexpr, SPLIT: gl.constexpr, ORDER: gl.constexpr):  # fmt: skip
    """SWAP: the four warps of the default partition load; the consumers spill less then, and three warps idle."""
    dtype: gl.constexpr = q_desc.dtype
    M: gl.constexpr = q_desc.block_shape[2]
    D: gl.constexpr = q_desc.block_shape[3]
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(dtype, [ST, 1, 1, M, D], q_desc.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [ST, 1, 1, M, D], do_desc.layout)
    row_bufs = gl.allocate_shared_memory(gl.float32, [ST, 1, 2 * M], rows_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], v_desc.layout)
    ds_bufs = gl.allocate_shared_memory(dtype, [4, 64, M], gl.NVMMASharedLayout(128, 16, rank=2))
    out_bufs = gl.allocate_shared_memory(dtype, [256 // D, 1, 1, 64, D], dk_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [ST, 1], bar)
    do_full = gl.allocate_shared_memory(gl.int64, [ST, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [1, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [1, 1], bar)
    kv_empty = gl.allocate_shared_memory(gl.int64, [1, 1], bar)
    t_buf = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    t_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    t_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    for i in gl.static_range(2):
        mbarrier.init(t_full.index(i), count=1)
        mbarrier.init(t_empty.index(i), count=2)
    for i in gl.static_range(ST):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
    mbarrier.init(k_full.index(0), count=1)
    mbarrier.init(v_full.index(0), count=1)
    mbarrier.init(kv_empty.index(0), count=2)
    fence_async_shared()
    a = Args(q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, rows_desc, sum_desc, p_dk, p_dv, p_q_rows, p_k_rows,
             p_counter, q_bufs, do_bufs, row_bufs, k_bufs, v_bufs, ds_bufs, out_bufs, q_full, do_full, k_full, v_full,
             kv_empty, t_buf, t_full, t_empty, B, H, HK, SQ, SK, NB, NN, section, scale, scale_log2, left, right, M, D,
             HEAD, HEAD_V, ST, LEFT, RIGHT, EVEN, RQ, RK, DRAW, 128 if SWAP else 32, SPLIT, ORDER)  # fmt: skip
    if SWAP:
        gl.warp_specialize([(_producer, (a,)), (_consumer, (a, 0)), (_consumer, (a, 1))], [4, 4], [240, 240])
    else:
        gl.warp_specialize([(_consumer, (a, 0)), (_consumer, (a, 1)), (_producer, (a,))], [4, 1], [240, 24])
