// x of decode_step_product.cu, from memory into shared memory: the M rows of a decoding step, 16-bit.
//
// SOURCE  0  x = norm(s) of the stream s, float32 [M, K]: s = h (OUTER 0); s = outer(h) (OUTER 1: a norm behind the residual sum);
//            s = h + outer(y) (OUTER 2: a norm in front of it). OUTER 1 and 2 write s where `stream` points, if it does: not into h,
//            which other blocks still read. Each block writes a share of the columns.
//         1  x = the attention's output, put together from its parts: 16-bit [M, heads, SPLITS, HD], float2 (maximum, sum) of each
//         2  x is 16-bit [M, K]
// The CL blocks of a cluster share the columns, SHARE each (the last one what is left), and exchange the sums of the norms.
// A norm is 0 none, 1 RMSNorm, 2 LayerNorm: NORM for the inner one, OUTER_NORM for the outer. Gains and biases may be missing;
// `one` is added to gains.
constexpr int THREADS = WARPS * 32;
constexpr int KB = FMT == 0 ? CB / 2 : FMT == 1 ? CB : 2 * CB;         // columns of a piece
#ifndef HALF
#define HALF 0
#endif
constexpr int TO_FP16 = (FMT == 2 || HALF) && BF16;
constexpr int PITCH = (SHARE * 2 + 127) / 128 * 128 + (FMT == 0 ? 64 : 16);  // bytes of a row of x
constexpr int VECTORS = SHARE / 4, PER = (VECTORS + THREADS - 1) / THREADS;  // four columns each, of a thread
constexpr int LIVE = (OUTER == 2 ? 2 : OUTER || NORM == 2 ? 6 : 8) * (WARPS > 12 ? 1 : 2) / (SOURCE == 1 ? SPLITS : 1);  // vectors of x in a thread's registers, about
constexpr int BATCH = PER >= LIVE ? 1 : M < LIVE / PER ? M : LIVE / PER;  // rows of x at a time
constexpr int ASKED = PER * SPLITS <= 16 ? PER : 16 / SPLITS;          // SOURCE 1: vectors of a row whose parts are asked for at a time
constexpr int SHARES = 5 * M * WARPS + WARPS + (CL > 1 ? 5 * M * CL : 0);  // five values a row and warp, a warp's largest bias, five a row and block
constexpr int UNEVEN = K % SHARE != 0, COUNT = CL > 1 ? CL : WARPS;    // COUNT: values that make a sum
static_assert((CL - 1) * SHARE < K, "each block has columns");

// Where the columns 4 c.. stand in a row. decode_step_single.cu reads sections of 256 columns at once: in every other one, the halves of
// 16 columns change places, so that two sections spread over all banks.
#ifndef SECT
#define SECT 1
#endif
#ifndef COLS                                                              // of a section; decode_step_bulk.cu has others
#define COLS 256
#endif
DEVICE int place_of(int c) { return SECT > 1 ? c ^ (c / (COLS / 4) & 1) << 1 : c; }

DEVICE int first_column() { return CL > 1 ? cluster_rank() * SHARE : 0; }
DEVICE int own_columns() { return UNEVEN ? min(SHARE, K - first_column()) : SHARE; }

DEVICE float tanh_(float x) { return 1.f - 2.f / (exp2_(2.f * LOG2E * x) + 1.f); }
DEVICE float activated(float x) {
  if (ACT == 0) return x / (1.f + exp2_(-LOG2E * x));
  if (ACT == 3) return x < 0.f ? 0.f : x;                                // NaN stays
  if (ACT == 1) { float z = 0.7978845608028654f * fmaf(0.044715f * x * x, x, x); return x / (1.f + exp2_(-2.f * LOG2E * z)); }
  return 0.5f * x * (1.f + erff(x * 0.7071067811865476f));
}
DEVICE float4 four(float2 p) {
  u32 a = __float_as_uint(p.x), b = __float_as_uint(p.y);
  return make_float4(value((u16)a), value((u16)(a >> 16)), value((u16)b), value((u16)(b >> 16)));
}
DEVICE float largest(float4 a) { return larger(larger(fabsf(a.x), fabsf(a.y)), larger(fabsf(a.z), fabsf(a.w))); }
DEVICE bool inside_row(int c) { return UNEVEN ? c < own_columns() / 4 : VECTORS % THREADS == 0 || c < VECTORS; }

