"""Parts of the Hopper forward: which keys a tile walks, masks, stores by address, and zeros where padding is."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from onegpu.kernels.hopper import drawn, sequence


@gluon.jit
def key_blocks(a, m, n_q, n_k):
    """(first, number) of the key blocks that query block m walks; at least one where there is a query, else none."""
    M: gl.constexpr = 128
    at = m * M + n_k - n_q
    stop = gl.cdiv(n_k, a.BN)
    if a.RIGHT:
        stop = gl.minimum(stop, gl.cdiv(gl.maximum(at + M + a.right, 0), a.BN))
    stop = gl.maximum(stop, 1)
    first = stop * 0
    if a.LEFT:
        first = gl.minimum(gl.maximum(at - a.left, 0) // a.BN, stop - 1)
    n = stop - first
    if a.RQ:
        n = gl.where(m * M < n_q, n, 0)
    return first, n


@gluon.jit
def place(a, m, b, WG: gl.constexpr):
    """Of 64 rows of query block m: first row and number of the sequence's queries, number of its keys, first of these
    rows among the queries, the key block where the tile begins, how many blocks it and these rows walk.
    """
    M: gl.constexpr = 128
    i_q, n_q = sequence(a.p_q_rows, b, a.SQ, a.RQ)
    _, n_k = sequence(a.p_k_rows, b, a.SK, a.RK)
    first, n = key_blocks(a, m, n_q, n_k)
    row0 = m * M + WG * 64
    mine = n
    if a.RIGHT:
        mine = gl.cdiv(gl.maximum(row0 + n_k - n_q + 64 + a.right, 0), a.BN) - first
        mine = gl.minimum(n, gl.maximum(mine, 1))
    return i_q, n_q, n_k, row0, first, n, mine


@gluon.jit
def masked(a, at, first, n):
    """(whole, cut) of n blocks from `first`: those from `whole` on are cut by the right side, those before `cut` by the
    left side of the window of the rows at ``at .. at + 63``.
    """
    cut = n * 0
    if a.LEFT:
        cut = gl.minimum(gl.maximum(gl.cdiv(gl.maximum(at + 63 - a.left, 0), a.BN) - first, 0), n)
    whole = n
    if a.RIGHT and not a.ALIGNED:
        whole = gl.maximum(gl.minimum(gl.maximum(at + a.right + 1, 0) // a.BN - first, n), cut)
    return whole, cut


@gluon.jit
def draw(a, tile):
    """The block's next tile."""
    if a.DRAW:
        tile = drawn(a.p_counter)
    return tile + gl.num_programs(0)


@gluon.jit
def publish(a, m, h, b, slot, phase):
    """Producer: tell the consumers of a tile, that they divide nothing; m < 0: no more. Returns next slot, phase."""
    mbarrier.wait(a.t_empty.index(slot), phase)
    zero = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    a.t_buf.index(3 * slot).store(zero + m)
    a.t_buf.index(3 * slot + 1).store(zero + h)
    a.t_buf.index(3 * slot + 2).store(zero + b)
    mbarrier.arrive(a.t_full.index(slot), count=1)
    return slot ^ 1, phase ^ slot


@gluon.jit
def fetch(a, slot, phase):
    """Consumer: (m, h, b, next slot, phase) as the producer published them."""
    mbarrier.wait(a.t_full.index(slot), phase)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    m = gl.max(a.t_buf.index(3 * slot).load(layout), 0)
    h = gl.max(a.t_buf.index(3 * slot + 1).load(layout), 0)
    b = gl.max(a.t_buf.index(3 * slot + 2).load(layout), 0)
    mbarrier.arrive(a.t_empty.index(slot), count=1)
    return m, h, b, slot ^ 1, phase ^ slot


@gluon.jit
def hide(a, s, at, n0, n_k, MASK: gl.constexpr, layout: gl.constexpr):
    """-inf where the queries at key positions ``at .. at + 63`` do not see the keys from n0 on.

    MASK: 1, the right side and the last key; 2, the left side of a window; 3, both.
    """
    cols = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, layout))
    rows = at - n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    if MASK & 1:
        if a.RIGHT:  # one bound a row for the diagonal and for the last key
            seen = cols[None, :] <= gl.minimum(rows + a.right, n_k - n0 - 1)[:, None]
        else:
            seen = (cols < n_k - n0)[None, :]
        s = gl.where(seen, s, -float("inf"))
    if MASK & 2:
        s = gl.where(cols[None, :] >= (rows - a.left)[:, None], s, -float("inf"))
    return s


@gluon.jit
def store_rows(a, o, lse, row0, i_q, n_q, b, h, layout: gl.constexpr):
    """Write those of 64 rows that are queries, by addresses."""
    rows = row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    at = i_q + rows
    cols = gl.arange(0, a.DV, layout=gl.SliceLayout(0, layout))
    gl.store(a.p_lse + (b.to(gl.int64) * a.H + h) * a.SQ + at, lse, mask=rows < n_q)
    p = a.p_o + ((b.to(gl.int64) * a.SQ + at)[:, None] * a.H + h) * a.HEAD + cols[None, :]
    gl.store(p, o, mask=(rows < n_q)[:, None] & (cols < a.HEAD)[None, :])


@gluon.jit
def _fill(a, b, begin, end):
    """Zeros in the rows [begin, end) of b, -inf in their log-sum-exp; this block's share."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    wide = gl.arange(0, 1024, layout=layout)
    zeros = gl.full([1024], 0.0, a.k_bufs.dtype, layout)
    rows = gl.maximum(end - begin, 0)
    size = rows.to(gl.int64) * (a.H * a.HEAD)
    p = a.p_o + (b.to(gl.int64) * a.SQ + begin) * (a.H * a.HEAD)
    for i in range(gl.program_id(0), ((size + 1023) // 1024).to(gl.int32), gl.num_programs(0)):
        at = (size * 0 + i) * 1024
        gl.store(p + at + wide, zeros, mask=wide < size - at)
    narrow: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    empty = gl.full([128], -float("inf"), gl.float32, narrow)
    for i in range(gl.program_id(0), gl.cdiv(rows, 128) * a.H, gl.num_programs(0)):
        o = i // a.H * 128 + gl.arange(0, 128, layout=narrow)
        gl.store(a.p_lse + (b.to(gl.int64) * a.H + i % a.H) * a.SQ + begin + o, empty, mask=o < rows)


@gluon.jit
def filler(a):
    """A warp that writes what no query owns, while the others attend."""
    if a.RQ == 1:
        for b in range(a.B):
            first, n = sequence(a.p_q_rows, b, a.SQ, a.RQ)
            _fill(a, b, b * 0, gl.minimum(first, a.SQ))
            _fill(a, b, first + gl.maximum(n, 0), first * 0 + a.SQ)
    else:
        first = gl.load(a.p_q_rows)
        _fill(a, first * 0, first * 0, first)
        _fill(a, first * 0, gl.load(a.p_q_rows + a.B), first * 0 + a.SQ)
