// y = f(x) W^T for the M (up to 8) rows of a decoding step and 4-bit W, in blocks of 64 with float32 scales.
// What x and the sinks are, and the arguments: decode_step_product.cu. decode_step_input.cu comes before this text.
//
// The stand-alone few_rows_held.cu behind the step's prologue: MP (2, 4 or 8) rows of x leave mma's operand SECT = 8 / MP sections of 256 columns of
// R = 16 / SECT rows of W; a warp has the same columns of every tile it takes, so it holds their x in registers. The sums of each piece have
// a place of their own, in what the table leaves free and then where x was; they meet once, at the end, in the order of the pieces. The
// CL blocks of a cluster share the columns; each finishes some of the rows of W, and the others send it their sums of those.
// SINK 2: half of a tile's rows are of gate, the others the same rows of up. Elsewhere a tile is of one matrix: their rows are whole tiles.
// 16-bit x (SOURCE 2) goes from memory straight into registers, scaled by the largest of the warp's own columns.
// Filled in: SECT, WARPS (a multiple of the pieces of a row in a block), DEPTH (pieces in a warp's ring), OVER (1: the table has not room for all sums), and
// what decode_step_product.cu and decode_step_input.cu name.
constexpr int MP = 8 / SECT, R = 16 / SECT, SUMS = R * MP, LINE = 128, PIECE = 2048, SLOT = PIECE + 256;
constexpr int PIECES = (SHARE + KB - 1) / KB, STEP = WARPS / PIECES, UNITS = 8 * SECT, AT_ONCE = 32 / UNITS;
constexpr int SINGLY = K % 256 != 0;                                   // scales are copied one by one: a row's are not whole fours
constexpr int ROW_BYTES = K / 2, ROW_SCALES = K / 64, CUT = UNEVEN || SHARE % KB != 0, IN_TABLE = 8192;
constexpr int GATED = SINK == 2, PARTS = SINK == 0 || SINK == 3, TILE_ROWS = GATED ? R / 2 : R, DIRECT = SOURCE == 2, BOTH = 1 + GATED;
static_assert(FMT == 2 && !NESTED && M <= MP && TABLE_SHIFT == 8 && CB == SECT * LINE && K % 64 == 0 && SHARE % 64 == 0, "whole blocks");
static_assert(WARPS % PIECES == 0, "a warp has the same columns of each tile");

