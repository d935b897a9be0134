// y = f(x) W^T for the one row of a decoding step, int8 W or 4-bit W in blocks of 64 with float32 scales (K then a multiple of 256).
// What x and the sinks are, and the arguments: decode_step_product.cu. decode_step_input.cu comes before this text.
//
// A piece is R = 2 RP rows of W, CB bytes of each, which a bulk copy each brings into the ring of one warp: long reads, of many at once, that do not
// stand before the loads of x. One row of x would leave seven of mma's eight columns free: a row is SECT = 8 sections of COLS columns, the operand's row
// m is section m % 8 of row m / 8, column j of the other has section j of x, and of the sums those count whose sections are one. A warp has the same columns of
// every tile it takes, and holds their x in registers. Every piece has a place of its own for its R sums, which meet once, at the end, in
// the order of the pieces.
// SINK 2: rows of gate and up alternate. share_, in place of shift: rows of a block. Filled in: WARPS (a multiple of the pieces of a row), DEPTH (pieces in a warp's ring), RP, COLS, HALF (int8: bf16 x
// becomes fp16, exactly up to a power of two), and what decode_step_product.cu and decode_step_input.cu name.
constexpr int R = 2 * RP, SECTION = CB / SECT, SCALES = FMT == 2 ? CB / 8 : 0, SLOT = R * (CB + SCALES);
constexpr int PIECES = (K + KB - 1) / KB, STEP = WARPS / PIECES, CHUNKS = COLS / 64, CUT = K % KB != 0, CHUNK = SECTION / CHUNKS;
constexpr int ROW_BYTES = FMT == 1 ? K : K / 2, ROW_SCALES = K / 64, MMA_BF16 = BF16 && !TO_FP16;
constexpr int GATED = SINK == 2, PARTS = SINK == 0 || SINK == 3, TILE_ROWS = GATED ? RP : R, DIRECT = SOURCE == 2;
static_assert((FMT == 1 || FMT == 2) && !NESTED && M == 1 && CL == 1 && SECT == 8 && KB == 8 * COLS && K % (FMT == 2 ? 256 : 64) == 0, "one row, whole groups");
static_assert(WARPS % PIECES == 0, "a warp has the same columns of each tile");

// As int8_pair, but with the constants in registers: an instruction takes one immediate, and ptxas would move the other into place each time.
struct Int8 {
  u32 a, b;
  DEVICE void prepare(const u8* p) { a = hidden(MMA_BF16 ? 0x43004300u : 0x64646464u, p); if (MMA_BF16) b = hidden(0xc300c300u, p); }
  template <int H> DEVICE u32 pair(u32 w) const {
    if (!MMA_BF16) return sub_h(__byte_perm(w ^ 0x80808080u, a, H ? 0x4342 : 0x4140), 0x64806480u);
    const u32 v = __byte_perm(w, 0, H ? 0x3322 : 0x1100);
    return add_b(v & 0x007f007fu | a, v & 0x00800080u | b);
  }
};

