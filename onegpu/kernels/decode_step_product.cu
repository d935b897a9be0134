// y = f(x) W^T for the M rows of a decoding step, with what stands before and after it in a layer.
//
// x: see decode_step_input.cu, which comes before this text.
// SINK    0  y, float32 [M, N], with bias; W is up to three matrices below one another (q, k, v). cap: cap tanh(y / cap), if not 0
//         1  h += y, float32 [M, N]
//         2  act(gate) * up, 16-bit [M, N]; W is two matrices (gate, up)
//         3  y of the first matrix (which may have no rows), float32 [M, n0], and act(y) of the second, 16-bit [M, n1], into `also`
// Filled in: M, K, WARPS, SLOTS, CB (bytes of a row in a piece), TG (tiles between two sums), PER_SM, SOURCE, SINK, SPLITS, HD, ACT,
// and what decode_step_input.cu names.
//
// A block takes a range of rows of W in tiles of 16 (SINK 2: 8 of gate, 8 of up). The pieces of its tiles (16 rows, CB bytes
// of each) go round the warps; each warp streams its own through a ring of its own, without a barrier. The rings are filled
// before the kernel waits for the one in front of it: weights do not change during a step. A block has an SM for itself;
// the next kernel's comes as soon as it has left, and fills its rings while other SMs still work.
// W is the 16-row operand of the mma, x the 8-column one; the contraction runs in the order in which bytes are stored.
constexpr int GROUP = FMT == 0 ? 32 : 64, GROUPS = KB / GROUP;         // columns that the four lanes of a row take together
constexpr int SCALES = FMT == 2 ? GROUPS : 0, PER_ROW = SCALES ? SCALES : 1, PIECE = 16 * CB, SLOT = PIECE + 64 * SCALES;
constexpr int SUMS = TG * WARPS * 16 * M;
constexpr int MMA_BF16 = BF16 && FMT != 2;
constexpr int ROW_BYTES = FMT == 0 ? 2 * K : FMT == 1 ? K : K / 2;
constexpr int GATED = SINK == 2, PARTS = SINK == 0 || SINK == 3, TILE_ROWS = GATED ? 8 : 16;
static_assert(K % 64 == 0, "K is a multiple of 64");
static_assert(TG * 16 * M <= THREADS, "a thread finishes one sum");

struct Part { const u8* w; const void* absmax; const float *nested, *offset; const u16* bias; };

DEVICE float activated(float x) {
  if (ACT == 0) return x / (1.f + exp2_(-LOG2E * x));
  if (ACT == 3) return x < 0.f ? 0.f : x;                                // NaN stays
  if (ACT == 1) { float z = 0.7978845608028654f * fmaf(0.044715f * x * x, x, x); return x / (1.f + exp2_(-2.f * LOG2E * z)); }
  return 0.5f * x * (1.f + erff(x * 0.7071067811865476f));
}

