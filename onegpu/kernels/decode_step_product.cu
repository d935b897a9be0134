// y = f(x) W^T for the M rows of a decoding step, with what stands before and after it in a layer.
//
// SOURCE  0  x = RMSNorm(h) of float32 h [M, K]
//         1  x = the attention's output, put together from its parts: 16-bit [M, heads, SPLITS, HD], float2 (maximum, sum) of each
//         2  x is 16-bit [M, K]
// SINK    0  y, float32 [M, N], with bias; W is up to three matrices below one another (q, k, v)
//         1  h += y, float32 [M, N]
//         2  act(gate) * up, 16-bit [M, N]; W is two matrices (gate, up)
// Filled in: M, K (columns taken, of KS that a row has), WARPS, SLOTS, CB (bytes of a row in a piece), TG (tiles between two sums),
// BULK (scales are copied in bulk too), SOURCE, SINK, SPLITS, HD, ACT.
//
// A block takes a range of rows of W in tiles of 16 (SINK 2: 8 of gate, 8 of up), a tile in pieces of CB bytes of each row. The
// last warp fetches pieces into a ring, a bulk copy a row: memory then sees long reads, which it serves faster than what many
// warps ask for in bits. The others share the columns of each piece. The ring is filled before the kernel waits for the one in
// front of it: weights do not change during a step. A block has an SM for itself; the next kernel's comes as soon as it has left,
// and finds its first rows in the L2 cache, where this one's last warp has sent for them when it had nothing left to fetch.
// W is the 16-row operand of the mma, x the 8-column one; the contraction runs in the order in which bytes are stored.
constexpr int THREADS = WARPS * 32, CONSUMERS = WARPS - 1;
constexpr int KB = FMT == 0 ? CB / 2 : FMT == 1 ? CB : 2 * CB;         // columns of a piece
constexpr int GROUP = FMT == 0 ? 32 : 64, GROUPS = KB / GROUP;         // columns that the four lanes of a row take together
constexpr int LINE = CB + (FMT == 2 ? 32 : 64), PIECE = 16 * LINE;      // so that the rows of a fragment spread over the banks
constexpr int S_LINE = FMT == 2 ? GROUPS + 4 : 0, SLOT = PIECE + 64 * S_LINE;   // scales of a row in a piece, as floats
constexpr int EIGHTS = (M + 7) / 8, SUMS = TG * CONSUMERS * 16 * M;
constexpr int TO_FP16 = FMT == 2 && BF16, MMA_BF16 = BF16 && FMT != 2;
constexpr int PIECES = (K + KB - 1) / KB, PITCH = (K * 2 + 127) / 128 * 128 + (FMT == 0 ? 64 : 16);
constexpr int TAKEN = FMT == 0 ? 2 * K : FMT == 1 ? K : K / 2, ROW_BYTES = FMT == 0 ? 2 * KS : FMT == 1 ? KS : KS / 2;
constexpr int GATED = SINK == 2, TILE_ROWS = GATED ? 8 : 16;
constexpr int VECTORS = K / 4, PER = (VECTORS + THREADS - 1) / THREADS;  // four columns each, of a thread
constexpr int BATCH = PER >= 8 ? 1 : M < 8 / PER ? M : 8 / PER;          // rows of x in registers at a time
static_assert(K % 64 == 0, "K is a multiple of 64");
static_assert(TG * 16 * M <= CONSUMERS * 32, "a thread finishes one sum");

struct Part { const u8* w; const void* absmax; const float *nested, *offset; const u16* bias; };

DEVICE float activated(float x) {
  if (ACT == 0) return x / (1.f + exp2_(-LOG2E * x));
  if (ACT == 1) { float z = 0.7978845608028654f * fmaf(0.044715f * x * x, x, x); return x / (1.f + exp2_(-2.f * LOG2E * z)); }
  return 0.5f * x * (1.f + erff(x * 0.7071067811865476f));
}

// Four columns of x before the norm's factor.
DEVICE float4 columns(const void* in, const float2* ml, int m, int c) {
  if (SOURCE == 0) return fresh4((const float*)in + (i64)m * K + 4 * c);
  if (SOURCE == 2) {
    float2 p = fresh2((const u16*)in + (i64)m * KS + 4 * c); u32 a = __float_as_uint(p.x), b = __float_as_uint(p.y);
    return make_float4(value((u16)a), value((u16)(a >> 16)), value((u16)b), value((u16)(b >> 16)));
  }
  const i64 first = ((i64)m * (K / HD) + 4 * c / HD) * SPLITS; float2 s[SPLITS], p[SPLITS];
#pragma unroll
  for (int i = 0; i < SPLITS; i++) {
    s[i] = fresh2(ml + first + i); p[i] = fresh2((const u16*)in + (first + i) * HD + 4 * c % HD);
  }
  float top = s[0].x, total = 0.f; float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int i = 1; i < SPLITS; i++) top = larger(top, s[i].x);
