// One query per row of the batch against its keys: the new head norms, rotary embedding, the write into the cache and the
// attention over SPLITS parts of the keys, which the next product puts together.
//
// qkv float32 [rows, (HKV * ALL + 2 HKV) * HD] -> parts 16-bit [rows, HKV * ALL, SPLITS, HD], sums float2 (maximum of the
// scores in base 2, sum) of each. Caches [rows, HKV, length, HD]; the token at position p stands in slot p % length.
// Filled in: HD (a multiple of 8, padded to 32), ALL (query heads of a key head), GQ (of them taken at a time, up to 8), HKV,
// SPLITS, ROT (rotated values of a head), NORMS (1: of each query and key; 2: of all queries, and all keys, together), GROUPED (qkv
// has for each key head its queries, the key, the value; else all queries, all keys, all values), CAP (scores are
// cap tanh(score / cap)), ALIBI (slopes, float32 [HKV * ALL]; 2: rounded, as Heads in decode_step.py says), CLIP (qkv is cut off at
// +-clip), WARPS, STAGES (steps of values in a warp's ring), GROUPS (of so many warps in a block, each with heads of its own).
//
// A warp takes STEP keys at a time: keys from memory into registers, as the 16-row operand of the mma (the queries are the 8
// columns), values by asynchronous copies into a ring of its own, in which a key that a row may not see is zeros. The next keys are
// asked for when the products with these are done; a group that takes several heads asks for the next one's first before it puts
// together what the warps have of this one. The new key never goes through the cache: it is a part of its own, of one key.
//
// What earlier steps wrote is fetched before the kernel waits for the one in front of it. The embedding, a step's first kernel, lets no other
// begin before all in front of the step has ended, and within a step nothing else writes these keys, or positions.
constexpr int THREADS = WARPS * 32;
constexpr int WIDE = (HD + 31) / 32 * 32;                              // of a head in shared memory and registers
constexpr int TILES = HD > 128 ? 1 : 2, STEP = 16 * TILES;              // tiles of 16 keys, so that the registers suffice
constexpr int UNITS = WIDE / 8, ROW = WIDE * 2, STAGE = STEP * ROW;     // 16-byte units of a row; bytes
constexpr int V_MASK = UNITS % 8 == 0 ? 7 : 3;
constexpr int CHUNKS = (ALL + GQ - 1) / GQ, HEADS = HKV * ALL, WIDTH = (HEADS + 2 * HKV) * HD, HALF = ROT / 2;
constexpr int RING = WARPS * STAGES * STAGE;
constexpr int FLOATS = (HALF % 32 ? WARPS * WIDE : 0) + (HALF ? 2 * HALF : 2) + (WARPS + 1) * 16 + WARPS * GQ * WIDE;
constexpr int SHARE = (RING + (GQ + 2) * WIDE * 2 + FLOATS * 4 + 127) / 128 * 128;  // of a group
constexpr int PAIR = GQ > 1 ? 2 : 1;                                    // queries of a lane
static_assert(HD % 8 == 0 && HD <= 256 && GQ <= 8 && ROT <= HD, "head dimensions");

#ifndef EMULATED
// An 8 x 8 tile of 16-bit values, a row in four lanes, with rows and columns exchanged.
DEVICE u32 turned(u32 a) { u32 b; asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(b) : "r"(a)); return b; }
#endif

DEVICE float rounded(float v) { return value((u16)pack(v, 0.f)); }
DEVICE int value_at(int key, int unit) { return key * ROW + (unit ^ (key & V_MASK)) * 16; }

// Which keys of the cache a row sees, in the order of their slots.
struct Seen {
  int length, slot, back, from, to;                                      // back: how far before the new token the first one is
  DEVICE bool at(int j) const {
    int ago = slot - j;
    if (ago <= 0) ago += length;
    return j < to && ago <= back;
  }
};