__global__ void __launch_bounds__(THREADS, PER_SM)
product(const u8* w0, const u8* w1, const u8* w2, const void* absmax0, const void* absmax1, const void* absmax2,
        const float* nested0, const float* nested1, const float* nested2, const float* offset0, const float* offset1, const float* offset2,
        const u16* bias0, const u16* bias1, const u16* bias2, const float* map, const u16* gain, const u16* norm_bias, const u16* outer_gain,
        const u16* outer_bias, const void* in, const float2* ml, const float* added, float* stream, void* out, u16* also,
        int n0, int n1, int n2, int shift, float eps, float one, float outer_eps, float outer_one, float cap) {
  SHARED(smem);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int n = GATED ? n0 : n0 + n1 + n2;
  const int r0 = (int)((i64)n * blockIdx.x / gridDim.x), r1 = (int)((i64)n * (blockIdx.x + 1) / gridDim.x);
  const int tiles = (r1 - r0 + TILE_ROWS - 1) / TILE_ROWS;
  u8* table = smem;
  float* map_ = (float*)(smem + TABLE);
  u8* xs = smem + TABLE + (NESTED ? 1024 : 0);
  float* red = (float*)(xs + M * PITCH);
  float* shares = red + 2 * SUMS;                                        // of the warps, see decode_step_input.cu
  float* unscale = shares + SHARES;                                      // what undoes each row's scale
  u8* ring = (u8*)(red + 2 * SUMS) + (SHARES + M + 3) / 4 * 16 + warp * SLOTS * SLOT;
  const u64 policy = evict_first();
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

  constexpr int UNITS = CB / 16, STEP = 32 / UNITS;                      // a warp copies STEP rows at once
  const int f_line = lane / UNITS, f_unit = lane % UNITS, f_place = f_line * CB + swizzled<CB>(f_line, f_unit) * 16;
  const Shared first_slot = shared(ring + f_place);
  Shared f_slot = first_slot;
  int fetched = warp;                                                    // pieces are counted through all tiles
  auto fetch = [&]() {
    if (fetched < tiles * PIECES) {
      const int tile = fetched / PIECES, piece = fetched % PIECES, row0 = r0 + tile * TILE_ROWS + f_line, at = piece * CB + f_unit * 16;
      const bool there = K % KB == 0 || at < ROW_BYTES; const i64 from = there ? at : 0;
#pragma unroll
      for (int j = 0; j < 16 / STEP; j++) {                              // the swizzle is the same every STEP rows
        const int row = row0 + j * STEP % TILE_ROWS; const u8* w = GATED && j * STEP >= 8 ? w1 : w0;
        if (PARTS) w = row >= n0 + n1 ? w2 - (i64)(n0 + n1) * ROW_BYTES : row >= n0 ? w1 - (i64)n0 * ROW_BYTES : w0;
        if (row < r1) copy16(f_slot + j * STEP * CB, w + (i64)row * ROW_BYTES + from, there ? 16 : 0, policy);
      }
#pragma unroll
      for (int j = 0; j < SCALES / 2; j++) {
        int e = lane + 32 * j, r = e / PER_ROW, b = piece * PER_ROW + e % PER_ROW, row;
        Part p = part_of(tile, r, row); const Scales scales = {p.absmax, p.nested, map, p.offset, shift, 8};
        scales.fetch(f_slot + (PIECE + e * 4 - f_place), (i64)row * (K / 64) + b, inside(tile, r) && b < K / 64);
      }
      fetched += WARPS;
    }
    f_slot = f_slot == first_slot + (SLOTS - 1) * SLOT ? first_slot : f_slot + SLOT;
    commit();
  };

  // ---- what does not depend on the kernels before
  let_next_kernel_start();
#pragma unroll
  for (int i = 0; i < SLOTS - 1; i++) fetch();
  Input x;
  x.prepare(gain, norm_bias, outer_gain, outer_bias, shares);
  if (NESTED) for (int i = threadIdx.x; i < 256; i += THREADS) map_[i] = map[i];
  build_table(table, THREADS);
  constexpr int TAIL = (PIECES * KB - K) / 4, SAFE = TAIL ? TAIL : 1;      // x past the last column, in the last piece
  for (int i = threadIdx.x; i < M * TAIL; i += THREADS) *(uint2*)(xs + i / SAFE * PITCH + 2 * K + i % SAFE * 8) = make_uint2(0, 0);
  // The sum that this thread finishes in a group of tiles, and what is added and multiplied there.
  const int f_tile = threadIdx.x / (TILE_ROWS * M), f_row = threadIdx.x / M % TILE_ROWS, f_m = threadIdx.x % M;
  const bool finishes = f_tile < TG;
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
  prepare(0);

  wait_before_reading_x();

  if (SINK == 1 && finishes && inside(f_tile, f_row)) rest = fresh((const float*)out + (i64)f_m * n + r0 + f_tile * 16 + f_row);
  x.load(in, ml, added, stream, eps, one, outer_eps, outer_one, xs, shares, unscale);
  __syncthreads();

  // ---- rows of W times x
  const u32 lane4 = lane * 4;
  const u8* x_lane = xs + g % M * PITCH + t * (GROUP / 2);
  float acc[4] = {0.f, 0.f, 0.f, 0.f};
  int slot_no = 0, at = warp;
  for (int q0 = 0, odd = 0; q0 < tiles; q0 += TG, odd ^= 1) {
    const int q1 = min(q0 + TG, tiles); int done = q0; float* sums = red + odd * SUMS;
    if (q0) prepare(q0);
    if (SINK == 1 && q0 && finishes && inside(q0 + f_tile, f_row)) rest = fresh((const float*)out + (i64)f_m * n + r0 + (q0 + f_tile) * 16 + f_row);
    auto flush = [&](int upto) {
      for (; done < upto; done++) {
        float* s = sums + ((done - q0) * WARPS + warp) * 16 * M;
        if (M == 1) { if (t == 0) { s[g] = acc[0]; s[g + 8] = acc[2]; } }
        else {
          if (2 * t < M) { s[g * M + 2 * t] = acc[0]; s[(g + 8) * M + 2 * t] = acc[2]; }
          if (2 * t + 1 < M) { s[g * M + 2 * t + 1] = acc[1]; s[(g + 8) * M + 2 * t + 1] = acc[3]; }
        }
        acc[0] = acc[1] = acc[2] = acc[3] = 0.f;
      }
    };
    for (; at < q1 * PIECES; at += WARPS) {
      const int tile = at / PIECES, piece = at % PIECES;
      flush(tile);
      fetch();
      copies_left<SLOTS - 1>();
      __syncwarp();
      u8* slot = ring + slot_no * SLOT;
      if (++slot_no == SLOTS) slot_no = 0;
      if (NESTED) {
#pragma unroll
        for (int j = 0; j < SCALES / 2; j++) {
          int e = lane + 32 * j, r = e / PER_ROW, b = piece * PER_ROW + e % PER_ROW, row;
          Part p = part_of(tile, r, row); const Scales scales = {p.absmax, p.nested, map, p.offset, shift, 8};
          float* s = (float*)(slot + PIECE) + e;
          if (inside(tile, r) && b < K / 64) *s = scales.decode(__float_as_uint(*s), (i64)row * (K / 64) + b, map_);
        }
        __syncwarp();
      }
      float s0[SCALES + 1], s1[SCALES + 1];
#pragma unroll
      for (int b = 0; b < SCALES; b++) { s0[b] = ((const float*)(slot + PIECE))[g * SCALES + b]; s1[b] = ((const float*)(slot + PIECE))[(g + 8) * SCALES + b]; }
#pragma unroll
      for (int b = 0; b < GROUPS; b++) {
        const uint4* px = (const uint4*)(x_lane + (piece * KB + b * GROUP) * 2);
        const uint4 xa = px[0], xb = FMT == 0 ? xa : px[1];
        const u32 xv[8] = {xa.x, xa.y, xa.z, xa.w, xb.x, xb.y, xb.z, xb.w};
        if (FMT == 2) {
          const u8* p = slot + swizzled<CB>(g, b * 2 + (t >> 1)) * 16 + (t & 1) * 8;
          const uint2 u = *(const uint2*)(p + g * CB), v = *(const uint2*)(p + (g + 8) * CB);
          float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const u32 a = h ? u.y : u.x, d = h ? v.y : v.x;
            mma<0>(c, look_up<0>(table, a, lane4), look_up<0>(table, d, lane4), look_up<1>(table, a, lane4), look_up<1>(table, d, lane4), xv[4 * h], xv[4 * h + 1]);
            mma<0>(c, look_up<2>(table, a, lane4), look_up<2>(table, d, lane4), look_up<3>(table, a, lane4), look_up<3>(table, d, lane4), xv[4 * h + 2], xv[4 * h + 3]);
          }
          acc[0] = fmaf(c[0], s0[b], acc[0]); acc[1] = fmaf(c[1], s0[b], acc[1]); acc[2] = fmaf(c[2], s1[b], acc[2]); acc[3] = fmaf(c[3], s1[b], acc[3]);
        } else {
          const u8* p = slot + swizzled<CB>(g, b * 4 + t) * 16;
          const uint4 u = *(const uint4*)(p + g * CB), v = *(const uint4*)(p + (g + 8) * CB);
          const u32 a[4] = {u.x, u.y, u.z, u.w}, d[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int s = 0; s < (FMT == 0 ? 2 : 4); s++) {
            if (FMT == 0) mma<MMA_BF16>(acc, a[2 * s], d[2 * s], a[2 * s + 1], d[2 * s + 1], xv[2 * s], xv[2 * s + 1]);
            else mma<MMA_BF16>(acc, int8_pair<0>(a[s]), int8_pair<0>(d[s]), int8_pair<1>(a[s]), int8_pair<1>(d[s]), xv[2 * s], xv[2 * s + 1]);
          }
        }
      }
      __syncwarp();
    }
    flush(q1);
    __syncthreads();
    if (finishes && inside(q0 + f_tile, f_row)) {
      const float* s = sums + (f_tile * WARPS * 16 + f_row) * M + f_m; float sum = 0.f, up = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) { sum += s[w * 16 * M]; if (GATED) up += s[(w * 16 + 8) * M]; }
      if (TO_FP16) { sum *= unscale[f_m]; up *= unscale[f_m]; }
      sum = fmaf(sum, scale0, plus0); up = fmaf(up, scale1, plus1);
      const int row = r0 + (q0 + f_tile) * TILE_ROWS + f_row; const i64 where = (i64)f_m * n + row;
      if (GATED) ((u16*)out)[where] = (u16)pack(activated(sum) * up, 0.f);
      else if (SINK == 3) {
        if (row < n0) ((float*)out)[(i64)f_m * n0 + row] = sum;
        else also[(i64)f_m * n1 + row - n0] = (u16)pack(activated(sum), 0.f);
      } else if (SINK == 0) ((float*)out)[where] = cap == 0.f ? sum : cap * tanh_(sum / cap);
      else ((float*)out)[where] = sum + rest;
    }
  }
  copies_left<0>();
}