#pragma unroll
  for (int i = 0; i < SPLITS; i++) {
    float e = (s[i].x == top ? 1.f : exp2_(s[i].x - top)) * s[i].y; u32 a = __float_as_uint(p[i].x), b = __float_as_uint(p[i].y);
    total += e;
    v.x = fmaf(e, value((u16)a), v.x); v.y = fmaf(e, value((u16)(a >> 16)), v.y); v.z = fmaf(e, value((u16)b), v.z); v.w = fmaf(e, value((u16)(b >> 16)), v.w);
  }
  total = 1.f / total;
  return make_float4(v.x * total, v.y * total, v.z * total, v.w * total);
}

__global__ void __launch_bounds__(THREADS, 1)
product(const u8* w0, const u8* w1, const u8* w2, const void* absmax0, const void* absmax1, const void* absmax2,
        const float* nested0, const float* nested1, const float* nested2, const float* offset0, const float* offset1, const float* offset2,
        const u16* bias0, const u16* bias1, const u16* bias2, const float* map, const u16* gain, const void* in, const float2* ml, void* out,
        const u8* next0, const u8* next1, const u8* next2, int n0, int n1, int n2, int shift, int first,
        int next_n0, int next_n1, int next_n2, int next_line, int next_rows, int next_pair, float eps) {
  SHARED(smem);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int n = GATED ? n0 : n0 + n1 + n2;
  const int r0 = (int)((i64)n * blockIdx.x / gridDim.x), r1 = (int)((i64)n * (blockIdx.x + 1) / gridDim.x);
  const int tiles = (r1 - r0 + TILE_ROWS - 1) / TILE_ROWS;
  u8* table = smem;
  float* map_ = (float*)(smem + TABLE);
  u8* xs = smem + TABLE + (NESTED ? 1024 : 0);
  float* red = (float*)(xs + M * PITCH);
  float* shares = red + 2 * SUMS;                                        // of the warps: sums of squares, largest values
  float* unscale = shares + 2 * M * WARPS;                               // what undoes each row's scale
  u8* bars = (u8*)(red + 2 * SUMS) + (2 * M * WARPS + M + 3) / 4 * 16;   // of each slot: it is full, it is empty
  u8* ring = bars + (16 * SLOTS + 127) / 128 * 128;
  const u64 policy = evict_first();
  const int first_byte = FMT == 0 ? 2 * first : FMT == 1 ? first : first / 2, first_block = first / 64;
  if (SOURCE == 2) in = (const u16*)in + first;
  // Row r of a tile: which matrix, and which row there.
  auto part_of = [&](int tile, int r, int& row) {
    Part p = {w0, absmax0, nested0, offset0, bias0};
    if (GATED) {
      row = r0 + tile * 8 + (r & 7);
      if (r >= 8) p = {w1, absmax1, nested1, offset1, bias1};
    } else {
      row = r0 + tile * 16 + r;
      if (SINK == 0) {
        if (row >= n0 + n1) { row -= n0 + n1; p = {w2, absmax2, nested2, offset2, bias2}; }
        else if (row >= n0) { row -= n0; p = {w1, absmax1, nested1, offset1, bias1}; }
      }
    }
    return p;
  };
  auto inside = [&](int tile, int r) { return r0 + tile * TILE_ROWS + (GATED ? r & 7 : r) < r1; };

  const int pieces = tiles * PIECES;
  auto fetch = [&](int i) {                                              // the block's piece i, by the last warp
    const int tile = i / PIECES, piece = i % PIECES, rows = min(TILE_ROWS, r1 - r0 - tile * TILE_ROWS) * (1 + GATED);
    const int bytes = min(CB, TAKEN - piece * CB), block = first_block + piece * GROUPS; u8 *full = bars + i % SLOTS * 16, *slot = ring + i % SLOTS * SLOT;
    if (lane == 0) arrive_and_expect(full, rows * (bytes + (BULK ? bytes / 8 : 0)));
    __syncwarp();
    if (lane < 16 && inside(tile, lane)) {
      int row; const Part p = part_of(tile, lane, row);
      bulk_copy(slot + lane * LINE, p.w + (i64)row * ROW_BYTES + first_byte + piece * CB, bytes, full, policy);
      if (BULK) bulk_copy(slot + PIECE + lane * S_LINE * 4, (const u8*)p.absmax + ((i64)row * (KS / 64) + block) * 4, bytes / 8, full, policy);
    }
    if (FMT == 2 && !BULK) {
      for (int e = lane; e < 16 * GROUPS; e += 32) {
        int r = e / GROUPS, b = e % GROUPS, row;
        const Part p = part_of(tile, r, row); const Scales scales = {p.absmax, p.nested, map, p.offset, shift, 8};
        scales.fetch(shared_of_lane(slot + PIECE + (r * S_LINE + b) * 4), (i64)row * (KS / 64) + block + b, inside(tile, r) && piece * GROUPS + b < K / 64);
      }
      arrive_after_copies(full);
    }
  };

  // ---- what does not depend on the kernels before
  let_next_kernel_start();
  if (warp == CONSUMERS) {
    if (lane == 0) {
      for (int i = 0; i < SLOTS; i++) { barrier_init(bars + 16 * i, FMT == 2 && !BULK ? 33 : 1); barrier_init(bars + 16 * i + 8, CONSUMERS); }
      barriers_ready();
    }
    __syncwarp();
    for (int i = 0; i < min(SLOTS, pieces); i++) fetch(i);
  }
  float2 gains[SOURCE == 0 ? PER : 1];
  if (SOURCE == 0) {
#pragma unroll
    for (int i = 0; i < PER; i++) {
      int c = threadIdx.x + i * THREADS; gains[i] = make_float2(0.f, 0.f);
      if (VECTORS % THREADS == 0 || c < VECTORS) gains[i] = *(const float2*)(gain + 4 * c);
    }
  }
  if (NESTED) for (int i = threadIdx.x; i < 256; i += THREADS) map_[i] = map[i];
  build_table(table, THREADS);
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
  // ---- x into shared memory
  for (int m0 = 0; m0 < M; m0 += BATCH) {
    float4 v[BATCH][PER];
#pragma unroll
    for (int b = 0; b < BATCH; b++)
#pragma unroll
      for (int i = 0; i < PER; i++) {
        int c = threadIdx.x + i * THREADS; v[b][i] = make_float4(0.f, 0.f, 0.f, 0.f);
        if ((VECTORS % THREADS == 0 || c < VECTORS) && (M % BATCH == 0 || m0 + b < M)) v[b][i] = columns(in, ml, m0 + b, c);
      }
    float squares[BATCH], top[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      squares[b] = 0.f; top[b] = 0.f;
#pragma unroll
      for (int i = 0; i < PER; i++) {
        float4& a = v[b][i];
        if (SOURCE == 0) {
          u32 g0 = __float_as_uint(gains[i].x), g1 = __float_as_uint(gains[i].y);
          squares[b] = fmaf(a.x, a.x, fmaf(a.y, a.y, fmaf(a.z, a.z, fmaf(a.w, a.w, squares[b]))));
          a.x *= value((u16)g0); a.y *= value((u16)(g0 >> 16)); a.z *= value((u16)g1); a.w *= value((u16)(g1 >> 16));
        }
        if (TO_FP16) top[b] = larger(top[b], larger(larger(fabsf(a.x), fabsf(a.y)), larger(fabsf(a.z), fabsf(a.w))));
      }
    }
    if (SOURCE == 0 || TO_FP16) {
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        if (M % BATCH && m0 + b >= M) break;
        squares[b] = warp_sum(squares[b]);
        if (TO_FP16) top[b] = __uint_as_float(warp_max(__float_as_uint(top[b])));
        if (lane == 0) { shares[((m0 + b) * WARPS + warp) * 2] = squares[b]; shares[((m0 + b) * WARPS + warp) * 2 + 1] = top[b]; }
      }
      __syncthreads();
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int m = m0 + b; float factor = 1.f;
      if (M % BATCH && m >= M) break;
      if (SOURCE == 0 || TO_FP16) {
        float sum = 0.f, most = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) { float2 s = *(const float2*)(shares + (m * WARPS + w) * 2); sum += s.x; most = larger(most, s.y); }
        if (SOURCE == 0) factor = rsqrtf(sum * (1.f / K) + eps);
        if (TO_FP16) {                                                   // the largest value of the row comes to lie in [2^13, 2^15)
          int e = (int)(__float_as_uint(most * factor) >> 23 & 255), up = min(max(141 - e, -126), 126);
          factor *= __uint_as_float((u32)(127 + up) << 23);
          if (threadIdx.x == 0) unscale[m] = __uint_as_float((u32)(127 - up) << 23);
        }
      }
#pragma unroll
      for (int i = 0; i < PER; i++) {
        int c = threadIdx.x + i * THREADS; float4 a = v[b][i];
        if (VECTORS % THREADS && c >= VECTORS) continue;
        if (SOURCE == 0 || TO_FP16) { a.x *= factor; a.y *= factor; a.z *= factor; a.w *= factor; }
        uint2 q = TO_FP16 ? make_uint2(pack_h(a.x, a.y), pack_h(a.z, a.w)) : make_uint2(pack(a.x, a.y), pack(a.z, a.w));
        *(uint2*)(xs + m * PITCH + 8 * c) = q;
      }
    }
  }
  __syncthreads();

  // ---- rows of W times x
  if (warp == CONSUMERS) {
    for (int i = SLOTS; i < pieces; i++) { wait_for(bars + i % SLOTS * 16 + 8, i / SLOTS - 1 & 1); fetch(i); }
    send_ahead({next0, next1, next2, next_n0, next_n1, next_n2, next_line, next_rows, next_pair}, lane, 32);
    return;
  }
  const u32 lane4 = lane * 4;
  const u8* x_lane = xs + t * (GROUP / 2);
  float acc[EIGHTS][4] = {};
  int i = 0;
  for (int q0 = 0, odd = 0; q0 < tiles; q0 += TG, odd ^= 1) {
    const int q1 = min(q0 + TG, tiles); float* sums = red + odd * SUMS;
    if (q0) prepare(q0);
    if (SINK == 1 && q0 && finishes && inside(q0 + f_tile, f_row)) rest = fresh((const float*)out + (i64)f_m * n + r0 + (q0 + f_tile) * 16 + f_row);
    for (int tile = q0; tile < q1; tile++) {
      for (int piece = 0; piece < PIECES; piece++, i++) {
        const u8* slot = ring + i % SLOTS * SLOT;
        wait_for(bars + i % SLOTS * 16, i / SLOTS & 1);
        if (NESTED) {                                                    // of the groups that this warp takes
          constexpr int MINE = (GROUPS + CONSUMERS - 1) / CONSUMERS;
          for (int e = lane; e < 16 * MINE; e += 32) {
            int r = e / MINE, b = e % MINE * CONSUMERS + warp, row;
            Part p = part_of(tile, r, row); const Scales scales = {p.absmax, p.nested, map, p.offset, shift, 8};
            float* s = (float*)(slot + PIECE) + r * S_LINE + b;
            if (b < GROUPS && inside(tile, r) && piece * GROUPS + b < K / 64) *s = scales.decode(__float_as_uint(*s), (i64)row * (KS / 64) + first_block + piece * GROUPS + b, map_);
          }
          __syncwarp();
        }
#pragma unroll
        for (int j = 0; j < (GROUPS + CONSUMERS - 1) / CONSUMERS; j++) {
          const int b = warp + j * CONSUMERS, column = piece * KB + b * GROUP;
          if (GROUPS % CONSUMERS && b >= GROUPS || K % KB && column >= K) break;
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
              else { a0 = int8_pair<0>(a[s]); a1 = int8_pair<0>(d[s]); a2 = int8_pair<1>(a[s]); a3 = int8_pair<1>(d[s]); }
#pragma unroll
              for (int e = 0; e < EIGHTS; e++) mma<MMA_BF16>(acc[e], a0, a1, a2, a3, xv[e][2 * s], xv[e][2 * s + 1]);
            }
          }
        }
        __syncwarp();
        if (lane == 0) arrive(bars + i % SLOTS * 16 + 8);
      }
      float* s = sums + ((tile - q0) * CONSUMERS + warp) * 16 * M + g * M;
