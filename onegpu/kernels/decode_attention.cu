// Up to eight rows, the queries of the heads that share a key head, over that head's keys, which the CL blocks of a cluster share. Behind
// few_rows_common.cu and decode_step_common.cu; decode_attention_cuda.py launches it.
//
// Filled in: HD (a multiple of 8, padded to 32), QUERIES, GROUP, FIRST, WINDOW, SOFTCAP, SLOPES (whether there are any), CL, WARPS, STAGES (steps of
// values in a warp's ring).
//
// A warp takes STEP keys at a time: keys from memory into registers, as the 16-row operand of the mma (the rows are its 8 columns), values by
// asynchronous copies into a ring of its own, in which keys that no row may see are zeros. Steps go round: to the first warp of every block, then to
// the second. So the first of a block are the same whatever the length, and those of AHEAD warps are asked for beside it. At the end each block
// sends to every other that one's share of the values, and puts together its own, in the order of the blocks.
constexpr int AHEAD = 2;
constexpr int THREADS = WARPS * 32, ROWS = QUERIES * GROUP;
constexpr int WIDE = (HD + 31) / 32 * 32;                              // of a head in shared memory and registers
constexpr int TILES = HD > 128 ? 1 : 2, STEP = 16 * TILES;              // tiles of 16 keys, so that the registers suffice
constexpr int UNITS = WIDE / 8, ROW = WIDE * 2, STAGE = STEP * ROW;     // 16-byte units of a row; bytes
constexpr int V_MASK = UNITS % 8 == 0 ? 7 : 3;
constexpr int PAIR = ROWS > 1 ? 2 : 1;                                  // rows of a lane
constexpr int CHUNK = (ROWS * HD + CL - 1) / CL;                        // values that a block puts together
static_assert(HD % 8 == 0 && HD <= 256 && ROWS <= 8 && STAGES * STAGE >= ROWS * WIDE * 4, "head dimensions");

#ifndef EMULATED
// An 8 x 8 tile of 16-bit values, a row in four lanes, with rows and columns exchanged.
DEVICE u32 turned(u32 a) { u32 b; asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(b) : "r"(a)); return b; }
#endif
DEVICE int value_at(int key, int unit) { return key * ROW + (unit ^ (key & V_MASK)) * 16; }
DEVICE uint4 bits(float4 v) { return make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)); }
DEVICE int fresh_int(const int* p) { return (int)__float_as_uint(fresh((const float*)p)); }

