// One to four rows of x (for int8 and 16-bit weights to eight): y = x W^T, weights from memory straight to the registers.
//
// A block takes a range of whole rows of W, in tiles of 16. The pieces of its tiles (16 rows, CB = 64 ITERS bytes of each) go round
// the warps; a warp sends for its next DEPTH - 1 pieces before it multiplies one. Sums of the warps meet in shared memory after every TG
// tiles, in fixed order. Nothing of W is held in shared memory, so a second block may be there and get ready meanwhile (BLOCKS 2).
//
// 4-bit: a lane's 16 bytes of a row are half a block of 64, so the four lanes of a row hold two blocks, which have a scale each. mma has
// eight columns for the MP rows of x: two of them take a row, one with zeros in place of what meets the second block, one of the
// first. What is left of the columns takes other 128 columns of W, so that x is read once: column 2 (SUB' MP + row) + block, where SUB'
// counts what has come to SUB a turn. A lane adds the sums of its own SUB' and row; the rest are not looked at.
// Filled in: MP, WARPS, ITERS, DEPTH, TG, BLOCKS (that share a multiprocessor), EARLY (as in few_rows_narrow.cu).
constexpr int THREADS = WARPS * 32, CB = 64 * ITERS;
constexpr int GROUP = FMT == 0 ? 32 : FMT == 1 ? 64 : 128, KB = ITERS * GROUP;   // columns that the four lanes of a row take together
constexpr int SUB = FMT == 2 ? (ITERS < 4 / MP ? ITERS : 4 / MP) : 1, TURNS = ITERS / SUB;
constexpr int XS = GROUP / 32;                                         // units of 16 bytes of x that a lane takes for a group
constexpr int SUMS = TG * WARPS * 16 * MP;                              // of the warps, in floats
constexpr int IN_TABLE = FMT == 2;                                     // the table leaves 128 of every 256 bytes free
constexpr int TO_FP16 = FMT == 2 && BF16, MMA_BF16 = BF16 && FMT != 2;
static_assert(!IN_TABLE || (SUMS <= 8192 && TABLE_SHIFT == 8 && MP <= 4), "the sums have 32 KB in the table");

constexpr int EACH = PACKED ? 2 : 4;

struct Piece {
  uint4 up[ITERS], low[ITERS];                                          // rows g and g + 8
  // 4-bit, of what a lane sums: two blocks of row g, two of row g + 8. Quantised: codes (PACKED: two in one), and their own scales.
  float scale[FMT == 2 ? EACH * TURNS : 1], outer[FMT == 2 && NESTED ? EACH * TURNS : 1];
};