// Columns 4 c to 4 c + 3 of x before any norm.
DEVICE float4 columns(const void* in, int m, int c) {
  if (SOURCE == 0) return fresh4((const float*)in + (i64)m * K + 4 * c);
  return four(fresh2((const u16*)in + (i64)m * K + 4 * c));
}
// The same in the parts of the attention: many are asked for before any are put together. Every block needs the weight of every part, which are
// few bytes: a block reads them once, WEIGHED a head, and keeps the weights where x of the same row will stand.
constexpr int WEIGHED = SPLITS > 4 ? 8 : 4, ALL_WEIGHTS = BATCH * (SHARE / HD + 2 * (CL > 1)) * WEIGHED, OF_THREAD = (ALL_WEIGHTS + THREADS - 1) / THREADS;
static_assert(SOURCE != 1 || (SHARE / HD + 2 * (CL > 1)) * WEIGHED * 4 <= PITCH, "weights have room");
struct Parts {
  float2 p[SPLITS];
  DEVICE void ask(const void* in, int m, int c) {
    const i64 first = ((i64)m * (K / HD) + 4 * c / HD) * SPLITS;
#pragma unroll
    for (int i = 0; i < SPLITS; i++) p[i] = fresh2((const u16*)in + (first + i) * HD + 4 * c % HD);
  }
  DEVICE float4 together(const u8* weights, int c) const {
    const float4* w = (const float4*)weights + (4 * c / HD - first_column() / HD) * (WEIGHED / 4); float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    float e[WEIGHED];
#pragma unroll
    for (int i = 0; i < WEIGHED; i += 4) { const float4 q = w[i / 4]; e[i] = q.x; e[i + 1] = q.y; e[i + 2] = q.z; e[i + 3] = q.w; }
#pragma unroll
    for (int i = 0; i < SPLITS; i++) {
      const float4 a = four(p[i]);
      v.x = fmaf(e[i], a.x, v.x); v.y = fmaf(e[i], a.y, v.y); v.z = fmaf(e[i], a.z, v.z); v.w = fmaf(e[i], a.w, v.w);
    }
    return v;
  }
};
struct PartWeights {
  float2 s[OF_THREAD];
  DEVICE static int heads() { return (first_column() + own_columns() - 1) / HD + 1 - first_column() / HD; }
  DEVICE void ask(const float2* ml, int m0) {
#pragma unroll
    for (int k = 0; k < OF_THREAD; k++) {
      const int e = threadIdx.x + k * THREADS, of_row = heads() * WEIGHED, m = m0 + e / of_row, i = e % WEIGHED;
      s[k] = make_float2(__uint_as_float(0xff800000u), 0.f);
      if (e / of_row < BATCH && m < M && i < SPLITS) s[k] = fresh2(ml + ((i64)m * (K / HD) + first_column() / HD + e % of_row / WEIGHED) * SPLITS + i);
    }
  }
  DEVICE void keep(int m0, u8* xs) const {
#pragma unroll
    for (int k = 0; k < OF_THREAD; k++) {
      const int e = threadIdx.x + k * THREADS, of_row = heads() * WEIGHED, m = m0 + e / of_row; float top = s[k].x;
#pragma unroll
      for (int o = 1; o < WEIGHED; o *= 2) top = larger(top, shuffle_xor(top, o));
      const float w = (s[k].x == top ? 1.f : exp2_(s[k].x - top)) * s[k].y; float total = w;
#pragma unroll
      for (int o = 1; o < WEIGHED; o *= 2) total += shuffle_xor(total, o);
      if (e / of_row < BATCH && m < M) ((float*)(xs + m * PITCH))[e % of_row] = w * reciprocal(total);
    }
    __syncthreads();
  }
};

