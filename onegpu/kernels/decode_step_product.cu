// y = f(x) W^T for the M rows of a decoding step, with what stands before and after it in a layer.
//
// x: see decode_step_input.cu, which comes before this text.
// SINK    0  y, float32 [M, N], with bias; W is up to three matrices below one another (q, k, v). cap: cap tanh(y / cap), if not 0
//         1  h += y, float32 [M, N]
//         2  act(gate) * up, 16-bit [M, N]; W is two matrices (gate, up)
//         3  y of the first matrix (which may have no rows), float32 [M, n0], and act(y) of the second, 16-bit [M, n1], into `also`
// Filled in: M, K, CL (blocks of a cluster), SHARE (of the columns of a row, a block's part), WARPS, FETCHERS (of them, if not OWN), SLOTS, CB (bytes of a row in a piece), TG (tiles between two sums),
// OWN (each warp fetches for itself), BULK (scales are copied in bulk too), SOURCE, SINK, SPLITS, HD, ACT, and what decode_step_input.cu names.
//
// A cluster takes a range of rows of W in tiles of 16 (SINK 2: 8 of gate, 8 of up), each block its share of the columns, a tile in pieces of CB bytes of each row. The
// last warps fetch pieces in turn into a ring, a bulk copy a row: memory then sees long reads, which it serves faster than what many
// warps ask for in bits. A warp issues such copies one after the other, some 30 cycles each, so one is too slow for short rows. The others share the columns of each piece. The shorter a row's part,
// the more a bulk copy's own cost weighs: OWN lets the pieces go round the warps instead, each of which streams its own through a ring of its own, 16 bytes a thread, without a barrier. The ring is filled before the kernel waits for the one in
// front of it: weights do not change during a step. A block has an SM for itself; the next kernel's comes as soon as it has left.
// Of many rows, x leaves no room for a ring in a block by itself. In a cluster, a block holds its share of x, and sends the sums of its
// share of the columns to the block that finishes those rows of the tile, while it multiplies the next. There are BOXES for them: as a
// block has waited for the sums of tile i - 1 before it sends those of i + 1, and the others have finished i - 3 when they send those of i - 1, four are never full.
// W is the 16-row operand of the mma, x the 8-column one; the contraction runs in the order in which bytes are stored.
constexpr int CONSUMERS = OWN ? WARPS : WARPS - FETCHERS, EACH = OWN ? 1 : CONSUMERS;  // a warp takes every EACH-th group of a piece
constexpr int GROUP = FMT == 0 ? 32 : 64, GROUPS = KB / GROUP;         // columns that the four lanes of a row take together
constexpr int LINE = CB + (FMT == 2 ? 32 : 64), PIECE = 16 * LINE;      // so that the rows of a fragment spread over the banks
constexpr int S_LINE = FMT == 2 ? GROUPS + (OWN ? 1 : 4) : 0, SLOT = PIECE + 64 * S_LINE;   // scales of a row in a piece, as floats
constexpr int EIGHTS = (M + 7) / 8, SUMS = TG * CONSUMERS * 16 * M;
constexpr int MMA_BF16 = BF16 && FMT != 2, PIECES = (SHARE + KB - 1) / KB, ROW_BYTES = FMT == 0 ? 2 * K : FMT == 1 ? K : K / 2;
constexpr int GATED = SINK == 2, PARTS = SINK == 0 || SINK == 3, TILE_ROWS = GATED ? 8 : 16;
constexpr int BOXES = CL > 1 ? 4 : 0, SENT = TG * 16 * M, FINISHED = TILE_ROWS / CL;  // floats of a box; rows of a tile that a block finishes
static_assert(K % 64 == 0 && SHARE % 64 == 0, "whole groups");
static_assert(FINISHED * CL == TILE_ROWS, "a cluster of 1, 2, 4 or 8");
// The warp that fetches piece i has waited for i - FETCHERS, so the barrier of i's slot is at most FETCHERS pieces behind: a parity tells one turn of the ring.
static_assert(OWN || FETCHERS <= SLOTS, "a fetching warp is at most a turn ahead");
static_assert(TG * 16 * M <= CONSUMERS * 32, "a thread finishes one sum");