__global__ void __launch_bounds__(THREADS, 1)
product(const u8* w0, const u8* w1, const u8* w2, const void* absmax0, const void* absmax1, const void* absmax2,
        const float* nested0, const float* nested1, const float* nested2, const float* offset0, const float* offset1, const float* offset2,
        const u16* bias0, const u16* bias1, const u16* bias2, const float* map, const u16* gain, const u16* norm_bias, const u16* outer_gain,
        const u16* outer_bias, const void* in, const float2* ml, const float* added, float* stream, void* out, u16* also,
        int n0, int n1, int n2, int shift,
        float eps, float one, float outer_eps, float outer_one, float cap) {
  SHARED(smem);
  const int lane = threadIdx.x & 31, warp = of_warp(threadIdx.x >> 5), g = lane >> 2, t = lane & 3, piece = warp % PIECES, rank = CL > 1 ? cluster_rank() : 0;
  const int n = GATED ? n0 : n0 + n1 + n2, all = n / TILE_ROWS, cluster = blockIdx.x / CL, clusters = gridDim.x / CL;
  const int tile0 = (int)((i64)all * cluster / clusters), tiles = (int)((i64)all * (cluster + 1) / clusters) - tile0;
  const int r0 = tile0 * TILE_ROWS, rows = tiles * TILE_ROWS;
  constexpr int X_BYTES = DIRECT ? 0 : M * PITCH, ROOM = X_BYTES > OVER * 4 ? X_BYTES : OVER * 4;
  u8 *table = smem, *xs = smem + TABLE;
  float* over = (float*)xs;                                              // where x was
  float* shares = (float*)(xs + (ROOM + 15) / 16 * 16);                  // of the warps, see decode_step_input.cu
  float* unscale = shares + SHARES;                                      // what undoes the scale of each row
  u8* bars = (u8*)shares + (SHARES + M + 3) / 4 * 16;                    // CL > 1: two, of the norms, and that of the sums
  u8* rings = xs + ((int)(bars + 32 - xs) + LINE - 1) / LINE * LINE;
  u8* ring = rings + warp * DEPTH * SLOT;
  const int own_rows = (rows + CL - 1) / CL;                             // that a block of the cluster finishes; the last one what is left
  float* sent = (float*)(rings + WARPS * DEPTH * SLOT);                  // CL > 1: the sums of those, [CL, BOTH, own_rows, MP]
  auto sum_at = [&](int i) { return OVER && i >= IN_TABLE ? over + (i - IN_TABLE) : (float*)(table + (i >> 5) * 256 + 128) + (i & 31); };
  const u64 policy = evict_first();
  // Offsets that the compiler cannot know: it keeps them, and a look-up of lane * 4 takes one instruction less.
  auto kept = [&](int offset) { return (u32)(shared(smem + offset) - shared(smem)); };
  const u32 lane4 = kept(lane * 4);

  // Section s of row r of a piece is row s * R + r of the operand. A lane copies the same unit of rows AT_ONCE apart.
  const int unit = lane % UNITS, row_of = lane / UNITS, to_row = unit / 8 * R + row_of;
  const Shared base = shared(ring + to_row * LINE + (unit % 8 ^ (to_row & 3) << 1) * 16);
  // Four scales, or one and another R / 2 rows on.
  const int scale_row = SINGLY ? lane / (4 * SECT) : lane / SECT % R, in_piece = SINGLY ? lane % (4 * SECT) : lane % SECT * 4;
  const Shared scales_base = shared(ring + PIECE + (in_piece / 4 * R + scale_row) * 16 + in_piece % 4 * 4);
  // Where this lane's copies and scales of the block's first tile lie, in each matrix; what lies outside of its columns is not read.
  const int column = piece * CB + unit * 16, take = !CUT || column < own_columns() / 2 ? 16 : 0;
  const int block = piece * SECT * 4 + in_piece, take_scales = !CUT || block < own_columns() / 64 ? SINGLY ? 4 : 16 : 0;
  const i64 from_row = (i64)(r0 + row_of) * ROW_BYTES + first_column() / 2 + (take ? column : 0);
  const i64 scale_at = (i64)(r0 + scale_row % TILE_ROWS) * ROW_SCALES + first_column() / 64 + (take_scales ? block : 0);
  const i64 back1 = PARTS ? n0 : 0, back2 = n0 + n1;
  const u8 *p0 = w0 + from_row, *p1 = w1 + (from_row - back1 * ROW_BYTES), *p2 = w2 + (from_row - back2 * ROW_BYTES);
  const float* s0_ = (const float*)(GATED && scale_row >= TILE_ROWS ? absmax1 : absmax0) + scale_at;
  const float *s1_ = (const float*)absmax1 + (scale_at - back1 * ROW_SCALES), *s2_ = (const float*)absmax2 + (scale_at - back2 * ROW_SCALES);
  const int tile1 = PARTS ? n0 / TILE_ROWS - tile0 : 0, tile2 = PARTS ? (n0 + n1) / TILE_ROWS - tile0 : 0;   // the first of each further matrix
  Shared slot = base, slot_end = base + (DEPTH - 1) * SLOT;
  int next = warp / PIECES;                                              // the tile that is sent for
  auto fetch = [&]() {
    if (next < tiles) {
      const u8 *a = p0, *b = GATED ? p1 : p0; const float* s = s0_;
      if (PARTS && next >= tile1) { a = b = p1; s = s1_; }
      if (PARTS && next >= tile2) { a = b = p2; s = s2_; }
      const u32 past = next * (TILE_ROWS * ROW_BYTES);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int down = j * AT_ONCE;
        copy16((Shared)((u64)slot ^ (u64)((down & 3) << 5)) + down * LINE, (down < TILE_ROWS ? a : b) + past + down % TILE_ROWS * ROW_BYTES, take, policy);
      }
      const Shared to = scales_base + (int)(slot - base); const u32 down = next * (TILE_ROWS * ROW_SCALES);
      if (SINGLY) {
        copy4(to, s + down, take_scales);
        copy4(to + R / 2 * 16, (GATED ? s1_ : s + R / 2 * ROW_SCALES) + down, take_scales);
      } else if (lane4 < 64) copy16(to, s + down, take_scales);
      next += STEP;
    }
    slot = slot == slot_end ? base : slot + SLOT;
    commit();
  };

  // ---- what does not depend on the kernels before
  let_next_kernel_start();