__global__ void __launch_bounds__(GROUPS * THREADS, 1)
attend(const float* qkv, const i64* position, const i64* rope_position, const int* first, u16* keys, u16* values, const float* inv_freq,
       const u16* q_gain, const u16* k_gain, const float* slopes, u16* parts, float2* sums, int rows, int length, int window,
       int position_step, int rope_step, float scale, float rope_scale, float eps, float one, float cap, float clip) {
  SHARED(whole);
  const int group = GROUPS > 1 ? threadIdx.x / THREADS : 0, thread = GROUPS > 1 ? threadIdx.x % THREADS : threadIdx.x;
  u8* smem = whole + group * SHARE;
  const int first_item = group * gridDim.x + blockIdx.x;
  u16* qs = (u16*)(smem + RING);                                         // [GQ, WIDE] rotated queries
  u16* newest = qs + GQ * WIDE;                                          // [2, WIDE] the new key and value
  float* heads = (float*)(newest + 2 * WIDE);                            // [WARPS, WIDE] a head at work, if its pairs lie in other lanes
  float* turn = heads + (HALF % 32 ? WARPS * WIDE : 0);                  // [2, HALF] cosines and sines
  float* ends = turn + (HALF ? 2 * HALF : 2);                            // [WARPS + 1, 8, 2] maxima and sums; the last is the new key's
  float* all = ends + (WARPS + 1) * 16;                                  // [WARPS, GQ, WIDE] outputs
  const int lane = threadIdx.x & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
  u8* own_ring = smem + warp * STAGES * STAGE;
  const Shared mine = shared(own_ring);
  const float ninf = -__uint_as_float(0x7f800000u);

  let_next_kernel_start();
  const int items = rows * HKV * CHUNKS * SPLITS;
  if (first_item >= items) wait_before_reading_x();
  int split, chunk, kv, row, steps, place; Seen seen; i64 base;          // of the item at work; place: of the new key in its row
  const i64 all_now = fresh_i64(position);
  auto begin_item = [&](int item) {
    split = item % SPLITS; chunk = item / SPLITS % CHUNKS; kv = item / (SPLITS * CHUNKS) % HKV; row = item / (SPLITS * CHUNKS * HKV);
    const i64 now = position_step ? fresh_i64(position + (i64)row * position_step) : all_now;
    const i64 begin = first ? (i64)*(first + row) : 0;
    seen.length = length; seen.slot = (int)(now % length); seen.back = (int)min((i64)min(window, length) - 1, now - begin);
    const bool whole = now >= length;                                    // the ring is full: its slots are not in order
    int lo = whole ? 0 : (int)max(begin, now - window + 1), hi = whole ? length : (int)now;
    lo = max(lo, 0);
    const int share = ((hi - lo + SPLITS - 1) / SPLITS + 15) / 16 * 16;
    seen.from = min(lo + split * share, hi); seen.to = min(seen.from + share, hi);
    base = ((i64)row * HKV + kv) * length; place = (int)(now - begin);
    steps = (seen.to - seen.from + STEP - 1) / STEP;
  };
  uint4 k[TILES][2][WIDE / 32];                                          // of keys g and g + 8 of a tile, units t, t + 4, ...
  auto fetch_keys = [&](int step) {
    if (step >= steps) return;
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
      const int j = min(seen.from + step * STEP + 8 * i + g, seen.to - 1);
      const u16* from = keys + (base + j) * HD + 8 * t;
#pragma unroll
      for (int u = 0; u < WIDE / 32; u++) {
        uint4& to = k[i / 2][i % 2][u];
        to = make_uint4(0, 0, 0, 0);
        if (HD != WIDE && 32 * u + 8 * t >= HD) continue;
        const float4 v = fresh4((const float*)(from + 32 * u));
        to = make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w));
      }
    }
  };
  auto fetch_values = [&](int step, int stage) {
    if (step < steps) {
#pragma unroll
      for (int i = 0; i < STEP * UNITS / 32; i++) {
        int u = lane + 32 * i, key = u / UNITS, unit = u % UNITS, j = seen.from + step * STEP + key;
        bool ok = seen.at(j) && (HD == WIDE || unit * 8 < HD);
        copy16(mine + stage * STAGE + value_at(key, unit), values + (base + (ok ? j : 0)) * HD + (ok ? unit * 8 : 0), ok ? 16 : 0);
      }
    }
    commit();
  };
  auto fetch_first = [&](int item) {
    if (item >= items) return;
    begin_item(item);
    fetch_keys(warp);
#pragma unroll
    for (int i = 0; i < STAGES; i++) fetch_values(warp + i * WARPS, i);
  };
  fetch_first(first_item);
  for (int item = first_item; item < items; item += GROUPS * gridDim.x) {
    const int head0 = chunk * GQ, count = min(GQ, ALL - head0);          // query heads of this key head
    const bool last = split == SPLITS - 1;                               // has the new key

    if (HALF) {
      const float p = (float)fresh_i64(rope_position + (i64)row * rope_step);
      for (int i = thread; i < HALF; i += THREADS) { float a = p * inv_freq[i]; turn[i] = cosf(a) * rope_scale; turn[HALF + i] = sinf(a) * rope_scale; }
    }
    float slope[PAIR];
#pragma unroll
    for (int q = 0; q < PAIR; q++) slope[q] = ALIBI && 2 * t + q < count ? slopes[kv * ALL + head0 + 2 * t + q] : 0.f;
    meet_group<GROUPS, THREADS>(group);
    if (item == first_item) wait_before_reading_x();
    const float* own = qkv + (i64)row * WIDTH;
    auto clipped = [&](float v) { return CLIP ? (v > clip ? clip : v < -clip ? -clip : v) : v; };  // NaN stays
    float together[2] = {0.f, 0.f};
    if (NORMS == 2) {                                                    // all queries, then all keys
#pragma unroll
      for (int what = 0; what < 2; what++) {
        float squares = 0.f;
        for (int i = thread; i < (what ? HKV : HEADS) * HD; i += THREADS) { float v = clipped(fresh(own + what * HEADS * HD + i)); squares = fmaf(v, v, squares); }
        squares = warp_sum(squares);
        if (lane == 0) ends[2 * warp + what] = squares;
      }
      meet_group<GROUPS, THREADS>(group);
#pragma unroll
      for (int w = 0; w < WARPS; w++) { together[0] += ends[2 * w]; together[1] += ends[2 * w + 1]; }
    }
    // A warp a head: the queries of this key head, then the new key, then the new value.
    for (int h = warp; h < GQ + 2; h += WARPS) {
      const bool query = h < GQ, key = h == GQ;
      if (query ? h >= count : !last) continue;
      const int which = GROUPED ? kv * (ALL + 2) + (query ? head0 + h : key ? ALL : ALL + 1) : query ? kv * ALL + head0 + h : HEADS + kv + (key ? 0 : HKV);
      const float* from = own + which * HD;
      float* work = heads + warp * WIDE; float v[WIDE / 32], squares = 0.f;
#pragma unroll
      for (int i = 0; i < WIDE / 32; i++) {
        const int d = lane + 32 * i;
        v[i] = HD == WIDE || d < HD ? clipped(fresh(from + d)) : 0.f; squares = fmaf(v[i], v[i], squares);
      }
      if (NORMS && (query || key)) {
        if (NORMS == 1) squares = warp_sum(squares);
        const float mean = NORMS == 1 ? squares * (1.f / HD) : query ? together[0] * (1.f / (HEADS * HD)) : together[1] * (1.f / (HKV * HD));
        const float r = rsqrtf(mean + eps);
        const u16* gain = (query ? q_gain : k_gain) + (NORMS == 1 ? 0 : query ? (kv * ALL + head0 + h) * HD : kv * HD);
#pragma unroll
        for (int i = 0; i < WIDE / 32; i++) {
          const int d = lane + 32 * i;
          if (HD == WIDE || d < HD) v[i] *= r * (value(gain[d]) + one);
        }
      }
      if (HALF && (query || key)) {
        float r[WIDE / 32];
        if (HALF % 32) {                                                 // the other value of a pair is another lane's
#pragma unroll
          for (int i = 0; i < WIDE / 32; i++) work[lane + 32 * i] = v[i];
          __syncwarp();
        }
#pragma unroll
        for (int i = 0; i < WIDE / 32; i++) {
          const int d = lane + 32 * i;
          r[i] = v[i];
          if (d < HALF) r[i] = v[i] * turn[d] - (HALF % 32 ? work[d + HALF] : v[(i + HALF / 32) % (WIDE / 32)]) * turn[HALF + d];
          else if (d < ROT) r[i] = v[i] * turn[d - HALF] + (HALF % 32 ? work[d - HALF] : v[(i + WIDE / 32 - HALF / 32) % (WIDE / 32)]) * turn[d];
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < WIDE / 32; i++) v[i] = r[i];
      }
#pragma unroll
      for (int i = 0; i < WIDE / 32; i++) {
        const int d = lane + 32 * i; const u16 r = (u16)pack(v[i], 0.f);
        (query ? qs + h * WIDE : newest + (key ? 0 : WIDE))[d] = r;       // zeros past HD
        if (!query && chunk == 0 && (HD == WIDE || d < HD)) (key ? keys : values)[(base + seen.slot) * HD + d] = r;
      }
    }
    meet_group<GROUPS, THREADS>(group);

    auto score = [&](float w, float slope_, int ago) {                   // in base 2
      w *= scale;
      if (CAP) w = cap * (1.f - 2.f / (exp2_(2.f * LOG2E * (w / cap)) + 1.f));
      if (ALIBI == 1) w -= slope_ * (float)ago;
      if (ALIBI == 2) w = rounded(w + rounded(slope_ * (float)(place - ago)));
      return w * LOG2E;
    };
    for (int h = WARPS - 1 - warp; last && h < count; h += WARPS) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < WIDE / 32; i++) sum = fmaf(value(qs[h * WIDE + lane + 32 * i]), value(newest[lane + 32 * i]), sum);
      sum = warp_sum(sum);
      if (lane == 0) { ends[(WARPS * 8 + h) * 2] = score(sum, ALIBI == 2 ? slopes[kv * ALL + head0 + h] : 0.f, 0); ends[(WARPS * 8 + h) * 2 + 1] = 1.f; }
    }
    float out[WIDE / 16][4], top[PAIR], total[PAIR];                     // out: values g and g + 8 of 16, queries 2t and 2t + 1