#pragma unroll
      for (int e = 0; e < EIGHTS; e++) {
        const int m = 8 * e + 2 * t;
        if (m < M) { s[m] = acc[e][0]; s[8 * M + m] = acc[e][2]; }
        if (m + 1 < M) { s[m + 1] = acc[e][1]; s[8 * M + m + 1] = acc[e][3]; }
        acc[e][0] = acc[e][1] = acc[e][2] = acc[e][3] = 0.f;
      }
    }
    meet_threads<CONSUMERS * 32>();
    if (finishes && inside(q0 + f_tile, f_row)) {
      const float* s = sums + (f_tile * CONSUMERS * 16 + f_row) * M + f_m; float sum = 0.f, up = 0.f;
#pragma unroll
      for (int w = 0; w < CONSUMERS; w++) { sum += s[w * 16 * M]; if (GATED) up += s[(w * 16 + 8) * M]; }
      if (TO_FP16) { sum *= unscale[f_m]; up *= unscale[f_m]; }
      sum = fmaf(sum, scale0, plus0); up = fmaf(up, scale1, plus1);
      const i64 where = (i64)f_m * n + r0 + (q0 + f_tile) * TILE_ROWS + f_row;
      if (GATED) ((u16*)out)[where] = (u16)pack(activated(sum) * up, 0.f);
      else ((float*)out)[where] = sum + rest;
    }
  }
}