__global__ void __launch_bounds__(THREADS, 1)
product(const u8* w0, const u8* w1, const u8* w2, const void* absmax0, const void* absmax1, const void* absmax2,
        const float* nested0, const float* nested1, const float* nested2, const float* offset0, const float* offset1, const float* offset2,
        const u16* bias0, const u16* bias1, const u16* bias2, const float* map, const u16* gain, const u16* norm_bias, const u16* outer_gain,
        const u16* outer_bias, const void* in, const float2* ml, const float* added, float* stream, void* out, u16* also,
        int n0, int n1, int n2, int share_,
        float eps, float one, float outer_eps, float outer_one, float cap) {
  SHARED(smem);
  const int lane = threadIdx.x & 31, warp = of_warp(threadIdx.x >> 5), g = lane >> 2, t = lane & 3, piece = warp % PIECES;
  const int more = (GATED ? n0 : n0 + n1 + n2) - share_ * (int)gridDim.x;   // the first blocks have a row more
  const int block = blockIdx.x, r0 = block * share_ + min(block, more), rows = share_ + (block < more ? 1 : 0);
  const int tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  u8 *table = smem, *xs = smem + TABLE;
  float* shares = (float*)(xs + (DIRECT ? 0 : PITCH));                   // of the warps, see decode_step_input.cu
  float* unscale = shares + SHARES;                                      // what undoes the scale of x
  u8* bars = xs + ((DIRECT ? 0 : PITCH) + (SHARES + 1) * 4 + 15) / 16 * 16 + warp * DEPTH * 8;
  u8* rings = xs + ((DIRECT ? 0 : PITCH) + (SHARES + 1) * 4 + 15 + WARPS * DEPTH * 8 + 127) / 128 * 128;
  u8* ring = rings + warp * DEPTH * SLOT;
  float* red = (float*)(rings + WARPS * DEPTH * SLOT);                   // [tiles, PIECES, R]
  const u64 policy = evict_first();

  // ---- what does not depend on the kernels before
  let_next_kernel_start();
  if (lane == 0) {
    for (int i = 0; i < DEPTH; i++) barrier_init(bars + 8 * i, 1);
    barriers_ready();
  }
  __syncwarp();
  const int at_byte = piece * CB, bytes = CUT ? min(CB, ROW_BYTES - at_byte) : CB;
  if (FMT == 2 && CUT && bytes < CB) {                                   // scales of no columns: they meet zeros, and may not be NaN
    for (int i = lane; i < DEPTH * R * (SCALES / 4); i += 32) ((float*)(ring + i / (R * (SCALES / 4)) * SLOT + R * CB))[i % (R * (SCALES / 4))] = 0.f;
    copies_seen_by_wgmma();
    __syncwarp();
  }
  int next = warp / PIECES;                                              // the tile that is sent for
  auto fetch = [&](int slot) {
    if (next < tiles) {
      const int count = min(TILE_ROWS, rows - next * TILE_ROWS) * (1 + GATED);
      u8 *to = ring + slot * SLOT, *full = bars + 8 * slot;
      if (lane == 0) arrive_and_expect(full, count * (bytes + (FMT == 2 ? bytes / 8 : 0)));
      __syncwarp();
      const int line = lane % R;
      if (lane < (FMT == 2 ? 2 * R : R) && line < count) {
        int row = r0 + next * TILE_ROWS + (GATED ? line / 2 : line);
        const u8* w = w0; const void* s = absmax0;
        if (GATED && line % 2) { w = w1; s = absmax1; }
        if (PARTS && row >= n0 + n1) { w = w2; s = absmax2; row -= n0 + n1; }
        else if (PARTS && row >= n0) { w = w1; s = absmax1; row -= n0; }
        if (lane < R) bulk_copy(to + line * CB, w + (i64)row * ROW_BYTES + at_byte, bytes, full, policy);
        else bulk_copy(to + R * CB + line * SCALES, (const u8*)s + (i64)row * (ROW_SCALES * 4) + piece * SCALES, bytes / 8, full, policy);
      }
      next += STEP;
    }
  };
#pragma unroll 1
  for (int i = 0; i < DEPTH; i++) fetch(i);
  Input x;
  x.prepare(gain, norm_bias, outer_gain, outer_bias, shares);
  build_table(table, THREADS);
  if (FMT == 2 && DIRECT) __syncthreads();
  auto bias_of = [&](int row, bool up) {
    const u16* b = up ? bias1 : bias0;
    if (PARTS && row >= n0 + n1) { b = bias2; row -= n0 + n1; }
    else if (PARTS && row >= n0) { b = bias1; row -= n0; }
    return b ? value(b[row]) : 0.f;
  };
  auto scale_of = [&](int row, bool up) {                                // int8: of a row
    if (FMT != 1) return 1.f;
    const float* s = (const float*)(up ? absmax1 : absmax0);
    if (PARTS && row >= n0 + n1) { s = (const float*)absmax2; row -= n0 + n1; }
    else if (PARTS && row >= n0) { s = (const float*)absmax1; row -= n0; }
    return s[row] * (1.f / 127.f);
  };
  float plus0 = 0.f, plus1 = 0.f, scale0 = 1.f, scale1 = 1.f, rest = 0.f;   // of the row that this thread finishes
  auto prepare = [&](int row) {
    plus0 = bias_of(row, false); scale0 = scale_of(row, false);
    if (GATED) { plus1 = bias_of(row, true); scale1 = scale_of(row, true); }
  };
  if (threadIdx.x < rows) prepare(r0 + threadIdx.x);

  wait_before_reading_x();

  if (SINK == 1 && threadIdx.x < rows) rest = fresh((const float*)out + r0 + threadIdx.x);
  // Chunks of 64 columns: every other section (4 bits: each of four) takes them in another order, so that a fragment spreads over the banks.
  const int own = piece * KB + g * COLS, turn = g & (FMT == 1 ? 1 : 3);
  uint4 held[2 * CHUNKS]; float own_unscale = 1.f;
  if (!DIRECT) {
    x.load(in, ml, added, stream, eps, one, outer_eps, outer_one, xs, shares, unscale);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 2 * CHUNKS; i++) {
    const int column = own + (i / 2 ^ turn) * 64;
    held[i] = make_uint4(0, 0, 0, 0);
    if (!CUT || column < K) held[i] = DIRECT ? fresh16((const u16*)in + column + t * 16 + i % 2 * 8) : *(const uint4*)(xs + column * 2 + t * 32 + (i % 2 ^ (g & 1)) * 16);
  }
  if (DIRECT && TO_FP16) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 2 * CHUNKS; i++) most = max(most, largest(held[i]));
    most = warp_max(most);
    const float scale = x_scale(most); own_unscale = x_unscale(most);