#pragma unroll
  for (int i = 0; i < DEPTH - 1; i++) fetch();
  if (CL > 1) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < 3; i++) barrier_init(bars + 8 * i, 1);
      barriers_ready();
      arrive_and_expect(bars + 16, max(min(own_rows, rows - rank * own_rows), 0) * MP * BOTH * (CL - 1) * 4);
    }
    cluster_ready();                                                     // before anybody sends
  }
  Input x;
  x.prepare(gain, norm_bias, outer_gain, outer_bias, shares);
  build_table(table, THREADS);
  if (DIRECT) __syncthreads();
  auto bias_of = [&](int row, bool up) {
    const u16* b = up ? bias1 : bias0;
    if (PARTS && row >= n0 + n1) { b = bias2; row -= n0 + n1; }
    else if (PARTS && row >= n0) { b = bias1; row -= n0; }
    return b ? value(b[row]) : 0.f;
  };
  // A thread finishes row number `i / MP` of this block's, of row i % MP of x.
  const int mine0 = rank * own_rows, finished = max(min(own_rows, rows - mine0), 0) * MP;
  float plus0 = 0.f, plus1 = 0.f, rest = 0.f;                            // of the first sum that this thread finishes
  auto prepare = [&](int i) { const int row = r0 + mine0 + i / MP; plus0 = bias_of(row, false); if (GATED) plus1 = bias_of(row, true); };
  auto prepare_rest = [&](int i) { if (SINK == 1 && i % MP < M) rest = fresh((const float*)out + (i64)(i % MP) * n + r0 + mine0 + i / MP); };
  if ((int)threadIdx.x < finished) prepare(threadIdx.x);
  const u32 of_row = kept(g * LINE + ((t >> 1) ^ (g & 3) << 1) * 16 + (t & 1) * 8);
  const u32 of_sum = kept(SECT == 1 ? g * MP + 2 * t : SECT == 2 ? g * MP + t : lane < 16 && t % 2 == 0 ? g * MP + t / 2 : SUMS);

  wait_before_reading_x();

  if ((int)threadIdx.x < finished) prepare_rest(threadIdx.x);
  const int own = piece * KB + g % SECT * 256, turn = SECT > 1 ? g & 1 : 0;   // see place_of in decode_step_input.cu
  const int of_x = min(g / SECT, M - 1);                                 // what a row beyond the last one gives is not used
  uint4 held[8]; float unscale0 = 1.f, unscale1 = 1.f;
  if (DIRECT) {
    const u16* from = (const u16*)in + (i64)of_x * K + first_column() + own + t * 16;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      held[i] = make_uint4(0, 0, 0, 0);
      if (!CUT || own + i / 2 * 64 < own_columns()) held[i] = fresh16(from + i / 2 * 64 + i % 2 * 8);
    }
    if (TO_FP16) {
      u32 most = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) most = larger_b(larger_b(larger_b(larger_b(most, held[i].x), held[i].y), held[i].z), held[i].w);
      most = max(most & 0xffff, most >> 16);
#pragma unroll
      for (int o = 1; o < 4 * SECT; o *= 2) most = max(most, __float_as_uint(of_other_lane(__uint_as_float(most), o)));