// A value of each warp for value `slot` of a row, and their sum and the largest.
template <int SLOT> DEVICE void share(float* shares, int m, float v) {
  if ((threadIdx.x & 31) == 0) shares[(SLOT * M + m) * WARPS + (threadIdx.x >> 5)] = v;
}
// How the blocks of a cluster exchange sums: by turns at two barriers, for a block sends those of the next turn but one when all have had this one.
struct Turns { u8* bars; int turn; };
// Behind it: rows m0.. of slot SLOT are summed (SUM), the next slot's largest found (LARGEST). In a cluster, a warp does that for a row,
// and each block learns the sums of all; the largest is the block's own.
template <int SLOT, int SUM, int LARGEST> DEVICE void meet_shares(float* shares, int m0, Turns& turns) {
  __syncthreads();
  if (CL == 1) return;
  const int lane = threadIdx.x & 31, m1 = min(m0 + BATCH, M); float* totals = shares + 5 * M * WARPS + WARPS; u8* bar = turns.bars + (turns.turn & 1) * 8;
  for (int m = m0 + (threadIdx.x >> 5); m < m1; m += WARPS) {
    if (SUM) {
      const float sum = warp_sum(lane < WARPS ? shares[(SLOT * M + m) * WARPS + lane] : 0.f);
      if (lane < CL) send(totals + (SLOT * M + m) * CL + cluster_rank(), lane, sum, bar);
    }
    if (LARGEST) {
      const float most = __uint_as_float(warp_max(lane < WARPS ? __float_as_uint(shares[((SLOT + 1) * M + m) * WARPS + lane]) : 0));
      if (lane < CL) totals[((SLOT + 1) * M + m) * CL + lane] = most;
    }
  }
  if (SUM) {
    if (threadIdx.x == 0) arrive_and_expect(bar, (m1 - m0) * CL * 4);
    wait_for_blocks(bar, turns.turn++ >> 1 & 1);
  }
  if (LARGEST) __syncthreads();
}
template <int SLOT> DEVICE const float* met(const float* shares, int m) { return shares + (CL > 1 ? 5 * M * WARPS + WARPS : 0) + (SLOT * M + m) * COUNT; }
template <int SLOT> DEVICE float summed(const float* shares, int m) {
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < COUNT; w++) sum += met<SLOT>(shares, m)[w];
  return sum;
}
template <int SLOT> DEVICE float largest_of(const float* shares, int m) {
  float most = 0.f;
#pragma unroll
  for (int w = 0; w < COUNT; w++) most = larger(most, met<SLOT>(shares, m)[w]);
  return most;
}

// The gain and bias of a norm in a thread's columns, as they are stored.
template <int KIND> struct Weights {
  float2 gains[KIND ? PER : 1], biases[KIND == 2 ? PER : 1];
  DEVICE void prepare(const u16* gain, const u16* bias) {
    if (KIND == 0) return;
    gain += gain ? first_column() : 0; bias += bias ? first_column() : 0;
    const float ones = __uint_as_float(BF16 ? 0x3f803f80u : 0x3c003c00u);
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int c = threadIdx.x + i * THREADS;
      gains[i] = make_float2(ones, ones);
      if (inside_row(c) && gain) gains[i] = *(const float2*)(gain + 4 * c);
      if (KIND == 2) {
        biases[i] = make_float2(0.f, 0.f);
        if (inside_row(c) && bias) biases[i] = *(const float2*)(bias + 4 * c);
      }
    }
  }
  DEVICE float largest_bias() const {
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < PER; i++) if (KIND == 2) most = larger(most, largest(four(biases[i])));
    return most;
  }
  // Rows m0.. of v, less their mean and times the gain; what is missing is the factor and the bias. The largest value is wanted
  // where x is scaled. Takes values SLOT to SLOT + 2 of `shares`.
  template <int SLOT, int LARGEST> DEVICE void centre(float4 (&v)[BATCH][PER], int m0, float eps, float one, float* shares, float (&factor)[BATCH], float (&most)[BATCH], Turns& turns) const {
    if (KIND == 2) {
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < PER; i++) sum += v[b][i].x + v[b][i].y + (v[b][i].z + v[b][i].w);
        sum = warp_sum(sum);
        if (M % BATCH == 0 || m0 + b < M) share<SLOT>(shares, m0 + b, sum);
      }
      meet_shares<SLOT, 1, 0>(shares, m0, turns);
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      if (M % BATCH && m0 + b >= M) break;
      const float mean = KIND == 2 ? summed<SLOT>(shares, m0 + b) * (1.f / K) : 0.f; float squares = 0.f, top = 0.f;
