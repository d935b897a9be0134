// y = f(x) W^T for the one row of a decoding step and 4-bit W, in blocks of 64 with float32 scales, K of them a multiple of 256.
// What x and the sinks are, and the arguments: decode_step_product.cu. decode_step_input.cu comes before this text.
//
// One row of x leaves seven of mma's eight columns free, so a tile has R = 4 rows of W, and the operand's 16 rows are SECT = 4 sections
// of 256 columns of each: column j has the section j % 4 of x, and of the sums that of each row's own section counts. A piece is four rows
// of 512 bytes. A warp has the same columns of every tile it takes, so it holds their x in registers. Every piece has a
// place of its own for its R sums, which meet once, at the end, in the order of the pieces. 16-bit x goes from memory straight into
// registers, scaled by the largest of the warp's own columns: nothing meets between the wait and the end.
// SINK 2: half of a tile's rows are of gate, the others the same rows of up. Elsewhere a tile is of one matrix: their rows are whole tiles.
// Filled in: WARPS (a multiple of the pieces of a row), DEPTH (pieces in a warp's ring), and what decode_step_product.cu and
// decode_step_input.cu name.
constexpr int R = 16 / SECT, LINE = 128, PIECE = 2048, SLOT = PIECE + 256, PIECES = (K + KB - 1) / KB, STEP = WARPS / PIECES;
constexpr int ROW_BYTES = K / 2, ROW_SCALES = K / 64, CUT = K % KB != 0;
constexpr int GATED = SINK == 2, PARTS = SINK == 0 || SINK == 3, TILE_ROWS = GATED ? R / 2 : R, DIRECT = SOURCE == 2;
static_assert(FMT == 2 && !NESTED && M == 1 && CL == 1 && SECT == 4 && CB == SECT * LINE && K % 256 == 0, "one row, whole groups of scales");
static_assert(WARPS % PIECES == 0, "a warp has the same columns of each tile");

__global__ void __launch_bounds__(THREADS, 1)
product(const u8* w0, const u8* w1, const u8* w2, const void* absmax0, const void* absmax1, const void* absmax2,
        const float* nested0, const float* nested1, const float* nested2, const float* offset0, const float* offset1, const float* offset2,
        const u16* bias0, const u16* bias1, const u16* bias2, const float* map, const u16* gain, const u16* norm_bias, const u16* outer_gain,
        const u16* outer_bias, const void* in, const float2* ml, const float* added, float* stream, void* out, u16* also,
        int n0, int n1, int n2, int shift,
        float eps, float one, float outer_eps, float outer_one, float cap) {
  SHARED(smem);
  const int lane = threadIdx.x & 31, warp = of_warp(threadIdx.x >> 5), g = lane >> 2, t = lane & 3, piece = warp % PIECES;
  const int n = GATED ? n0 : n0 + n1 + n2, all = n / TILE_ROWS;
  const int tile0 = (int)((i64)all * blockIdx.x / gridDim.x), tiles = (int)((i64)all * (blockIdx.x + 1) / gridDim.x) - tile0;
  const int r0 = tile0 * TILE_ROWS, rows = tiles * TILE_ROWS;
  u8 *table = smem, *xs = smem + TABLE;
  float* shares = (float*)(xs + PITCH);                                  // of the warps, see decode_step_input.cu
  float* unscale = shares + SHARES;                                      // what undoes the scale of x
  u8* rings = xs + (PITCH + (SHARES + 1) * 4 + LINE - 1) / LINE * LINE;
  u8* ring = rings + warp * DEPTH * SLOT;
  float* red = (float*)(rings + WARPS * DEPTH * SLOT);                   // [tiles, PIECES, R]
  const u64 policy = evict_first();

  // Copy j of a piece: row j, 16 bytes a lane. Operand row q * R + r is section q of row r.
  const Shared base = shared(ring + lane / 8 * R * LINE + lane % 8 * 16);
  const Shared scales_base = shared(ring + PIECE + (lane % SECT * R + lane / SECT % R) * 16);
  // Where this lane's copies and scales of the block's first tile lie, in each matrix; what lies outside of the row is not read.
  const int column = piece * CB + lane * 16, take = !CUT || column < ROW_BYTES ? 16 : 0;
  const int block = (piece * SECT + lane % SECT) * 4, take_scales = !CUT || block < ROW_SCALES ? 16 : 0;
  const i64 from_row = (i64)r0 * ROW_BYTES + (take ? column : 0);
  const i64 scale_at = (i64)(r0 + lane / SECT % TILE_ROWS) * ROW_SCALES + (take_scales ? block : 0);
  const i64 back1 = PARTS ? n0 : 0, back2 = n0 + n1;
  const u8 *p0 = w0 + from_row, *p1 = w1 + (from_row - back1 * ROW_BYTES), *p2 = w2 + (from_row - back2 * ROW_BYTES);
  const float* s0_ = (const float*)(GATED && lane / SECT % R >= TILE_ROWS ? absmax1 : absmax0) + scale_at;
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
        const Shared to = (Shared)((u64)slot ^ (u64)(j << 5)) + j * LINE;
        copy16(to, (j < TILE_ROWS ? a : b) + past + j % TILE_ROWS * ROW_BYTES, take, policy);
      }
      if (lane < 16) copy16(scales_base + (int)(slot - base), s + (u32)(next * (TILE_ROWS * ROW_SCALES)), take_scales);
      next += STEP;
    }
    slot = slot == slot_end ? base : slot + SLOT;
    commit();
  };

  // ---- what does not depend on the kernels before
  let_next_kernel_start();