#pragma unroll
      for (int i = 0; i < 8; i++) held[i] = scaled_to_fp16(held[i], x_scale(most));
      const float back = x_unscale(most);
      unscale0 = of_lane(back, 4 * SECT * (2 * t / SECT));
      if (SECT == 1) unscale1 = of_lane(back, 8 * t + 4);
    }
  } else {
    x.load(in, ml, added, stream, eps, one, outer_eps, outer_one, xs, shares, unscale, bars);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; i++) {
      held[i] = make_uint4(0, 0, 0, 0);
      if (!CUT || own + i / 2 * 64 < own_columns()) held[i] = *(const uint4*)(xs + of_x * PITCH + (own + i / 2 * 64) * 2 + t * 32 + (i % 2 ^ turn) * 16);
    }
    if (TO_FP16) { unscale0 = unscale[min(2 * t / SECT, M - 1)]; if (SECT == 1) unscale1 = unscale[min(2 * t + 1, M - 1)]; }
    if (OVER) __syncthreads();                                           // sums come where x is
  }

  // ---- rows of W times x
  int number = 0, place = warp * SUMS;
  for (int tile = warp / PIECES; tile < tiles; tile += STEP, place += WARPS * SUMS) {
    fetch();
    copies_left<DEPTH - 1>();
    __syncwarp();
    const u8* at = ring + number * SLOT;
    if (++number == DEPTH) number = 0;
    const float4 p = ((const float4*)(at + PIECE))[g], q = ((const float4*)(at + PIECE))[g + 8];
    const float s0[4] = {p.x, p.y, p.z, p.w}, s1[4] = {q.x, q.y, q.z, q.w};
    float acc[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int b = 0; b < 4; b++) {
      const uint4 lo = held[2 * b], hi = held[2 * b + 1]; const u32 xa[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
      const u8* w = at + (of_row ^ b << 5);
      const uint2 u = *(const uint2*)w, v = *(const uint2*)(w + 8 * LINE);
      float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 a = h ? u.y : u.x, d = h ? v.y : v.x;
        mma<0>(c, look_up<0>(table, a, lane4), look_up<0>(table, d, lane4), look_up<1>(table, a, lane4), look_up<1>(table, d, lane4), xa[4 * h], xa[4 * h + 1]);
        mma<0>(c, look_up<2>(table, a, lane4), look_up<2>(table, d, lane4), look_up<3>(table, a, lane4), look_up<3>(table, d, lane4), xa[4 * h + 2], xa[4 * h + 3]);
      }
      acc[0] = fmaf(c[0], s0[b], acc[0]); acc[1] = fmaf(c[1], s0[b], acc[1]);
      acc[2] = fmaf(c[2], s1[b], acc[2]); acc[3] = fmaf(c[3], s1[b], acc[3]);
    }
    // A lane has rows g and g + 8 of the operand and columns 2 t and 2 t + 1. Sums of a piece: [R, MP].
    if (SECT == 1) {
      *(float2*)sum_at(place + of_sum) = make_float2(acc[0] * unscale0, acc[1] * unscale1);
      *(float2*)sum_at(place + 8 * MP + of_sum) = make_float2(acc[2] * unscale0, acc[3] * unscale1);
    } else if (SECT == 2) {
      sum_at(place)[of_sum] = (acc[0] + acc[3]) * unscale0;               // a piece's sums are in one line of the table
    } else {
      float v = t & 1 ? (g < 4 ? acc[2] : acc[3]) : (g < 4 ? acc[0] : acc[1]);
      v += of_other_lane(v, 1); v += of_other_lane(v, 16);
      if (of_sum < SUMS) sum_at(place)[of_sum] = v * unscale0;
    }
    __syncwarp();
  }
  __syncthreads();
  // Of this block's columns: row number `row` (of rows), its sum with row m of x, of gate (up 0) or up.
  auto place_of_sum = [&](int row, int up, int m) { return row / TILE_ROWS * (PIECES * SUMS) + (up * TILE_ROWS + row % TILE_ROWS) * MP + m; };
  auto finish = [&](int i, float sum, float up) {
    if (i >= THREADS) { prepare(i); prepare_rest(i); }
    sum += plus0; up += plus1;
    const int m = i % MP, row = r0 + mine0 + i / MP; const i64 where = (i64)m * n + row;
    if (m >= M) return;
    if (GATED) ((u16*)out)[where] = (u16)pack(activated(sum) * up, 0.f);
    else if (SINK == 3) {
      if (row < n0) ((float*)out)[(i64)m * n0 + row] = sum;
      else also[(i64)m * n1 + row - n0] = (u16)pack(activated(sum), 0.f);
    } else if (SINK == 0) ((float*)out)[where] = cap == 0.f ? sum : cap * tanh_(sum / cap);
    else ((float*)out)[where] = sum + rest;
  };
  if (CL == 1) {
    for (int i = threadIdx.x; i < finished; i += THREADS) {
      const int at = place_of_sum(i / MP, 0, i % MP), at_up = place_of_sum(i / MP, GATED, i % MP); float sum = 0.f, up = 0.f;
#pragma unroll
      for (int j = 0; j < PIECES; j++) { sum += *sum_at(at + j * SUMS); if (GATED) up += *sum_at(at_up + j * SUMS); }
      finish(i, sum, up);
    }
  } else {
    constexpr int Q = MP < 4 ? 2 : 4;                                    // sums that a thread sends at once
    for (int i = Q * threadIdx.x; i < rows * MP * BOTH; i += Q * THREADS) {
      const int of = GATED && i >= rows * MP, e = of ? i - rows * MP : i, row = e / MP, m = e % MP, at = place_of_sum(row, of, m), to = row / own_rows;
      float sum[4] = {};
#pragma unroll
      for (int j = 0; j < PIECES; j++) {
        const float* s = sum_at(at + j * SUMS);
#pragma unroll
        for (int q = 0; q < Q; q++) sum[q] += s[q];
      }
      float* p = sent + ((rank * BOTH + of) * own_rows + row - to * own_rows) * MP + m;
      if (to == rank) {
#pragma unroll
        for (int q = 0; q < Q; q++) p[q] = sum[q];
      } else if (Q == 4) push4(p, to, make_float4(sum[0], sum[1], sum[2], sum[3]), bars + 16);
      else for (int q = 0; q < Q; q++) send(p + q, to, sum[q], bars + 16);
    }
    __syncthreads();
    wait_for_blocks(bars + 16, 0);
    for (int i = threadIdx.x; i < finished; i += THREADS) {
      float sum = 0.f, up = 0.f;
#pragma unroll
      for (int j = 0; j < CL; j++) { const float* s = sent + j * BOTH * own_rows * MP + i; sum += s[0]; if (GATED) up += s[own_rows * MP]; }
      finish(i, sum, up);
    }
  }
  copies_left<0>();
}
