// y = f(x) W^T for the one row of a decoding step and int8 W. What x and the sinks are, and the arguments: decode_step_product.cu.
// decode_step_input.cu comes before this text.
//
// A piece is R = 2 RP rows of W, CB columns of each, which a bulk copy each brings into the ring of one warp: long reads, of many at once, that do not
// stand before the loads of x. One row of x would leave seven of mma's eight columns free: a row is SECT = 8 sections of COLS columns, the operand's row
// m is section m % 8 of row m / 8, column j of the other has section j of x, and of the sums those count whose sections are one. A warp has the same columns of
// every tile it takes, and holds their x in registers. Every piece has a place of its own for its R sums, which meet once, at the end, in
// the order of the pieces.
// bf16 x becomes fp16, for which int8 takes 100 instructions a KB, not 140. A power of two brings the largest of the row (16-bit x: of the
// warp's columns) to 2^13 or above: what is above 2^-30 of it is then exact, what is below is off by less than 2^-38 of it.
// SINK 2: rows of gate and up alternate. share_, in place of shift: rows of a block. Filled in: WARPS (a multiple of the pieces of a row), DEPTH (pieces
// in a warp's ring), RP, COLS, and what decode_step_product.cu and decode_step_input.cu name.
constexpr int R = 2 * RP, SLOT = R * CB;
constexpr int PIECES = (K + KB - 1) / KB, STEP = WARPS / PIECES, CHUNKS = COLS / 64, CUT = K % KB != 0;
constexpr int GATED = SINK == 2, PARTS = SINK == 0 || SINK == 3, TILE_ROWS = GATED ? RP : R, DIRECT = SOURCE == 2;
static_assert(FMT == 1 && M == 1 && CL == 1 && SECT == 8 && KB == 8 * COLS && K % 64 == 0 && (TO_FP16 || !BF16), "one row, in chunks of 64 columns");
static_assert(WARPS % PIECES == 0, "a warp has the same columns of each tile");

// Two weights as fp16, as few_rows_common.cu makes them, but with the constant in a register: an instruction takes one immediate, and ptxas would move the other into place each time.
template <int H> DEVICE u32 pair_of(u32 w, u32 a) { return sub_h(__byte_perm(w ^ 0x80808080u, a, H ? 0x4342 : 0x4140), 0x64806480u); }

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
  u8* xs = smem;
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
  const int at_byte = piece * CB, bytes = CUT ? min(CB, K - at_byte) : CB;
  int next = warp / PIECES;                                              // the tile that is sent for
  auto fetch = [&](int slot) {
    if (next < tiles) {
      const int count = min(TILE_ROWS, rows - next * TILE_ROWS) * (1 + GATED);
      u8 *to = ring + slot * SLOT, *full = bars + 8 * slot;
      if (lane == 0) arrive_and_expect(full, count * bytes);
      __syncwarp();
      if (lane < count) {
        int row = r0 + next * TILE_ROWS + (GATED ? lane / 2 : lane);
        const u8* w = GATED && lane % 2 ? w1 : w0;
        if (PARTS && row >= n0 + n1) { w = w2; row -= n0 + n1; }
        else if (PARTS && row >= n0) { w = w1; row -= n0; }
        bulk_copy(to + lane * CB, w + (i64)row * K + at_byte, bytes, full, policy);
      }
      next += STEP;
    }
  };
#pragma unroll 1
  for (int i = 0; i < DEPTH; i++) fetch(i);
  Input x;
  x.prepare(gain, norm_bias, outer_gain, outer_bias, shares);
  auto bias_of = [&](int row, bool up) {
    const u16* b = up ? bias1 : bias0;
    if (PARTS && row >= n0 + n1) { b = bias2; row -= n0 + n1; }
    else if (PARTS && row >= n0) { b = bias1; row -= n0; }
    return b ? value(b[row]) : 0.f;
  };
  auto scale_of = [&](int row, bool up) {
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
  // Chunks of 64 columns: every other section takes them in another order, so that a fragment spreads over the banks.
  const int own = piece * KB + g * COLS, turn = g & 1;
  uint4 held[2 * CHUNKS]; float own_unscale = 1.f;
  if (!DIRECT) {
    x.load(in, ml, added, stream, eps, one, outer_eps, outer_one, xs, shares, unscale);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 2 * CHUNKS; i++) {
    const int column = own + (i / 2 ^ turn) * 64;
    held[i] = make_uint4(0, 0, 0, 0);
    if (!CUT || column < K) held[i] = DIRECT ? fresh16((const u16*)in + column + t * 16 + i % 2 * 8) : *(const uint4*)(xs + column * 2 + t * 32 + (i % 2 ^ turn) * 16);
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
  const u32 magic = hidden(0x64646464u, smem);
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
        const u8* w = at + 2 * sub * CB + g * COLS + (c ^ turn) * 64 + t * 16;
        const uint4 p = *(const uint4*)w, q = *(const uint4*)(w + CB);
        const u32 u[4] = {p.x, p.y, p.z, p.w}, v[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int h = 0; h < 4; h++)
          mma<0>(acc[c & 1], pair_of<0>(u[h], magic), pair_of<0>(v[h], magic), pair_of<1>(u[h], magic), pair_of<1>(v[h], magic), xa[2 * h], xa[2 * h + 1]);
      }
      // Of both rows, section g's sum is in column g: lane t = g / 2. Those eight lanes are 4, 9 and 18 apart; even ones end with the first row's sum.
      const float even = g & 1 ? acc[0][1] + acc[1][1] : acc[0][0] + acc[1][0], odd = g & 1 ? acc[0][3] + acc[1][3] : acc[0][2] + acc[1][2];
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
