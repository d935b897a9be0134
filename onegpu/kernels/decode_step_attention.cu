// One query per row of the batch against its keys: the new head norms, rotary embedding, the write into the cache and the
// attention over SPLITS parts of the keys, which the next product puts together.
//
// qkv float32 [rows, (HKV * ALL + 2 HKV) * HD] -> parts 16-bit [rows, HKV * ALL, SPLITS, HD], sums float2 (maximum of the
// scores in base 2, sum) of each. Caches [rows, HKV, length, HD]; the token at position p stands in slot p % length.
// Filled in: HD (a multiple of 8, padded to 32), ALL (query heads of a key head), GQ (of them taken at a time, up to 8), HKV,
// SPLITS, ROT (rotated values of a head), NORMS (1: of each query and key; 2: of all queries, and all keys, together), GROUPED (qkv
// has for each key head its queries, the key, the value; else all queries, all keys, all values), CAP (scores are
// cap tanh(score / cap)), ALIBI (slopes, float32 [HKV * ALL]; 2: rounded, as Heads in decode_step.py says), CLIP (qkv is cut off at
// +-clip), WARPS, STAGES (tiles of a warp's ring), APART (the outputs have room beside the ring: a block that takes several heads
// fetches the next one's first keys before it is done with this one).
//
// A warp takes 16 keys at a time: K and V by asynchronous copies into a ring of its own, both products by mma with the
// query heads as rows. Keys that a row may not see are copied as zeros. The new key never goes through the cache: the
// last part takes it from registers. What earlier steps wrote is fetched before the kernel waits for the one in front of it, which
// must not be the one that wrote it: a step's first kernel, the embedding, lets others start when the step before has ended.
constexpr int THREADS = WARPS * 32;
constexpr int WIDE = (HD + 31) / 32 * 32;                              // of a head in shared memory and registers
constexpr int UNITS = WIDE / 8, ROW = WIDE * 2, TILE = 16 * ROW, STAGE = 2 * TILE;       // 16-byte units of a row; bytes
constexpr int K_SWAP = WIDE % 64 == 0 ? 4 : 0, V_MASK = UNITS % 8 == 0 ? 7 : 3;
constexpr int CHUNKS = (ALL + GQ - 1) / GQ, HEADS = HKV * ALL, WIDTH = (HEADS + 2 * HKV) * HD, HALF = ROT / 2;
constexpr int RING = WARPS * STAGES * STAGE;  // if not APART, the outputs of the warps, [WARPS, 8, WIDE] float32, come to lie in the ring
static_assert(STAGE >= 8 * WIDE * 4, "room for the outputs");
static_assert(HD % 8 == 0 && HD <= 256 && GQ <= 8 && ROT <= HD, "head dimensions");

DEVICE float rounded(float v) { return value((u16)pack(v, 0.f)); }
DEVICE int key_at(int key, int unit) { return key * ROW + (unit ^ (key & 1 ? K_SWAP : 0)) * 16; }
DEVICE int value_at(int key, int unit) { return key * ROW + (unit ^ (key & V_MASK)) * 16; }

// Which keys of the cache a row sees, in the order of their slots.
struct Seen {
  int length, slot, window, back, from, to;                              // back: how far before the new token its row begins
  DEVICE bool at(int j) const {
    int ago = slot - j;
    if (ago <= 0) ago += length;
    return j < to && ago < window && ago <= back;
  }
};