#pragma unroll
    for (int i = 0; i < WIDE / 16; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.f;
#pragma unroll
    for (int q = 0; q < PAIR; q++) { top[q] = ninf; total[q] = 0.f; }
    for (int step = warp, stage = 0; step < steps; step += WARPS) {
      float s[TILES][4] = {};
#pragma unroll
      for (int u = 0; u < WIDE / 32; u++) {
        uint4 q = make_uint4(0, 0, 0, 0);
        if (g < count) q = *(const uint4*)(qs + g * WIDE + 32 * u + 8 * t);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
          const uint4 a = k[i][0][u], b = k[i][1][u];
          mma<BF16>(s[i], a.x, b.x, a.y, b.y, q.x, q.y);
          mma<BF16>(s[i], a.z, b.z, a.w, b.w, q.z, q.w);
        }
      }
      fetch_keys(step + WARPS);
      float w[TILES][2][PAIR], most[PAIR], shrink[PAIR];                 // keys g and g + 8 of a tile
#pragma unroll
      for (int q = 0; q < PAIR; q++) most[q] = top[q];
#pragma unroll
      for (int i = 0; i < 2 * TILES; i++) {
        const int j = seen.from + step * STEP + 8 * i + g, ago = seen.slot - j; const bool ok = seen.at(j);
#pragma unroll
        for (int q = 0; q < PAIR; q++) {
          const int c = i % 2 * 2 + q;
          const float v = score(s[i / 2][c], slope[q], ago < 0 ? ago + length : ago);
          w[i / 2][i % 2][q] = ok ? v : ninf; most[q] = larger(most[q], w[i / 2][i % 2][q]);
        }
      }
#pragma unroll
      for (int q = 0; q < PAIR; q++) {
#pragma unroll
        for (int o = 4; o < 32; o *= 2) most[q] = larger(most[q], shuffle_xor(most[q], o));
        shrink[q] = top[q] == most[q] ? 1.f : exp2_(top[q] - most[q]); top[q] = most[q]; total[q] *= shrink[q];
        const float least = most[q] == ninf ? 0.f : most[q];
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) { float& e = w[i / 2][i % 2][q]; e = exp2_(e - least); total[q] += e; }
      }