#pragma unroll
    for (int i = 0; i < 2 * CHUNKS; i++) held[i] = to_fp16(held[i], scale);
  }

  // ---- rows of W times x
  const u32 lane4 = (u32)(shared(smem + lane * 4) - shared(smem));       // lane * 4, of which the compiler cannot know: one instruction less a look-up
  Int8 int8; int8.prepare(smem);
  int slot = 0, parity = 0;
  float* sums = red + warp * R;
  for (int tile = warp / PIECES; tile < tiles; tile += STEP, sums += WARPS * R) {
    wait_for(bars + 8 * slot, parity);
    const u8* at = ring + slot * SLOT;
#pragma unroll
    for (int sub = 0; sub < RP; sub++) {
      float acc[2][4] = {};
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        const uint4 lo = held[2 * c], hi = held[2 * c + 1]; const u32 xa[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
        const u8* w = at + 2 * sub * CB + g * SECTION + (c ^ turn) * CHUNK + t * (CHUNK / 4);
        if constexpr (FMT == 1) {
          const uint4 p = *(const uint4*)w, q = *(const uint4*)(w + CB);
          const u32 u[4] = {p.x, p.y, p.z, p.w}, v[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
          for (int h = 0; h < 4; h++)
            mma<MMA_BF16>(acc[c & 1], int8.pair<0>(u[h]), int8.pair<0>(v[h]), int8.pair<1>(u[h]), int8.pair<1>(v[h]), xa[2 * h], xa[2 * h + 1]);
        } else {
          const uint2 u = *(const uint2*)w, v = *(const uint2*)(w + CB);
          const float* s = (const float*)(at + R * CB + 2 * sub * SCALES) + g * CHUNKS + (c ^ turn); const float s0 = s[0], s1 = s[SCALES / 4];
          float e[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const u32 a = h ? u.y : u.x, d = h ? v.y : v.x;
            mma<0>(e, look_up<0>(table, a, lane4), look_up<0>(table, d, lane4), look_up<1>(table, a, lane4), look_up<1>(table, d, lane4), xa[4 * h], xa[4 * h + 1]);
            mma<0>(e, look_up<2>(table, a, lane4), look_up<2>(table, d, lane4), look_up<3>(table, a, lane4), look_up<3>(table, d, lane4), xa[4 * h + 2], xa[4 * h + 3]);
          }
          acc[0][0] = fmaf(e[0], s0, acc[0][0]); acc[0][1] = fmaf(e[1], s0, acc[0][1]);
          acc[0][2] = fmaf(e[2], s1, acc[0][2]); acc[0][3] = fmaf(e[3], s1, acc[0][3]);
        }
      }
      // Of both rows, section g's sum is in column g: lane t = g / 2. Those eight lanes are 4, 9 and 18 apart; even ones end with the first row's sum.
      float even = g & 1 ? acc[0][1] : acc[0][0], odd = g & 1 ? acc[0][3] : acc[0][2];
      if (FMT == 1) { even += g & 1 ? acc[1][1] : acc[1][0]; odd += g & 1 ? acc[1][3] : acc[1][2]; }
      float v = (g & 1 ? odd : even) + of_other_lane(g & 1 ? even : odd, 4);
      v += of_other_lane(v, 9); v += of_other_lane(v, 18);
      if ((lane & ~4) == 0) sums[2 * sub + (lane >> 2)] = DIRECT && TO_FP16 ? v * own_unscale : v;
    }
    __syncwarp();
    fetch(slot);
    if (++slot == DEPTH) { slot = 0; parity ^= 1; }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows; i += THREADS) {
    const float* s = red + i / TILE_ROWS * (PIECES * R) + i % TILE_ROWS * (1 + GATED); const int row = r0 + i; float sum = 0.f, up = 0.f;
#pragma unroll
    for (int j = 0; j < PIECES; j++) { sum += s[j * R]; if (GATED) up += s[j * R + 1]; }
    if (!DIRECT && TO_FP16) { sum *= unscale[0]; up *= unscale[0]; }
    if (i >= THREADS) { prepare(row); if (SINK == 1) rest = fresh((const float*)out + row); }
    sum = fmaf(sum, scale0, plus0); up = fmaf(up, scale1, plus1);
    if (GATED) ((u16*)out)[row] = (u16)pack(activated(sum) * up, 0.f);
    else if (SINK == 3) {
      if (row < n0) ((float*)out)[row] = sum;
      else also[row - n0] = (u16)pack(activated(sum), 0.f);
    } else if (SINK == 0) ((float*)out)[row] = cap == 0.f ? sum : cap * tanh_(sum / cap);
    else ((float*)out)[row] = sum + rest;
  }
}