__global__ void __launch_bounds__(THREADS, 1)
attend(const float* qkv, const i64* position, const i64* rope_position, const int* first, u16* keys, u16* values, const float* inv_freq,
       const u16* q_gain, const u16* k_gain, const float* slopes, u16* parts, float2* sums, int rows, int length, int window,
       int position_step, int rope_step, float scale, float rope_scale, float eps, float one, float cap, float clip) {
  SHARED(smem);
  u8* ring = smem;
  u8* fresh_tile = smem + RING;                                          // the new key and value, as a tile of 16 keys
  u16* qs = (u16*)(fresh_tile + STAGE);                                  // [8, WIDE] rotated queries
  float* heads = (float*)(qs + 8 * WIDE);                                // [WARPS, WIDE] a head at work
  float* turn = heads + WARPS * WIDE;                                    // [2, HALF] cosines and sines
  float* ends = turn + (HALF ? 2 * HALF : 2);                            // [WARPS, 8, 2] maxima and sums
  float* all = APART ? ends + WARPS * 16 : (float*)ring;                 // [WARPS, 8, WIDE]
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const Shared mine = shared(ring + warp * STAGES * STAGE);

  let_next_kernel_start();
  const int items = rows * HKV * CHUNKS * SPLITS;
  if (blockIdx.x >= items) wait_before_reading_x();
  int split, chunk, kv, row, tiles; Seen seen; i64 base;                 // of the item at work
  const i64 all_now = fresh_i64(position);
  auto begin_item = [&](int item) {
    split = item % SPLITS; chunk = item / SPLITS % CHUNKS; kv = item / (SPLITS * CHUNKS) % HKV; row = item / (SPLITS * CHUNKS * HKV);
    const i64 now = position_step ? fresh_i64(position + (i64)row * position_step) : all_now;
    const i64 begin = first ? (i64)*(first + row) : 0;
    seen.length = length; seen.slot = (int)(now % length); seen.window = min(window, length); seen.back = (int)(now - begin);
    const bool whole = now >= length;                                    // the ring is full: its slots are not in order
    int lo = whole ? 0 : (int)max(begin, now - window + 1), hi = whole ? length : (int)now;
    lo = max(lo, 0);
    const int share = ((hi - lo + SPLITS - 1) / SPLITS + 15) / 16 * 16;
    seen.from = min(lo + split * share, hi); seen.to = min(seen.from + share, hi);
    base = ((i64)row * HKV + kv) * length;
    tiles = (seen.to - seen.from + 15) / 16;
  };
  auto fetch = [&](int tile, int stage) {
    if (tile < tiles) {
      const Shared to = mine + stage * STAGE;
#pragma unroll
      for (int i = 0; i < UNITS / 2; i++) {
        int u = lane + 32 * i, key = u / UNITS, unit = u % UNITS, j = seen.from + tile * 16 + key;
        bool ok = seen.at(j) && (HD == WIDE || unit * 8 < HD); i64 from = (base + (ok ? j : 0)) * HD + (ok ? unit * 8 : 0);
        copy16(to + key_at(key, unit), keys + from, ok ? 16 : 0);
        copy16(to + TILE + value_at(key, unit), values + from, ok ? 16 : 0);
      }
    }
    commit();
  };
  auto fetch_first = [&](int item) {
    if (item >= items) return;
    begin_item(item);
#pragma unroll
    for (int i = 0; i < STAGES; i++) fetch(warp + i * WARPS, i);
  };
  fetch_first(blockIdx.x);
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int head0 = chunk * GQ, count = min(GQ, ALL - head0);          // query heads of this key head
    const bool before = item == blockIdx.x;

    if (HALF) {
      const float p = (float)fresh_i64(rope_position + (i64)row * rope_step);
      for (int i = threadIdx.x; i < HALF; i += THREADS) { float a = p * inv_freq[i]; turn[i] = cosf(a) * rope_scale; turn[HALF + i] = sinf(a) * rope_scale; }
    }
    for (int i = threadIdx.x; i < STAGE / 16; i += THREADS) *(uint4*)(fresh_tile + i * 16) = make_uint4(0, 0, 0, 0);
    for (int i = threadIdx.x; i < WIDE; i += THREADS) *(uint4*)(qs + i * 8) = make_uint4(0, 0, 0, 0);
    __syncthreads();
    if (before) wait_before_reading_x();
    const float* own = qkv + (i64)row * WIDTH;
    auto clipped = [&](float v) { return CLIP ? (v > clip ? clip : v < -clip ? -clip : v) : v; };  // NaN stays
    float together[2] = {0.f, 0.f};
    if (NORMS == 2) {                                                    // all queries, then all keys
#pragma unroll
      for (int what = 0; what < 2; what++) {
        float squares = 0.f;
        for (int i = threadIdx.x; i < (what ? HKV : HEADS) * HD; i += THREADS) { float v = clipped(fresh(own + what * HEADS * HD + i)); squares = fmaf(v, v, squares); }
        squares = warp_sum(squares);
        if (lane == 0) ends[2 * warp + what] = squares;
      }
      __syncthreads();
#pragma unroll
      for (int w = 0; w < WARPS; w++) { together[0] += ends[2 * w]; together[1] += ends[2 * w + 1]; }
    }
    // A warp a head: the queries of this key head, then the new key, then the new value.
    for (int h = warp; h < GQ + 2; h += WARPS) {
      const bool query = h < GQ, key = h == GQ;
      if (query ? h >= count : split != SPLITS - 1) continue;
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
#pragma unroll
        for (int i = 0; i < WIDE / 32; i++) work[lane + 32 * i] = v[i];
        __syncwarp();
#pragma unroll
        for (int i = 0; i < WIDE / 32; i++) {
          const int d = lane + 32 * i;
          if (d < HALF) v[i] = work[d] * turn[d] - work[d + HALF] * turn[HALF + d];
          else if (d < ROT) v[i] = work[d] * turn[d - HALF] + work[d - HALF] * turn[d];
        }
        __syncwarp();
      }
#pragma unroll
      for (int i = 0; i < WIDE / 32; i++) {
        const int d = lane + 32 * i; const u16 r = (u16)pack(v[i], 0.f);
        if (HD != WIDE && d >= HD) continue;
        if (query) qs[h * WIDE + d] = r;
        else {
          *(u16*)(fresh_tile + (key ? key_at(0, d / 8) : TILE + value_at(0, d / 8)) + d % 8 * 2) = r;
          if (chunk == 0) (key ? keys : values)[(base + seen.slot) * HD + d] = r;
        }
      }
    }
    __syncthreads();

    u32 q[WIDE / 32][4];