#pragma unroll
      for (int i = 0; i < WIDE / 16; i++) { out[i][0] *= shrink[0]; out[i][2] *= shrink[0]; if (PAIR > 1) { out[i][1] *= shrink[PAIR - 1]; out[i][3] *= shrink[PAIR - 1]; } }
      copies_left<STAGES - 1>();
      __syncwarp();
      const u8* v = own_ring + stage * STAGE;
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        const u32 p0 = turned(pack(w[i][0][0], PAIR > 1 ? w[i][0][PAIR - 1] : 0.f)), p1 = turned(pack(w[i][1][0], PAIR > 1 ? w[i][1][PAIR - 1] : 0.f));
#pragma unroll
        for (int d = 0; d < WIDE / 16; d++) {
          u32 a[4]; transposed(a, v + value_at(16 * i + (lane & 7) + (lane >> 4) * 8, 2 * d + (lane >> 3 & 1)));
          mma<BF16>(out[d], a[0], a[1], a[2], a[3], p0, p1);
        }
      }
      __syncwarp();
      fetch_values(step + STAGES * WARPS, stage);
      if (++stage == STAGES) stage = 0;
    }
    const i64 to = ((i64)row * HEADS + kv * ALL + head0) * SPLITS + split;
    fetch_first(item + GROUPS * gridDim.x);