__global__ void __launch_bounds__(THREADS, 1)
decode(const u16* q, const u16* k, const u16* v, const int* lengths, const int* firsts, const float* slopes, u16* out,
       i64 q_b, i64 q_h, i64 q_t, i64 k_b, i64 k_h, i64 k_n, i64 v_b, i64 v_h, i64 v_n, i64 o_b, i64 o_h, i64 o_t,
       int kv_heads, int room, int window, float scale, float softcap) {
  SHARED(smem);
  float* ends = (float*)(smem + WARPS * STAGES * STAGE);                 // [WARPS, 8, 2] maxima and sums
  float* box = ends + WARPS * 16;                                        // [CL, CHUNK] what the cluster has sent
  float* box_ends = box + (CL * CHUNK + 1) / 2 * 2;                      // [CL, ROWS, 2]
  void* sent = box_ends + CL * ROWS * 2;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int split = blockIdx.x % CL, head = blockIdx.x / CL, b = head / kv_heads, kv = head % kv_heads;
  u8* own_ring = smem + warp * STAGES * STAGE;
  const Shared mine = shared(own_ring);
  const float ninf = -__uint_as_float(0x7f800000u);

  let_next_kernel_start();
  if (threadIdx.x == 0) {
    barrier_init(sent, 1); barriers_ready();
    arrive_and_expect(sent, CL * (4 * max(0, min(CHUNK, ROWS * HD - split * CHUNK)) + 8 * ROWS));
  }
  __syncwarp();
  cluster_arrive();
  const u16* own_k = k + b * k_b + kv * k_h + 8 * t;
  const u16* own_v = v + b * v_b + kv * v_h;
  wait_before_reading_x();
  const int given = fresh_int(lengths + b), begins = FIRST ? fresh_int(firsts + b) : 0;
  uint4 key[TILES][2][WIDE / 32], query[WIDE / 32];                      // of keys g and g + 8 of a tile, and of row g: units t, t + 4, ...
#pragma unroll
  for (int u = 0; u < WIDE / 32; u++) {
    query[u] = make_uint4(0, 0, 0, 0);
    if (g < ROWS && (HD == WIDE || 32 * u + 8 * t < HD)) query[u] = bits(fresh4((const float*)(q + b * q_b + (kv * GROUP + g % GROUP) * q_h + g / GROUP * q_t + 32 * u + 8 * t)));
  }
  auto fetch_keys = [&](int step, int end) {
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
      const u16* from = own_k + min(step * STEP + 8 * i + g, end - 1) * k_n;
#pragma unroll
      for (int u = 0; u < WIDE / 32; u++) {
        key[i / 2][i % 2][u] = make_uint4(0, 0, 0, 0);
        if (HD == WIDE || 32 * u + 8 * t < HD) key[i / 2][i % 2][u] = bits(fresh4((const float*)(from + 32 * u)));
      }
    }
  };
  const bool early = !FIRST && !WINDOW && warp < AHEAD;
  int step = warp * CL + split;
  const int pace = WARPS * CL;
  if (early) fetch_keys(step, room);
  const int hi = min(given, room), lo = max(max(begins, WINDOW ? hi - QUERIES + 1 - window : 0), 0);
  if (FIRST || WINDOW) step += lo / STEP;
  const int steps = hi > lo ? (hi + STEP - 1) / STEP : 0;
  if (!early && step < steps) fetch_keys(step, hi);
  auto fetch_values = [&](int s, int stage) {
    if (s < steps) {
#pragma unroll
      for (int i = 0; i < STEP * UNITS / 32; i++) {
        const int u = lane + 32 * i, one = u / UNITS, unit = u % UNITS, j = s * STEP + one;
        const bool ok = j >= lo && j < hi && (HD == WIDE || unit * 8 < HD);
        copy16(mine + stage * STAGE + value_at(one, unit), own_v + (ok ? j * v_n + unit * 8 : 0), ok ? 16 : 0);
      }
    }
    commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES; i++) fetch_values(step + i * pace, i);

  int at[PAIR]; float slope[PAIR];                                       // where a row's query stands
#pragma unroll
  for (int r = 0; r < PAIR; r++) {
    at[r] = hi - QUERIES + (2 * t + r) / GROUP;
    slope[r] = SLOPES && 2 * t + r < ROWS ? slopes[kv * GROUP + (2 * t + r) % GROUP] : 0.f;
  }
  float sums[WIDE / 16][4], top[PAIR], total[PAIR];                      // sums: values g and g + 8 of 16, rows 2t and 2t + 1
#pragma unroll
  for (int i = 0; i < WIDE / 16; i++) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.f;
#pragma unroll
  for (int r = 0; r < PAIR; r++) { top[r] = ninf; total[r] = 0.f; }
  for (int stage = 0; step < steps; step += pace) {
    float s[TILES][4] = {};
#pragma unroll
    for (int u = 0; u < WIDE / 32; u++)
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        const uint4 a = key[i][0][u], c = key[i][1][u];
        mma<BF16>(s[i], a.x, c.x, a.y, c.y, query[u].x, query[u].y);
        mma<BF16>(s[i], a.z, c.z, a.w, c.w, query[u].z, query[u].w);
      }
    if (step + pace < steps) fetch_keys(step + pace, hi);
    float w[TILES][2][PAIR], most[PAIR], shrink[PAIR];                   // keys g and g + 8 of a tile
#pragma unroll
    for (int r = 0; r < PAIR; r++) most[r] = top[r];
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
      const int j = step * STEP + 8 * i + g;
#pragma unroll
      for (int r = 0; r < PAIR; r++) {
        const int far = j - at[r];
        float x = s[i / 2][i % 2 * 2 + r] * scale;
        if (SOFTCAP) x = softcap * (1.f - 2.f / (exp2_(2.f * LOG2E * x) + 1.f));
        if (SLOPES) x = fmaf(slope[r], (float)far, x);
        const bool ok = j >= lo && far <= 0 && (!WINDOW || far > -window);
        w[i / 2][i % 2][r] = ok ? x * LOG2E : ninf; most[r] = larger(most[r], w[i / 2][i % 2][r]);
      }
    }
