// Up to eight rows of x: y = x W^T for int8 and 16-bit weights, from memory straight to the registers.
//
// A block takes a range of whole rows of W, in tiles of 16. The pieces of its tiles (16 rows, CB = 64 ITERS bytes of each) go round
// the warps; a warp sends for its next DEPTH - 1 pieces before it multiplies one. Sums of the warps meet in shared memory after every TG
// tiles, in fixed order. Nothing of W is held in shared memory, so a second block may be there and get ready meanwhile (BLOCKS 2).
// Filled in: MP, WARPS, ITERS, DEPTH, TG, BLOCKS (that share a multiprocessor), EARLY (as in few_rows_narrow.cu).
constexpr int THREADS = WARPS * 32, CB = 64 * ITERS;
constexpr int GROUP = FMT == 0 ? 32 : 64, KB = ITERS * GROUP;          // columns that the four lanes of a row take together
constexpr int XS = GROUP / 32;                                         // units of 16 bytes of x that a lane takes for a group
static_assert(FMT != 2, "4-bit weights have other kernels");

struct Piece { uint4 up[ITERS], low[ITERS]; };                           // rows g and g + 8

ENTRY __global__ void __launch_bounds__(THREADS, BLOCKS)
few_rows(const u8* __restrict__ w, const u16* __restrict__ x, u16* __restrict__ y, const u16* __restrict__ bias,
         const void* __restrict__ absmax, const float* __restrict__ nested, const float* __restrict__ map,
         const float* __restrict__ offset, int m, int n, int k, int shift, int nested_shift) {
  SHARED(smem);
  const int lane = threadIdx.x & 31, warp = of_warp(threadIdx.x >> 5), g = lane >> 2, t = lane & 3;
  const int r0 = (int)((i64)n * blockIdx.x / gridDim.x), r1 = (int)((i64)n * (blockIdx.x + 1) / gridDim.x);
  const int tiles = (r1 - r0 + 15) / 16, pieces = (k + KB - 1) / KB;
  const int pitch = (pieces * KB * 2 + 127) / 128 * 128 + (FMT == 0 ? 64 : 16), row_bytes = FMT == 0 ? 2 * k : k;
  u8* xs = smem;
  float* red = (float*)(xs + MP * pitch);
  const Output out = {y, bias, (const float*)absmax, n};
  const u64 policy = evict_first();

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
  wait_before_reading_x();
  hold_x<MP, WARPS, 0>(x, nullptr, m, k, 0, pieces * KB / 8, [&](int r, int v) { return xs + r * pitch + v * 16; }, [&]() { if (EARLY) fill(); });

  const Int8Pairs pairs(m);
  const u8* x_lane = xs + g % MP * pitch + t * (GROUP / 2);
  float acc[4] = {0.f, 0.f, 0.f, 0.f};                                   // rows g and g + 8
  int q0 = 0, q1 = min(TG, tiles), done = 0;
  auto flush = [&](int upto) {                                           // of this warp, up to that tile
    for (; done < upto; done++) {
      const int first = ((done - q0) * WARPS + warp) * 16 * MP;
      if (MP == 1) {
        if (t == 0) { red[first + g] = acc[0]; red[first + g + 8] = acc[2]; }
      } else if (2 * t < MP) {
        *(float2*)(red + first + g * MP + 2 * t) = make_float2(acc[0], acc[1]);
        *(float2*)(red + first + (g + 8) * MP + 2 * t) = make_float2(acc[2], acc[3]);
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
      for (int j = 0; j < WARPS; j++) sum += red[first + j * 16 * MP];
      if (r < m && row < r1) out.put(r, row, sum);
    }
    q0 = q1; q1 = min(q0 + TG, tiles);
    if (q0 < tiles) __syncthreads();
  };
  auto multiply = [&](const Piece& p) {
    const u8* xp = x_lane + here.piece * KB * 2;
#pragma unroll
    for (int j = 0; j < ITERS; j++, xp += GROUP * 2) {
      u32 xa[4 * XS];
#pragma unroll
      for (int i = 0; i < XS; i++) {
        const uint4 q = *(const uint4*)(xp + i * 16);
        xa[4 * i] = q.x; xa[4 * i + 1] = q.y; xa[4 * i + 2] = q.z; xa[4 * i + 3] = q.w;
      }
      const uint4 &e = p.up[j], &d = p.low[j];
      const u32 up[4] = {e.x, e.y, e.z, e.w}, low[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
      for (int h = 0; h < (FMT == 0 ? 2 : 4); h++) {
        if (FMT == 0) mma<BF16>(acc, up[2 * h], low[2 * h], up[2 * h + 1], low[2 * h + 1], xa[2 * h], xa[2 * h + 1]);
        else mma<BF16>(acc, pairs.of<0>(up[h]), pairs.of<0>(low[h]), pairs.of<1>(up[h]), pairs.of<1>(low[h]), xa[2 * h], xa[2 * h + 1]);
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