#pragma unroll
      for (int i = 0; i < PER; i++) {
        float4& a = v[b][i];
        if (KIND == 2 && inside_row(threadIdx.x + i * THREADS)) { a.x -= mean; a.y -= mean; a.z -= mean; a.w -= mean; }
        if (KIND) {
          const float4 g = four(gains[i]);
          squares = fmaf(a.x, a.x, fmaf(a.y, a.y, fmaf(a.z, a.z, fmaf(a.w, a.w, squares))));
          a.x *= g.x + one; a.y *= g.y + one; a.z *= g.z + one; a.w *= g.w + one;
        }
        if (LARGEST) top = larger(top, largest(a));
      }
      if (KIND) { squares = warp_sum(squares); share<SLOT + 1>(shares, m0 + b, squares); }
      if (LARGEST) share<SLOT + 2>(shares, m0 + b, __uint_as_float(warp_max(__float_as_uint(top))));
    }
    if (KIND || LARGEST) meet_shares<SLOT + 1, KIND, LARGEST>(shares, m0, turns);
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      factor[b] = 1.f; most[b] = 0.f;
      if (M % BATCH && m0 + b >= M) break;
      if (KIND) factor[b] = rsqrtf(summed<SLOT + 1>(shares, m0 + b) * (1.f / K) + eps);
      if (LARGEST) most[b] = largest_of<SLOT + 2>(shares, m0 + b) * factor[b];
    }
  }
  DEVICE float4 finish(float4 a, int i, float factor, float scale) const {
    factor *= scale;
    if (KIND == 2) {
      const float4 b = four(biases[i]);
      return make_float4(fmaf(a.x, factor, b.x * scale), fmaf(a.y, factor, b.y * scale), fmaf(a.z, factor, b.z * scale), fmaf(a.w, factor, b.w * scale));
    }
    return make_float4(a.x * factor, a.y * factor, a.z * factor, a.w * factor);
  }
};

struct Input {
  Weights<SOURCE == 0 ? NORM : 0> inner;
  Weights<SOURCE == 0 && OUTER ? OUTER_NORM : 0> outer;

  // What does not depend on the kernels before. A barrier must stand between this and `load`'s use of the largest bias: it has one.
  DEVICE void prepare(const u16* gain, const u16* bias, const u16* outer_gain, const u16* outer_bias, float* shares) {
    inner.prepare(gain, bias); outer.prepare(outer_gain, outer_bias);
    if (TO_FP16 && SOURCE == 0 && NORM == 2) {
      const float most = __uint_as_float(warp_max(__float_as_uint(inner.largest_bias())));
      if ((threadIdx.x & 31) == 0) shares[5 * M * WARPS + (threadIdx.x >> 5)] = most;
    }
  }