#pragma unroll
    for (int q = 0; q < PAIR; q++)
#pragma unroll
      for (int o = 4; o < 32; o *= 2) total[q] += shuffle_xor(total[q], o);
#pragma unroll
    for (int q = 0; q < PAIR; q++) {
      const int h = 2 * t + q;
      if (h >= count) break;
#pragma unroll
      for (int i = 0; i < WIDE / 16; i++) {
        float* mine_ = all + (warp * GQ + h) * WIDE + 16 * i + g;
        mine_[0] = out[i][q]; mine_[8] = out[i][2 + q];
      }
      if (g == 0) { ends[(warp * 8 + h) * 2] = top[q]; ends[(warp * 8 + h) * 2 + 1] = total[q]; }
    }
    meet_group<GROUPS, THREADS>(group);
    for (int i = thread; i < count * HD; i += THREADS) {
      const int h = i / HD, d = i % HD; float most = last ? ends[(WARPS * 8 + h) * 2] : ninf, sum = 0.f, o = 0.f;
      const float newest_score = most;
#pragma unroll
      for (int w = 0; w < WARPS; w++) most = larger(most, ends[(w * 8 + h) * 2]);
      if (last) { sum = newest_score == most ? 1.f : exp2_(newest_score - most); o = sum * value(newest[WIDE + d]); }
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        float m = ends[(w * 8 + h) * 2], e = m == most ? 1.f : exp2_(m - most);
        sum = fmaf(e, ends[(w * 8 + h) * 2 + 1], sum); o = fmaf(e, all[(w * GQ + h) * WIDE + d], o);
      }
      parts[(to + h * SPLITS) * HD + d] = (u16)pack(sum == 0.f ? 0.f : o * reciprocal(sum), 0.f);
      if (d == 0) sums[to + h * SPLITS] = make_float2(most, sum);
    }
    meet_group<GROUPS, THREADS>(group);
  }
}