#pragma unroll
  for (int i = 0; i < DEPTH - 1; i++) fetch();
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
  float plus0 = 0.f, plus1 = 0.f, rest = 0.f;                            // of the first row that this thread finishes
  if (threadIdx.x < rows) { plus0 = bias_of(r0 + threadIdx.x, false); if (GATED) plus1 = bias_of(r0 + threadIdx.x, true); }

  wait_before_reading_x();

  if (SINK == 1 && threadIdx.x < rows) rest = fresh((const float*)out + r0 + threadIdx.x);
  const int own = piece * KB + g % SECT * 256, turn = g & 1;   // see place_of in decode_step_input.cu
  uint4 held[8]; float own_unscale = 1.f;
  if (DIRECT) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      held[i] = make_uint4(0, 0, 0, 0);
      if (!CUT || own + i / 2 * 64 < K) held[i] = fresh16((const u16*)in + own + i / 2 * 64 + t * 16 + i % 2 * 8);
    }
    if (TO_FP16) {
      u32 most = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) most = max(most, largest(held[i]));
      most = warp_max(most);
      const float scale = x_scale(most); own_unscale = x_unscale(most);
#pragma unroll
      for (int i = 0; i < 8; i++) held[i] = to_fp16(held[i], scale);
    }
  } else {
    x.load(in, ml, added, stream, eps, one, outer_eps, outer_one, xs, shares, unscale);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; i++) {
      held[i] = make_uint4(0, 0, 0, 0);
      if (!CUT || own + i / 2 * 64 < K) held[i] = *(const uint4*)(xs + (own + i / 2 * 64) * 2 + t * 32 + (i % 2 ^ turn) * 16);
    }
  }

  // ---- rows of W times x
  const u32 lane4 = (u32)(shared(smem + lane * 4) - shared(smem));        // lane * 4, of which the compiler cannot know: one instruction less a look-up
  int number = 0;
  float* sums = red + warp * R;
  for (int tile = warp / PIECES; tile < tiles; tile += STEP, sums += WARPS * R) {
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
      const u8* w = at + ((b * 2 + (t >> 1)) ^ (g & 3) << 1) * 16 + (t & 1) * 8;
      const uint2 u = *(const uint2*)(w + g * LINE), v = *(const uint2*)(w + (g + 8) * LINE);
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
    if (DIRECT && TO_FP16) { acc[0] *= own_unscale; acc[1] *= own_unscale; acc[2] *= own_unscale; acc[3] *= own_unscale; }
    // Operand row m holds section m / R of row m % R; its sum is in column m / R.
    float v = t & 1 ? (g < 4 ? acc[2] : acc[3]) : (g < 4 ? acc[0] : acc[1]);
    v += of_other_lane(v, 1); v += of_other_lane(v, 16);
    if (lane < 16 && t == 0) sums[g] = v;
    __syncwarp();
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows; i += THREADS) {
    const float* s = red + i / TILE_ROWS * (PIECES * R) + i % TILE_ROWS; const int row = r0 + i; float sum = 0.f, up = 0.f;
#pragma unroll
    for (int j = 0; j < PIECES; j++) { sum += s[j * R]; if (GATED) up += s[j * R + TILE_ROWS]; }
    if (!DIRECT && TO_FP16) { sum *= unscale[0]; up *= unscale[0]; }
    if (i >= THREADS) {
      plus0 = bias_of(row, false);
      if (GATED) plus1 = bias_of(row, true);
      if (SINK == 1) rest = fresh((const float*)out + row);
    }
    sum += plus0; up += plus1;
    if (GATED) ((u16*)out)[row] = (u16)pack(activated(sum) * up, 0.f);
    else if (SINK == 3) {
      if (row < n0) ((float*)out)[row] = sum;
      else also[row - n0] = (u16)pack(activated(sum), 0.f);
    } else if (SINK == 0) ((float*)out)[row] = cap == 0.f ? sum : cap * tanh_(sum / cap);
    else ((float*)out)[row] = sum + rest;
  }
  copies_left<0>();
}