  DEVICE void load(const void* in, const float2* ml, const float* added, float* stream, float eps, float one, float outer_eps, float outer_one, u8* xs, float* shares, float* unscale, u8* bars = nullptr) {
    Turns turns = {bars, 0};
    const int before = first_column() / 4, cluster = blockIdx.x / CL, clusters = gridDim.x / CL;
    for (int m0 = 0; m0 < M; m0 += BATCH) {
      float4 v[BATCH][PER], h[OUTER == 2 ? BATCH : 1][OUTER == 2 ? PER : 1]; float factor[BATCH], most[BATCH];
      auto inside = [&](int b, int i) { return i < PER && inside_row(threadIdx.x + i * THREADS) && (M % BATCH == 0 || m0 + b < M); };
#pragma unroll
      for (int b = 0; b < BATCH; b++)
#pragma unroll
        for (int i = 0; i < PER; i++) {
          const int c = threadIdx.x + i * THREADS; const bool there = inside(b, i);
          v[b][i] = make_float4(0.f, 0.f, 0.f, 0.f);
          if constexpr (OUTER == 2) {
            h[b][i] = v[b][i];
            if (there) { v[b][i] = fresh4(added + (i64)(m0 + b) * K + 4 * (before + c)); h[b][i] = columns(in, m0 + b, before + c); }
          } else if (SOURCE != 1 && there) v[b][i] = columns(in, m0 + b, before + c);
        }
      if constexpr (SOURCE == 1) {
        PartWeights weights;
        weights.ask(ml, m0);
#pragma unroll
        for (int from = 0; from < PER; from += ASKED) {
          Parts parts[BATCH][ASKED];
#pragma unroll
          for (int b = 0; b < BATCH; b++)
#pragma unroll
            for (int i = 0; i < ASKED; i++)
              if (inside(b, from + i)) parts[b][i].ask(in, m0 + b, before + threadIdx.x + (from + i) * THREADS);
          if (from == 0) weights.keep(m0, xs);
#pragma unroll
          for (int b = 0; b < BATCH; b++)
#pragma unroll
            for (int i = 0; i < ASKED; i++)
              if (inside(b, from + i)) v[b][from + i] = parts[b][i].together(xs + (m0 + b) * PITCH, before + threadIdx.x + (from + i) * THREADS);
        }
        if (!TO_FP16) __syncthreads();                                   // else they meet below, before x takes the weights' place
      }
      if (OUTER) {
        outer.template centre<0, 0>(v, m0, outer_eps, outer_one, shares, factor, most, turns);
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
          if (M % BATCH && m0 + b >= M) break;
#pragma unroll
          for (int i = 0; i < PER; i++) {
            const int c = threadIdx.x + i * THREADS;
            float4 a = outer.finish(v[b][i], i, factor[b], 1.f);
            if constexpr (OUTER == 2) { a.x += h[b][i].x; a.y += h[b][i].y; a.z += h[b][i].z; a.w += h[b][i].w; }
            v[b][i] = a;
            if (stream && inside_row(c) && c % clusters == cluster) *(float4*)(stream + (i64)(m0 + b) * K + 4 * (before + c)) = a;
          }
        }
      }
      inner.template centre<2, TO_FP16>(v, m0, eps, one, shares, factor, most, turns);
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const int m = m0 + b; float scale = 1.f;
        if (M % BATCH && m >= M) break;
        if (TO_FP16) {                                                   // the largest value of the row comes to lie in [2^13, 2^15)
          float top = most[b];
          if (SOURCE == 0 && NORM == 2) {                                // not above it, if there are biases
            float bias = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) bias = larger(bias, shares[5 * M * WARPS + w]);
            top += bias;
          }
          int e = (int)(__float_as_uint(top) >> 23 & 255), up = min(max(141 - e, -126), 126);
          scale = __uint_as_float((u32)(127 + up) << 23);
          if (threadIdx.x == 0) unscale[m] = __uint_as_float((u32)(127 - up) << 23);
        }
#pragma unroll
        for (int i = 0; i < PER; i++) {
          const int c = threadIdx.x + i * THREADS; float4 a = v[b][i];
          if (!inside_row(c)) continue;
          if ((SOURCE == 0 && NORM) || TO_FP16) a = inner.finish(a, i, factor[b], scale);
          *(uint2*)(xs + m * PITCH + 8 * place_of(c)) = TO_FP16 ? make_uint2(pack_h(a.x, a.y), pack_h(a.z, a.w)) : make_uint2(pack(a.x, a.y), pack(a.z, a.w));
        }
      }
    }
  }
};
