"""Pieces of persistent, warp-specialised Hopper kernels in Gluon: barriers, tiles from a counter.

``a`` is a kernel's aggregate of arguments; the fields that a function reads stand in its docstring.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

LOG2E = gl.constexpr(1.4426950408889634)
# of the partition's threads; as Triton 3.7 and 3.6 call it
warpgroup_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def bar_sync(bar, threads):
    """Named barrier: arrive and wait."""
    gl.inline_asm_elementwise("bar.sync $1, $2; mov.u32 $0, 0;", "=r,r,r", [gl.to_tensor(bar), gl.to_tensor(threads)],
                              dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def bar_arrive(bar, threads):
    """Named barrier: arrive, for each warp on its own; an mbarrier would first gather the warpgroup."""
    gl.inline_asm_elementwise("bar.arrive $1, $2; mov.u32 $0, 0;", "=r,r,r", [gl.to_tensor(bar), gl.to_tensor(threads)],
                              dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def bar_arrive_if(bar, threads, there):
    """`bar_arrive` where ``there``, without a branch."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred go;
        setp.ne.s32 go, $3, 0;
        @go bar.arrive $1, $2;
        mov.u32 $0, 0;
        }""", "=r,r,r,r", [gl.to_tensor(bar), gl.to_tensor(threads), gl.to_tensor(there).to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def advance(stage, phase, ST: gl.constexpr):
    """The next of ST buffers, and the phase of its barriers."""
    stage += 1
    phase = gl.where(stage == ST, phase ^ 1, phase)
    return gl.where(stage == ST, 0, stage), phase


@gluon.jit
def sequence(p_rows, b, S, HOW: gl.constexpr):
    """(first row, rows) of sequence b."""
    first = b * 0
    n = first + S
    if HOW == 1:
        first = gl.load(p_rows + 2 * b)
        n = gl.minimum(gl.load(p_rows + 2 * b + 1), S - first)
    elif HOW == 2:
        first = gl.load(p_rows + b)
        n = gl.load(p_rows + b + 1) - first
    return first, n


@gluon.jit
def tile_of(a, tile):
    """(query block, head, batch) of a tile.

    Heads come in sections whose keys and values fit in the L2 cache; the blocks that the diagonal makes the longest
    come first in a section, or (ROTATE) in each one other blocks: tiles dealt out beforehand are of all lengths.
    """
    if a.RIGHT:
        per_section = a.section * a.NM
        i_section = tile // per_section
        first = i_section * a.section
        width = gl.minimum(a.section, a.B * a.H - first)
        rest = tile % per_section
        m = rest // width
        if a.ROTATE:
            m = (m + i_section) % a.NM
        m = a.NM - 1 - m
        bh = first + rest % width
    else:
        m = tile % a.NM
        bh = tile // a.NM
    return m, bh % a.H, bh // a.H


@gluon.jit
def key_tile_of(a, tile):
    """(tile of 128 keys, key head, batch) in the backward, in sections as in `tile_of`; ORDER: the last keys first."""
    per_section = a.section * a.NN
    first = tile // per_section * a.section
    width = gl.minimum(a.section, a.B * a.HK - first)
    rest = tile % per_section
    bh = first + rest % width
    n = rest // width
    if a.ORDER:
        n = a.NN - 1 - n
    return n, bh % a.HK, bh // a.HK


@gluon.jit
def query_blocks(a, n, n_q, n_k):
    """(first, stop) of the query blocks that see tile n; equal where none does."""
    M: gl.constexpr = a.M
    at = n * 128 - (n_k - n_q)  # the query at the position of the first key
    first = at * 0
    stop = gl.cdiv(n_q, M)
    if a.RIGHT:
        first = gl.maximum(at - a.right, 0) // M
    if a.LEFT:
        stop = gl.minimum(stop, gl.cdiv(gl.maximum(at + 128 + a.left, 0), M))
    if a.RK:
        stop = gl.where(n * 128 < n_k, stop, 0)
    return gl.minimum(first, stop), stop


@gluon.jit
def whole_blocks(a, n, n_q, n_k, first, stop):
    """(first, stop) of the query blocks that see all of tile n, inside [first, stop)."""
    M: gl.constexpr = a.M
    at = n * 128 - (n_k - n_q)
    whole = first
    end = stop
    if a.RIGHT:
        whole = gl.cdiv(gl.maximum(at + 127 - a.right, 0), M)
    if a.LEFT:
        end = gl.maximum(at + a.left + 1, 0) // M
    if not a.EVEN:  # keys past the end would give P = exp(-lse)
        end = gl.where(n * 128 + 128 > n_k, 0, end)
    whole = gl.minimum(gl.maximum(whole, first), stop)
    return whole, gl.minimum(gl.maximum(end, whole), stop)


@gluon.jit
def first_block(a, b, h, i_q):
    """Where the blocks of a head of a sequence begin in the scratch memory (see attention_hopper.backward)."""
    if a.RQ == 2:
        return h * a.NB + i_q // a.M + b
    else:
        return (b * a.H + h) * a.NB


@gluon.jit
def turn_of(a, m, row0, n_q, n_k):
    """What `pass_turn` has left at query block m when it is the turn of key row0's tile; 0 for the first.

    Where a packed sequence is longer than it was said to be, tiles past NN are not there to be waited for.
    """
    last = gl.minimum((n_k - 1) >> 7, a.NN - 1)
    if a.RIGHT:
        last = gl.minimum(last, (m * a.M + a.M - 1 + n_k - n_q + a.right) >> 7)
    tile = row0 >> 7
    return gl.where(tile == last, 0, tile + 2)


@gluon.jit
def wait_turn(p, turn):
    """Until ``turn`` stands at p; what was added by TMA before that comes before what this thread adds."""
    gl.inline_asm_elementwise(
        """{
        .reg .b32 seen;
        .reg .pred mine;
        again:
        ld.acquire.gpu.global.b32 seen, [$1];
        setp.eq.s32 mine, seen, $2;
        @!mine bra again;
        fence.proxy.async.global;
        mov.u32 $0, 0;
        }""", "=r,l,r", [p.to(gl.int64), gl.to_tensor(turn)], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def pass_turn(p, at, row0, bar):
    """Write key row0's tile + 1 to p[at], when all that this consumer has added by TMA is in memory.

    bar: a named barrier of its 128 threads. One of them writes there and the others to p[1], which nobody reads.
    """
    thread = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    there = (p + gl.where(thread == 0, at, 1)).to(gl.int64)
    gl.inline_asm_elementwise(
        """{
        cp.async.bulk.wait_group 0;
        bar.sync $2, 128;
        fence.proxy.async.global;
        st.release.gpu.global.b32 [$1], $3;
        mov.u32 $0, 0;
        }""", "=r,l,r,r", [there, gl.to_tensor(bar), gl.to_tensor((row0 >> 7) + 1)], dtype=gl.int32, is_pure=False,
        pack=1)  # fmt: skip


@gluon.jit
def drawn(p):
    """The next number of a counter. Relaxed: nothing else in memory hangs on it, and a fence of the whole GPU would
    come with each draw.
    """
    return gl.atomic_add(p, 1, sem="relaxed")  # counter


@gluon.jit
def publish_next(a, tile, slot, phase):
    """Producer: draw a tile and tell the consumers. Returns tile, slot, phase.

    Reads DRAW, p_counter, t_buf, t_full and t_empty, as `fetch_next` does. DRAW 2: the first tiles are drawn too, so
    that whoever waits for an earlier tile waits for a block that runs, whatever else the GPU does.
    """
    if a.DRAW:
        tile = drawn(a.p_counter)
        if a.DRAW == 1:
            tile += gl.num_programs(0)
        mbarrier.wait(a.t_empty.index(slot), phase)
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        a.t_buf.index(slot).store(gl.full([1], 0, gl.int32, layout) + tile)
        mbarrier.arrive(a.t_full.index(slot), count=1)
        phase = phase ^ slot
        slot = slot ^ 1
    else:
        tile += gl.num_programs(0)
    return tile, slot, phase


@gluon.jit
def fetch_next(a, tile, slot, phase):
    """Consumer: what the producer has published."""
    if a.DRAW:
        mbarrier.wait(a.t_full.index(slot), phase)
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        tile = gl.max(a.t_buf.index(slot).load(layout), 0)
        mbarrier.arrive(a.t_empty.index(slot), count=1)
        phase = phase ^ slot
        slot = slot ^ 1
    else:
        tile += gl.num_programs(0)
    return tile, slot, phase


@gluon.jit
def clear_rows(buf, n):
    """Zeros in the rows from n on of a 16-bit buffer [rows, columns]; two partitions may do it at once."""
    ROWS: gl.constexpr = buf.shape[0]
    COLUMNS: gl.constexpr = buf.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    for i in gl.static_range(0, ROWS, 16):
        if i + 16 > n:
            rows = buf.slice(i, 16)
            o = i + gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
            x = rows.load(layout)
            rows.store(gl.where((o < n)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()


@builtin
def tma_add(desc, coord, src, _semantic=None):
    """Add a tile of shared memory to the tensor, asynchronously; Gluon has only loads and stores."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)