#pragma unroll
    for (int r = 0; r < PAIR; r++) {
#pragma unroll
      for (int o = 4; o < 32; o *= 2) most[r] = larger(most[r], shuffle_xor(most[r], o));
      shrink[r] = top[r] == most[r] ? 1.f : exp2_(top[r] - most[r]); top[r] = most[r]; total[r] *= shrink[r];
      const float least = most[r] == ninf ? 0.f : most[r];
#pragma unroll
      for (int i = 0; i < 2 * TILES; i++) { float& e = w[i / 2][i % 2][r]; e = exp2_(e - least); total[r] += e; }
    }
#pragma unroll
    for (int i = 0; i < WIDE / 16; i++) { sums[i][0] *= shrink[0]; sums[i][2] *= shrink[0]; if (PAIR > 1) { sums[i][1] *= shrink[PAIR - 1]; sums[i][3] *= shrink[PAIR - 1]; } }
    copies_left<STAGES - 1>();
    __syncwarp();
    const u8* held = own_ring + stage * STAGE;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      const u32 p0 = turned(pack(w[i][0][0], PAIR > 1 ? w[i][0][PAIR - 1] : 0.f)), p1 = turned(pack(w[i][1][0], PAIR > 1 ? w[i][1][PAIR - 1] : 0.f));
#pragma unroll
      for (int d = 0; d < WIDE / 16; d++) {
        u32 a[4]; transposed(a, held + value_at(16 * i + (lane & 7) + (lane >> 4) * 8, 2 * d + (lane >> 3 & 1)));
        mma<BF16>(sums[d], a[0], a[1], a[2], a[3], p0, p1);
      }
    }
    __syncwarp();
    fetch_values(step + STAGES * pace, stage);
    if (++stage == STAGES) stage = 0;
  }
#pragma unroll
  for (int r = 0; r < PAIR; r++) {
#pragma unroll
    for (int o = 4; o < 32; o *= 2) total[r] += shuffle_xor(total[r], o);
    const int row = 2 * t + r;
    if (row >= ROWS) continue;
#pragma unroll
    for (int i = 0; i < WIDE / 16; i++) {
      float* to = (float*)own_ring + row * WIDE + 16 * i + g;
      to[0] = sums[i][r]; to[8] = sums[i][2 + r];
    }
    if (g == 0) { ends[(warp * 8 + row) * 2] = top[r]; ends[(warp * 8 + row) * 2 + 1] = total[r]; }
  }
  __syncthreads();
  cluster_wait();                                                        // all blocks of the cluster run
  for (int i = threadIdx.x; i < ROWS * HD; i += THREADS) {
    const int row = i / HD, d = i % HD; float most = ninf, sum = 0.f, o = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) most = larger(most, ends[(w * 8 + row) * 2]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float m = ends[(w * 8 + row) * 2], e = m == most ? 1.f : exp2_(m - most);
      sum = fmaf(e, ends[(w * 8 + row) * 2 + 1], sum); o = fmaf(e, ((float*)(smem + w * STAGES * STAGE))[row * WIDE + d], o);
    }
    send(box + split * CHUNK + i % CHUNK, i / CHUNK, o, sent);
    if (d < CL) { send(box_ends + (split * ROWS + row) * 2, d, most, sent); send(box_ends + (split * ROWS + row) * 2 + 1, d, sum, sent); }
  }
  wait_for_blocks(sent, 0);
  for (int i = threadIdx.x; i < CHUNK && split * CHUNK + i < ROWS * HD; i += THREADS) {
    const int row = (split * CHUNK + i) / HD, d = (split * CHUNK + i) % HD; float most = ninf, sum = 0.f, o = 0.f;
#pragma unroll
    for (int s = 0; s < CL; s++) most = larger(most, box_ends[(s * ROWS + row) * 2]);
#pragma unroll
    for (int s = 0; s < CL; s++) {
      const float m = box_ends[(s * ROWS + row) * 2], e = m == most ? 1.f : exp2_(m - most);
      sum = fmaf(e, box_ends[(s * ROWS + row) * 2 + 1], sum); o = fmaf(e, box[s * CHUNK + i], o);
    }
    out[b * o_b + (kv * GROUP + row % GROUP) * o_h + row / GROUP * o_t + d] = (u16)pack(sum == 0.f ? 0.f : o / sum, 0.f);
  }
}