struct Part { const u8* w; const void* absmax; const float *nested, *offset; const u16* bias; };

__global__ void __launch_bounds__(THREADS, 1)
product(const u8* w0, const u8* w1, const u8* w2, const void* absmax0, const void* absmax1, const void* absmax2,
        const float* nested0, const float* nested1, const float* nested2, const float* offset0, const float* offset1, const float* offset2,
        const u16* bias0, const u16* bias1, const u16* bias2, const float* map, const u16* gain, const u16* norm_bias, const u16* outer_gain,
        const u16* outer_bias, const void* in, const float2* ml, const float* added, float* stream, void* out, u16* also,
        int n0, int n1, int n2, int shift,
        float eps, float one, float outer_eps, float outer_one, float cap) {
  SHARED(smem);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, rank = CL > 1 ? cluster_rank() : 0;
  const int n = GATED ? n0 : n0 + n1 + n2, cluster = blockIdx.x / CL, clusters = gridDim.x / CL;
  const int r0 = (int)((i64)n * cluster / clusters), r1 = (int)((i64)n * (cluster + 1) / clusters);
  const int tiles = (r1 - r0 + TILE_ROWS - 1) / TILE_ROWS;
  u8* table = smem;
  float* map_ = (float*)(smem + TABLE);
  u8* xs = smem + TABLE + (NESTED ? 1024 : 0);
  float* red = (float*)(xs + M * PITCH);
  float* boxes = red + 2 * SUMS;                                         // CL > 1: sums of the cluster's blocks, [BOXES, CL, TG, 16 / CL, M]
  float* shares = boxes + BOXES * SENT;                                  // of the warps, see decode_step_input.cu
  float* unscale = shares + SHARES;                                      // what undoes each row's scale
  u8* came = (u8*)shares + (SHARES + M + 3) / 4 * 16;                    // of each box: its sums have come
  u8* sums_came = came + 8 * BOXES;                                      // CL > 1: two, of the norms
  u8* bars = sums_came + (CL > 1 ? 16 : 0);                              // of each slot: it is full, it is empty
  u8* ring = OWN ? bars + warp * SLOTS * SLOT : bars + (16 * SLOTS + 127) / 128 * 128;
  const u64 policy = evict_first();
  const int first = first_column(), own = own_columns(), taken = FMT == 0 ? 2 * own : FMT == 1 ? own : own / 2;
  const int first_byte = FMT == 0 ? 2 * first : FMT == 1 ? first : first / 2, first_block = first / 64;
  // Row r of a tile: which matrix, and which row there.
  auto part_of = [&](int tile, int r, int& row) {
    Part p = {w0, absmax0, nested0, offset0, bias0};
    if (GATED) {
      row = r0 + tile * 8 + (r & 7);
      if (r >= 8) p = {w1, absmax1, nested1, offset1, bias1};
    } else {
      row = r0 + tile * 16 + r;
      if (PARTS) {
        if (row >= n0 + n1) { row -= n0 + n1; p = {w2, absmax2, nested2, offset2, bias2}; }
        else if (row >= n0) { row -= n0; p = {w1, absmax1, nested1, offset1, bias1}; }
      }
    }
    return p;
  };
  auto inside = [&](int tile, int r) { return r0 + tile * TILE_ROWS + (GATED ? r & 7 : r) < r1; };

  const int pieces = tiles * PIECES;
  auto fetch = [&](int i) {                                              // the block's piece i, by one of the last warps
    const int tile = i / PIECES, piece = i % PIECES, rows = min(TILE_ROWS, r1 - r0 - tile * TILE_ROWS) * (1 + GATED);
    const int bytes = min(CB, taken - piece * CB), block = first_block + piece * GROUPS; u8 *full = bars + i % SLOTS * 16, *slot = ring + i % SLOTS * SLOT;
    if (lane == 0) arrive_and_expect(full, bytes > 0 ? rows * (bytes + (BULK ? bytes / 8 : 0)) : 0);
    __syncwarp();
    if (lane < 16 && bytes > 0 && inside(tile, lane)) {
      int row; const Part p = part_of(tile, lane, row);
      bulk_copy(slot + lane * LINE, p.w + (i64)row * ROW_BYTES + first_byte + piece * CB, bytes, full, policy);
      if (BULK) bulk_copy(slot + PIECE + lane * S_LINE * 4, (const u8*)p.absmax + ((i64)row * (K / 64) + block) * 4, bytes / 8, full, policy);
    }
    if (FMT == 2 && !BULK) {
      for (int e = lane; e < 16 * GROUPS; e += 32) {
        int r = e / GROUPS, b = e % GROUPS, row;
        const Part p = part_of(tile, r, row); const Scales scales = {p.absmax, p.nested, map, p.offset, shift, 8};
        scales.fetch(shared_of_lane(slot + PIECE + (r * S_LINE + b) * 4), (i64)row * (K / 64) + block + b, inside(tile, r) && piece * GROUPS + b < own / 64);
      }
      arrive_after_copies(full);
    }
  };

  constexpr int UNITS = OWN ? CB / 16 : 32, STEP = 32 / UNITS;           // OWN: a warp copies STEP rows at once
  const int f_line = lane / UNITS, f_unit = lane % UNITS;
  const Shared first_slot = shared(ring + f_line * LINE + f_unit * 16);
  Shared f_slot = first_slot;
  int fetched = warp;                                                    // pieces are counted through all tiles
  auto fetch_own = [&]() {
    if (fetched < pieces) {
      const int tile = fetched / PIECES, piece = fetched % PIECES, row0 = r0 + tile * TILE_ROWS + f_line, at = piece * CB + f_unit * 16;
#pragma unroll
      for (int j = 0; j < 16 / STEP; j++) {
        const int row = row0 + j * STEP % TILE_ROWS; const u8* w = GATED && j * STEP >= 8 ? w1 : w0;
        if (PARTS) w = row >= n0 + n1 ? w2 - (i64)(n0 + n1) * ROW_BYTES : row >= n0 ? w1 - (i64)n0 * ROW_BYTES : w0;
        if (row < r1 && (!UNEVEN && SHARE % KB == 0 || at < taken)) copy16(f_slot + j * STEP * LINE, w + (i64)row * ROW_BYTES + first_byte + at, 16, policy);
      }
      if (FMT == 2) {
#pragma unroll
        for (int j = 0; j < (GROUPS + 1) / 2; j++) {
          const int e = lane + 32 * j, r = e / GROUPS, b = e % GROUPS; int row;
          if (GROUPS % 2 && r >= 16) break;
          const Part p = part_of(tile, r, row); const Scales scales = {p.absmax, p.nested, map, p.offset, shift, 8};
          scales.fetch(f_slot + (PIECE + (r * S_LINE + b) * 4 - f_line * LINE - f_unit * 16), (i64)row * (K / 64) + first_block + piece * GROUPS + b, inside(tile, r) && piece * GROUPS + b < own / 64);
        }
      }
      fetched += WARPS;
    }
    f_slot = f_slot == first_slot + (SLOTS - 1) * SLOT ? first_slot : f_slot + SLOT;
    commit();
  };

  // ---- what does not depend on the kernels before
  let_next_kernel_start();
  if (OWN) {
#pragma unroll
    for (int i = 0; i < SLOTS - 1; i++) fetch_own();
  } else if (warp >= CONSUMERS) {
    if (lane == 0) {
      for (int i = warp - CONSUMERS; i < SLOTS; i += FETCHERS) { barrier_init(bars + 16 * i, FMT == 2 && !BULK ? 33 : 1); barrier_init(bars + 16 * i + 8, CONSUMERS); }
      barriers_ready();
    }
    __syncwarp();
    for (int i = warp - CONSUMERS; i < min(SLOTS, pieces); i += FETCHERS) fetch(i);
  }
  if (CL > 1) {
    if (threadIdx.x == 0) { for (int i = 0; i < BOXES + 2; i++) barrier_init(came + 8 * i, 1); barriers_ready(); }
    cluster_ready();                                                     // before anybody sends
  }
  Input x;
  x.prepare(gain, norm_bias, outer_gain, outer_bias, shares);
  if (NESTED) for (int i = threadIdx.x; i < 256; i += THREADS) map_[i] = map[i];
  build_table(table, THREADS);
  // The sum that this thread finishes in a group of tiles, and what is added and multiplied there.
  // In a cluster those are the last threads, as the first are busy with sending.
  const int f_thread = (int)threadIdx.x - (CL > 1 ? CONSUMERS * 32 - TG * FINISHED * M : 0);
  const int f_tile = f_thread / (FINISHED * M), f_row = rank * FINISHED + f_thread / M % FINISHED, f_m = f_thread % M;
  const bool finishes = f_thread >= 0 && f_tile < TG;
  float scale0 = 1.f, scale1 = 1.f, plus0 = 0.f, plus1 = 0.f, rest = 0.f;
  auto prepare = [&](int q0) {
    if (!finishes || !inside(q0 + f_tile, f_row)) return;
    int row; Part p = part_of(q0 + f_tile, f_row, row);
    if (FMT == 1) scale0 = ((const float*)p.absmax)[row] * (1.f / 127.f);
    plus0 = p.bias ? value(p.bias[row]) : 0.f;
    if (GATED) {
      p = part_of(q0 + f_tile, f_row + 8, row);
      if (FMT == 1) scale1 = ((const float*)p.absmax)[row] * (1.f / 127.f);
      plus1 = p.bias ? value(p.bias[row]) : 0.f;
    }
  };
  auto prepare_rest = [&](int q0) {
    if (SINK == 1 && finishes && inside(q0 + f_tile, f_row)) rest = fresh((const float*)out + (i64)f_m * n + r0 + (q0 + f_tile) * 16 + f_row);
  };
  auto finish = [&](int q0, float sum, float up) {
    sum = fmaf(sum, scale0, plus0); up = fmaf(up, scale1, plus1);
    const int row = r0 + (q0 + f_tile) * TILE_ROWS + f_row; const i64 where = (i64)f_m * n + row;
    if (GATED) ((u16*)out)[where] = (u16)pack(activated(sum) * up, 0.f);
    else if (SINK == 3) {
      if (row < n0) ((float*)out)[(i64)f_m * n0 + row] = sum;
      else also[(i64)f_m * n1 + row - n0] = (u16)pack(activated(sum), 0.f);
    } else if (SINK == 0) ((float*)out)[where] = cap == 0.f ? sum : cap * tanh_(sum / cap);
    else ((float*)out)[where] = sum + rest;
  };
  prepare(0);

  wait_before_reading_x();

  prepare_rest(0);
  x.load(in, ml, added, stream, eps, one, outer_eps, outer_one, xs, shares, unscale, sums_came);
  __syncthreads();

  // ---- rows of W times x
  if (!OWN && warp >= CONSUMERS) {
    int i = warp - CONSUMERS;
    while (i < SLOTS) i += FETCHERS;
    for (; i < pieces; i += FETCHERS) { wait_for(bars + i % SLOTS * 16 + 8, i / SLOTS - 1 & 1); fetch(i); }
    return;
  }
  const u32 lane4 = lane * 4;
  const Int8Pairs pairs(n0);
  const u8* x_lane = xs + t * (GROUP / 2);
  float acc[EIGHTS][4] = {};
  int i = 0, at = warp, slot_no = 0;
  const int mine = OWN ? 0 : warp;
  auto multiply = [&](const u8* slot, int tile, int piece) {
    if (NESTED) {                                                    // of the groups that this warp takes
      constexpr int MINE = (GROUPS + EACH - 1) / EACH;
      for (int e = lane; e < 16 * MINE; e += 32) {
        int r = e / MINE, b = e % MINE * EACH + mine, row;
        Part p = part_of(tile, r, row); const Scales scales = {p.absmax, p.nested, map, p.offset, shift, 8};
        float* s = (float*)(slot + PIECE) + r * S_LINE + b;
        if (b < GROUPS && inside(tile, r) && piece * GROUPS + b < own / 64) *s = scales.decode(__float_as_uint(*s), (i64)row * (K / 64) + first_block + piece * GROUPS + b, map_);
      }
      __syncwarp();
    }
#pragma unroll
    for (int j = 0; j < (GROUPS + EACH - 1) / EACH; j++) {
      const int b = mine + j * EACH, column = piece * KB + b * GROUP;
      if (GROUPS % EACH && b >= GROUPS || (UNEVEN || SHARE % KB) && column >= own) break;
      const u8* w = slot + g * LINE;
      u32 xv[EIGHTS][8];
#pragma unroll
      for (int e = 0; e < EIGHTS; e++) {
        const uint4* px = (const uint4*)(x_lane + (8 * e + g) % M * PITCH + column * 2); const uint4 xa = px[0], xb = FMT == 0 ? xa : px[1];
        xv[e][0] = xa.x; xv[e][1] = xa.y; xv[e][2] = xa.z; xv[e][3] = xa.w; xv[e][4] = xb.x; xv[e][5] = xb.y; xv[e][6] = xb.z; xv[e][7] = xb.w;
      }
      if (FMT == 2) {
        const uint2 u = *(const uint2*)(w + b * 32 + t * 8), v = *(const uint2*)(w + 8 * LINE + b * 32 + t * 8);
        const float* s = (const float*)(slot + PIECE) + g * S_LINE + b; const float s0 = s[0], s1 = s[8 * S_LINE];
        float c[EIGHTS][4] = {};
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const u32 a = h ? u.y : u.x, d = h ? v.y : v.x;
          const u32 a0 = look_up<0>(table, a, lane4), a1 = look_up<0>(table, d, lane4), a2 = look_up<1>(table, a, lane4), a3 = look_up<1>(table, d, lane4);
          const u32 b0 = look_up<2>(table, a, lane4), b1 = look_up<2>(table, d, lane4), b2 = look_up<3>(table, a, lane4), b3 = look_up<3>(table, d, lane4);
#pragma unroll
          for (int e = 0; e < EIGHTS; e++) {
            mma<0>(c[e], a0, a1, a2, a3, xv[e][4 * h], xv[e][4 * h + 1]);
            mma<0>(c[e], b0, b1, b2, b3, xv[e][4 * h + 2], xv[e][4 * h + 3]);
          }
        }
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
          acc[e][0] = fmaf(c[e][0], s0, acc[e][0]); acc[e][1] = fmaf(c[e][1], s0, acc[e][1]);
          acc[e][2] = fmaf(c[e][2], s1, acc[e][2]); acc[e][3] = fmaf(c[e][3], s1, acc[e][3]);
        }
      } else {
        const uint4 u = *(const uint4*)(w + b * 64 + t * 16), v = *(const uint4*)(w + 8 * LINE + b * 64 + t * 16);
        const u32 a[4] = {u.x, u.y, u.z, u.w}, d[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int s = 0; s < (FMT == 0 ? 2 : 4); s++) {
          u32 a0, a1, a2, a3;
          if (FMT == 0) { a0 = a[2 * s]; a1 = d[2 * s]; a2 = a[2 * s + 1]; a3 = d[2 * s + 1]; }
          else { a0 = pairs.of<0>(a[s]); a1 = pairs.of<0>(d[s]); a2 = pairs.of<1>(a[s]); a3 = pairs.of<1>(d[s]); }
#pragma unroll
          for (int e = 0; e < EIGHTS; e++) mma<MMA_BF16>(acc[e], a0, a1, a2, a3, xv[e][2 * s], xv[e][2 * s + 1]);
        }
      }
    }
  };
  auto put = [&](float* sums, int tile) {                                // of the group's tiles
    float* s = sums + (tile * CONSUMERS + warp) * 16 * M + g * M;
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
      const int m = 8 * e + 2 * t;
      if (M % 2 == 0 && m < M) { *(float2*)(s + m) = make_float2(acc[e][0], acc[e][1]); *(float2*)(s + 8 * M + m) = make_float2(acc[e][2], acc[e][3]); }
      else if (m < M) {
        s[m] = acc[e][0]; s[8 * M + m] = acc[e][2];
        if (m + 1 < M) { s[m + 1] = acc[e][1]; s[8 * M + m + 1] = acc[e][3]; }
      }
      acc[e][0] = acc[e][1] = acc[e][2] = acc[e][3] = 0.f;
    }
  };
  auto send_sums = [&](int group, const float* sums) {                   // of this block's columns, to who finishes them
    const int tile = threadIdx.x / (16 * M), r = threadIdx.x / M % 16, m = threadIdx.x % M, row = r % TILE_ROWS; float sum = 0.f;
    if (tile < TG) {
#pragma unroll
      for (int w = 0; w < CONSUMERS; w++) sum += sums[((tile * CONSUMERS + w) * 16 + r) * M + m];
      if (TO_FP16) sum *= unscale[m];
      const int to = ((rank * TG + tile) * (16 / CL) + r / TILE_ROWS * FINISHED + row % FINISHED) * M + m;
      send(boxes + group % 4 * SENT + to, row / FINISHED, sum, came + group % 4 * 8);
    }
    if (threadIdx.x == 0) arrive_and_expect(came + group % 4 * 8, SENT * 4);
  };
  auto finish_sent = [&](int group) {
    if (!finishes) return;
    wait_for_blocks(came + group % 4 * 8, group / 4 & 1);
    const float* s = boxes + group % 4 * SENT + (f_tile * (16 / CL) + f_row % FINISHED) * M + f_m; float sum = 0.f, up = 0.f;
#pragma unroll
    for (int i = 0; i < CL; i++) { sum += s[i * TG * (16 / CL) * M]; if (GATED) up += s[(i * TG * (16 / CL) + FINISHED) * M]; }
    if (inside(group * TG + f_tile, f_row)) finish(group * TG, sum, up);
  };
  for (int q0 = 0, odd = 0; q0 < tiles; q0 += TG, odd ^= 1) {
    const int q1 = min(q0 + TG, tiles); float* sums = red + odd * SUMS;
    if (CL == 1 && q0) { prepare(q0); prepare_rest(q0); }
    if (OWN) {
      int done = q0;
      for (; at < q1 * PIECES; at += WARPS) {
        const int tile = at / PIECES;
        for (; done < tile; done++) put(sums, done - q0);
        fetch_own();
        copies_left<SLOTS - 1>();
        __syncwarp();
        multiply(ring + slot_no * SLOT, tile, at % PIECES);
        if (++slot_no == SLOTS) slot_no = 0;
        __syncwarp();
      }
      for (; done < q1; done++) put(sums, done - q0);
    } else for (int tile = q0; tile < q1; tile++) {
      for (int piece = 0; piece < PIECES; piece++, i++) {
        const u8* slot = ring + i % SLOTS * SLOT;
        wait_for(bars + i % SLOTS * 16, i / SLOTS & 1);
        multiply(slot, tile, piece);
        __syncwarp();
        if (lane == 0) arrive(bars + i % SLOTS * 16 + 8);
      }
      put(sums, tile - q0);
    }
    meet_threads<CONSUMERS * 32>();
    if (CL > 1) {
      send_sums(q0 / TG, sums);
      if (q0) { finish_sent(q0 / TG - 1); prepare(q0); prepare_rest(q0); }
    } else if (finishes && inside(q0 + f_tile, f_row)) {
      const float* s = sums + (f_tile * CONSUMERS * 16 + f_row) * M + f_m; float sum = 0.f, up = 0.f;
#pragma unroll
      for (int w = 0; w < CONSUMERS; w++) { sum += s[w * 16 * M]; if (GATED) up += s[(w * 16 + 8) * M]; }
      if (TO_FP16) { sum *= unscale[f_m]; up *= unscale[f_m]; }
      finish(q0, sum, up);
    }
  }
  if (CL > 1 && tiles) finish_sent((tiles - 1) / TG);
  if (OWN) copies_left<0>();
}