ENTRY __global__ void __launch_bounds__(THREADS, BLOCKS)
few_rows(const u8* __restrict__ w, const u16* __restrict__ x, u16* __restrict__ y, const u16* __restrict__ bias,
         const void* __restrict__ absmax, const float* __restrict__ nested, const float* __restrict__ map,
         const float* __restrict__ offset, int m, int n, int k, int shift, int nested_shift) {
  SHARED(smem);
  const int lane = threadIdx.x & 31, warp = of_warp(threadIdx.x >> 5), g = lane >> 2, t = lane & 3;
  const int r0 = (int)((i64)n * blockIdx.x / gridDim.x), r1 = (int)((i64)n * (blockIdx.x + 1) / gridDim.x);
  const int tiles = (r1 - r0 + 15) / 16, pieces = (k + KB - 1) / KB;
  const int pitch = (pieces * KB * 2 + 127) / 128 * 128 + (FMT == 0 ? 64 : FMT == 1 ? 16 : 0), nb = k / 64;
  const int row_bytes = FMT == 0 ? 2 * k : FMT == 1 ? k : k / 2;
  u8* table = smem;
  u32* top = (u32*)(smem + TABLE);                                       // largest |x| of each row, as bits
  u8* zeros = smem + TABLE + 64;                                         // 64 bytes
  float* map_ = (float*)(smem + TABLE + 128);
  u8* xs = smem + TABLE + 128 + (NESTED ? 1024 : 0);
  float* red = (float*)(xs + MP * pitch);
  auto sum_at = [&](int i) { return IN_TABLE ? (float*)(table + (i >> 5) * 256 + 128) + (i & 31) : red + i; };
  const Output out = {y, bias, (const float*)absmax, n};
  const u64 policy = evict_first();

  // What a lane sums of 4-bit weights: row `t % MP` of x, of every SUB groups the one of number `t / MP`.
  const int own = t / MP, sums_own = FMT != 2 || t < SUB * MP;
  Walk<WARPS> ahead = {warp / pieces, warp % pieces, pieces}, here = ahead;
  auto fetch = [&](Piece& p) {
    if (ahead.tile < tiles) {
      const int row = min(r0 + ahead.tile * 16 + g, r1 - 1), low = min(row + 8, r1 - 1), at = ahead.piece * CB + t * 16;
      const u8 *a = w + (i64)row * row_bytes + at, *b = w + (i64)low * row_bytes + at;
#pragma unroll
      for (int j = 0; j < ITERS; j++) {
        const bool inside = at + j * 64 < row_bytes;
        p.up[j] = read16(a + j * 64, inside, policy);
        p.low[j] = read16(b + j * 64, inside, policy);
      }
      if (FMT == 2) {
#pragma unroll
        for (int j = 0; j < TURNS; j++)
#pragma unroll
          for (int i = 0; i < EACH; i++) {
            const int block = ahead.piece * (KB / 64) + 2 * (j * SUB + own) + (PACKED ? 0 : i & 1);
            const u32 at = (u32)((i < EACH / 2 ? row : low) * nb + block) >> (PACKED ? 0 : shift);
            const bool inside = sums_own && block < nb; float& scale = p.scale[EACH * j + i];
            if (PACKED) scale = __uint_as_float(inside ? ((const u16*)absmax)[at >> 1] : 0u);
            else if (NESTED) scale = __uint_as_float(inside ? ((const u8*)absmax)[at] : 0u);
            else scale = inside ? ((const float*)absmax)[at] : 0.f;
            if (NESTED) p.outer[EACH * j + i] = inside ? nested[at >> nested_shift] : 0.f;
          }
      }
      ahead.next();
    }
  };

  let_next_kernel_start();
  out.send_for_rows(r0, r1);
  Piece ring[DEPTH];
  auto fill = [&]() {
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) fetch(ring[i]);
  };
  if (EARLY) {                                                           // may not read weights yet, but may send for them
    Walk<WARPS> walk = here;
    for (int i = 0; i < EARLY && walk.tile < tiles; i++, walk.next()) {
      const int row = r0 + walk.tile * 16 + (lane & 15), at = walk.piece * CB + (lane >> 4) * 128;
      if ((lane >> 4) * 128 < CB && row < r1 && at < row_bytes) send_for(w + (i64)row * row_bytes + at);
    }
  } else fill();
  if (threadIdx.x < 32) top[threadIdx.x] = 0;                            // and the zeros
  if (FMT == 2) build_plain_table(table, THREADS);
  wait_before_reading_x();
  Values<THREADS> values; values.fetch(map);
  const float plus = NESTED ? *offset : 0.f;
  // 4-bit: the units of 16 bytes of x change places so that four lanes, the same unit of each, spread over the banks.
  hold_x<MP, WARPS, TO_FP16>(x, top, m, k, 0, pieces * KB / 8, [&](int r, int v) { return xs + r * pitch + (FMT == 2 ? v ^ (v >> 2 & 3) : v) * 16; },
                             [&]() { if (EARLY) fill(); });
  if (NESTED) { values.put(map_); __syncthreads(); }

  const u32 lane4 = lane * 4;
  const Int8Pairs pairs(m);
  const bool takes = FMT != 2 || ((g >> 1) < SUB * MP && (g & 1) == t >> 1);
  const int x_step = takes ? KB * 2 : 0, x_turn = takes ? SUB * GROUP * 2 : 0;
  const u8* x_lane = !takes ? zeros : FMT == 2 ? xs + (g >> 1) % MP * pitch + (g >> 1) / MP * GROUP * 2 + t * (GROUP / 2) : xs + g % MP * pitch + t * (GROUP / 2);
  const int x_swap = FMT == 2 ? (takes ? t : 1) * 16 : 0;
  float acc[4] = {0.f, 0.f, 0.f, 0.f};                                   // 4-bit: rows g and g + 8, of one row of x
  int q0 = 0, q1 = min(TG, tiles), done = 0;
  auto flush = [&](int upto) {                                           // of this warp, up to that tile
    for (; done < upto; done++) {
      const int first = ((done - q0) * WARPS + warp) * 16 * MP;
      if (FMT == 2) {
#pragma unroll
        for (int o = MP; o < SUB * MP; o *= 2) { acc[0] += of_other_lane(acc[0], o); acc[1] += of_other_lane(acc[1], o); }
        if (t < MP) { *sum_at(first + g * MP + t) = acc[0]; *sum_at(first + (g + 8) * MP + t) = acc[1]; }
      } else if (MP == 1) {
        if (t == 0) { *sum_at(first + g) = acc[0]; *sum_at(first + g + 8) = acc[2]; }
      } else if (2 * t < MP) {
        *(float2*)sum_at(first + g * MP + 2 * t) = make_float2(acc[0], acc[1]);
        *(float2*)sum_at(first + (g + 8) * MP + 2 * t) = make_float2(acc[2], acc[3]);
      }
      acc[0] = acc[1] = acc[2] = acc[3] = 0.f;
    }
  };
  auto meet = [&]() {                                                    // of all warps, tiles q0 to q1
    flush(q1);
    __syncthreads();
    for (int i = threadIdx.x; i < (q1 - q0) * 16 * MP; i += THREADS) {
      const int row = r0 + q0 * 16 + i / MP, r = i % MP, first = i / (16 * MP) * WARPS * 16 * MP + i % (16 * MP);
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < WARPS; j++) sum += *sum_at(first + j * 16 * MP);
      if (TO_FP16) sum *= x_unscale(top[r]);
      if (r < m && row < r1) out.put(r, row, sum);
    }
    q0 = q1; q1 = min(q0 + TG, tiles);
    if (q0 < tiles) __syncthreads();
  };
  auto multiply = [&](const Piece& p) {
    const u8* xp = x_lane + here.piece * x_step;
#pragma unroll
    for (int j = 0; j < TURNS; j++, xp += x_turn) {
      u32 xa[4 * XS];
#pragma unroll
      for (int i = 0; i < XS; i++) {
        const uint4 q = *(const uint4*)(xp + ((i * 16) ^ x_swap));
        xa[4 * i] = q.x; xa[4 * i + 1] = q.y; xa[4 * i + 2] = q.z; xa[4 * i + 3] = q.w;
      }
#pragma unroll
      for (int s = 0; s < SUB; s++) {
        const uint4 &e = p.up[j * SUB + s], &d = p.low[j * SUB + s];
        const u32 up[4] = {e.x, e.y, e.z, e.w}, low[4] = {d.x, d.y, d.z, d.w};
        if (FMT == 2) {
          float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
          for (int h = 0; h < 4; h++) {
            mma<0>(c, look_up<0>(table, up[h], lane4), look_up<0>(table, low[h], lane4), look_up<1>(table, up[h], lane4), look_up<1>(table, low[h], lane4), xa[4 * h], xa[4 * h + 1]);
            mma<0>(c, look_up<2>(table, up[h], lane4), look_up<2>(table, low[h], lane4), look_up<3>(table, up[h], lane4), look_up<3>(table, low[h], lane4), xa[4 * h + 2], xa[4 * h + 3]);
          }
          if (SUB == 1 || own == s) {
            float scale[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const int from = EACH * j + (PACKED ? i >> 1 : i); const u32 code = __float_as_uint(p.scale[from]) >> (PACKED ? 8 * (i & 1) : 0) & 255;
              scale[i] = NESTED ? fmaf(map_[code], p.outer[from], plus) : p.scale[from];
            }
            acc[0] = fmaf(c[0], scale[0], fmaf(c[1], scale[1], acc[0])); acc[1] = fmaf(c[2], scale[2], fmaf(c[3], scale[3], acc[1]));
          }
        } else {
#pragma unroll
          for (int h = 0; h < (FMT == 0 ? 2 : 4); h++) {
            if (FMT == 0) mma<MMA_BF16>(acc, up[2 * h], low[2 * h], up[2 * h + 1], low[2 * h + 1], xa[2 * h], xa[2 * h + 1]);
            else mma<MMA_BF16>(acc, pairs.of<0>(up[h]), pairs.of<0>(low[h]), pairs.of<1>(up[h]), pairs.of<1>(low[h]), xa[2 * h], xa[2 * h + 1]);
          }
        }
      }
    }
  };
  // Every warp comes to every meeting, whether or not it has a piece left.
  bool more = true;
  while (more) {
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {                                    // the registers of a piece have to have numbers
      fetch(ring[(i + DEPTH - 1) % DEPTH]);
      while (more && here.tile >= q1) { meet(); more = q0 < tiles; }
      if (!more) break;
      flush(here.tile);
      multiply(ring[i]);
      here.next();
    }
  }
}