#pragma unroll
    for (int i = 0; i < WIDE / 32; i++) { uint4 a = *(const uint4*)(qs + g * WIDE + 32 * i + 8 * t); q[i][0] = a.x; q[i][1] = a.y; q[i][2] = a.z; q[i][3] = a.w; }
    const float ninf = -__uint_as_float(0x7f800000u);
    const float slope = ALIBI && g < count ? slopes[kv * ALL + head0 + g] : 0.f;
    float out[WIDE / 8][4], top = ninf, total = 0.f;
#pragma unroll
    for (int i = 0; i < WIDE / 8; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.f;
    // mask: bit j, key j of the 16 is seen. slot: of the first.
    auto tile_of_keys = [&](const u8* k, const u8* v, u32 mask, int slot) {
      float s[2][4];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        s[half][0] = s[half][1] = s[half][2] = s[half][3] = 0.f;
#pragma unroll
        for (int i = 0; i < WIDE / 32; i++) {
          uint4 b = *(const uint4*)(k + key_at(half * 8 + g, 4 * i + t));
          mma<BF16>(s[half], q[i][0], 0, q[i][1], 0, b.x, b.y);
          mma<BF16>(s[half], q[i][2], 0, q[i][3], 0, b.z, b.w);
        }
      }
      float w[4] = {s[0][0], s[0][1], s[1][0], s[1][1]}, most = top;     // keys 2t, 2t + 1, 2t + 8, 2t + 9
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int j = 2 * t + i % 2 + i / 2 * 8;
        w[i] *= scale;
        if (CAP) w[i] = cap * (1.f - 2.f / (exp2_(2.f * LOG2E * (w[i] / cap)) + 1.f));
        if (ALIBI) {
          int ago = seen.slot - slot - j; ago = ago < 0 ? ago + length : ago;
          w[i] = ALIBI == 1 ? w[i] - slope * (float)ago : rounded(w[i] + rounded(slope * (float)(seen.back - ago)));
        }
        w[i] = mask >> j & 1 ? w[i] * LOG2E : ninf;
        most = larger(most, w[i]);
      }
      most = larger(most, shuffle_xor(most, 1)); most = larger(most, shuffle_xor(most, 2));
      const float shrink = top == most ? 1.f : exp2_(top - most), base_ = most == ninf ? 0.f : most;
      top = most; total *= shrink;
#pragma unroll
      for (int i = 0; i < 4; i++) { w[i] = exp2_(w[i] - base_); total += w[i]; }
#pragma unroll
      for (int i = 0; i < WIDE / 8; i++) { out[i][0] *= shrink; out[i][1] *= shrink; }
      const u32 p0 = pack(w[0], w[1]), p1 = pack(w[2], w[3]);
#pragma unroll
      for (int i = 0; i < WIDE / 16; i++) {
        u32 b[4]; transposed(b, v + value_at(lane & 15, 2 * i + (lane >> 4)));
        mma<BF16>(out[2 * i], p0, 0, p1, 0, b[0], b[1]);
        mma<BF16>(out[2 * i + 1], p0, 0, p1, 0, b[2], b[3]);
      }
    };
    if (split == SPLITS - 1 && warp == WARPS - 1) tile_of_keys(fresh_tile, fresh_tile + TILE, 1, seen.slot);
    for (int tile = warp, stage = 0; tile < tiles; tile += WARPS) {
      copies_left<STAGES - 1>();
      __syncwarp();
      u32 mask = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) { int j = 2 * t + i % 2 + i / 2 * 8; mask |= (u32)seen.at(seen.from + tile * 16 + j) << j; }
      const u8* k = ring + (warp * STAGES + stage) * STAGE;
      tile_of_keys(k, k + TILE, mask, seen.from + tile * 16);
      __syncwarp();
      fetch(tile + STAGES * WARPS, stage);
      if (++stage == STAGES) stage = 0;
    }
    const i64 to = ((i64)row * HEADS + kv * ALL + head0) * SPLITS + split;
    if (APART) fetch_first(item + gridDim.x);
    total += shuffle_xor(total, 1); total += shuffle_xor(total, 2);
    if (!APART) { copies_left<0>(); __syncthreads(); }
#pragma unroll
    for (int i = 0; i < WIDE / 8; i++) *(float2*)(all + (warp * 8 + g) * WIDE + 8 * i + 2 * t) = make_float2(out[i][0], out[i][1]);
    if (t == 0) { ends[(warp * 8 + g) * 2] = top; ends[(warp * 8 + g) * 2 + 1] = total; }
    __syncthreads();
    for (int i = threadIdx.x; i < count * HD; i += THREADS) {
      const int h = i / HD, d = i % HD; float most = ninf, sum = 0.f, o = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) most = larger(most, ends[(w * 8 + h) * 2]);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        float m = ends[(w * 8 + h) * 2], e = m == most ? 1.f : exp2_(m - most);
        sum = fmaf(e, ends[(w * 8 + h) * 2 + 1], sum); o = fmaf(e, all[(w * 8 + h) * WIDE + d], o);
      }
      parts[(to + h * SPLITS) * HD + d] = (u16)pack(sum == 0.f ? 0.f : o / sum, 0.f);
      if (d == 0) sums[to + h * SPLITS] = make_float2(most, sum);
    }
    __syncthreads();
    if (!APART) fetch_first(item + gridDim.x);
  }
}
