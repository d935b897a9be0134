// One row of x, 4-bit weights: y = x W^T. x is held whole in shared memory.
//
// As few_rows_narrow.cu, but a tile has R = 16 / SECT rows of W, and the 16 rows of the operand are SECT sections of 256 columns of each: a piece is
// R rows of SECT * 128 bytes in a row. One row of x leaves seven of the eight columns of mma free: column j has the section j % SECT of x,
// and of the sums that of each row's own section counts. Every piece has a place of its own for its R sums, which meet once, at the end, in
// the order of the pieces.
// Filled in: WARPS, DEPTH, SECT, BLOCKS, EARLY (as in few_rows_narrow.cu), LATE, XREG, S16, PF, MORE, STAMP.
constexpr int THREADS = WARPS * 32, CB = 128, R = 16 / SECT, KB = 256 * SECT, PIECE = 2048, SLOT = PIECE + (PACKED ? 128 : 256);
constexpr int IN_TABLE = TABLE_SHIFT == 8, TO_FP16 = BF16;

#ifdef EMULATED
inline uint4 read_x(const u16* p) { return *(const uint4*)p; }
#else
// Not through the read-only path, whose loads the compiler moves in front of the wait.
DEVICE uint4 read_x(const u16* p) { uint4 v; asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory"); return v; }
#endif

ENTRY __global__ void __launch_bounds__(THREADS, BLOCKS)
few_rows(const u8* __restrict__ w, const u16* __restrict__ x, u16* __restrict__ y, const u16* __restrict__ bias,
         const void* __restrict__ absmax, const float* __restrict__ nested, const float* __restrict__ map,
         const float* __restrict__ offset, int m, int n, int k, int shift, int nested_shift) {
  SHARED(smem);
#if STAMP
  i64 c0 = clock64(), n0; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(n0));
#endif
  const int lane = threadIdx.x & 31, warp = of_warp(threadIdx.x >> 5), g = lane >> 2, t = lane & 3;
  const int r0 = (int)((i64)n * blockIdx.x / gridDim.x), r1 = (int)((i64)n * (blockIdx.x + 1) / gridDim.x);
  const int tiles = (r1 - r0 + R - 1) / R, pieces = (k + KB - 1) / KB, row_bytes = k / 2, nb = k / 64;
  u8* table = smem;
  float* map_ = (float*)(smem + TABLE);
  u8* xs = smem + TABLE + (NESTED ? 1024 : 0);
  const int x_bytes = XREG == 2 ? 0 : pieces * KB * 2;
  u8* ring = xs + x_bytes + warp * DEPTH * SLOT;
  float* red = (float*)(xs + x_bytes + WARPS * DEPTH * SLOT);    // [tiles, pieces, R]
  auto sum_at = [&](int i) { return IN_TABLE ? (float*)(table + (i >> 5) * 256 + 128) + (i & 31) : red + i; };
  SHARED_ARRAY(u32, top, 16);
  const Scales scales = {absmax, nested, map, offset, shift, nested_shift};
  const Output out = {y, bias, (const float*)absmax, n};
  const u64 policy = evict_first();

  // Copy j of a piece: unit j * 32 + lane, row by row. Operand row q * R + r is section q of row r.
  constexpr int PER = 8 * SECT, ROWS_AT_ONCE = SECT <= 4 ? 32 / PER : 1;
  const int in_row = lane % PER, row_of = lane / PER;                     // SECT 8: of even copies
  const int first_row = in_row / 8 * R + row_of, place = first_row * CB + (in_row % 8 ^ (first_row & 3) << 1) * 16;
  const Shared base = shared(ring + place), scales_base = shared(ring + PIECE + (S16 ? (lane % SECT * R + lane / SECT % R) * 16 : 0));
  const u8* w0 = w + (i64)r0 * row_bytes + (i64)row_of * row_bytes + in_row * 16;
  const int rows_left = r1 - r0 - row_of, columns_left = row_bytes - in_row * 16;
  const int step = WARPS / pieces;                                        // XREG: tiles
  Shared slot = base, slot_end = base + (DEPTH - 1) * SLOT;
  Walk<WARPS> ahead = {warp / pieces, warp % pieces, pieces};
  auto fetch = [&]() {
    if (ahead.tile < tiles && (DIAG != 2 || nb < 0)) {
      const int rows = rows_left - ahead.tile * R, columns = columns_left - ahead.piece * (CB * SECT);
      const u8* from = w0 + (u32)(ahead.tile * R * row_bytes + ahead.piece * (CB * SECT));
#pragma unroll
      for (int j = 0; j < 4; j++) {
        // what copy j is past copy 0, in rows and sections
        const int down = SECT == 8 ? j / 2 : j * ROWS_AT_ONCE, across = SECT == 8 ? (j & 1) * 4 : 0, m_ = down + across * R;
        const Shared to = (Shared)((u64)slot ^ (u64)((SECT == 8 ? down : down & 3) << 5)) + m_ * CB;
        const int take = rows > down && columns > across * 128 ? 16 : 0;
        copy16(to, take ? from + (i64)down * row_bytes + across * 128 : w, take, policy);
      }
      const Shared behind = scales_base + (int)(slot - base);
      const int row0 = r0 + ahead.tile * R;
      if (PACKED) {
        const int m_ = lane & 15, row = row0 + m_ % R, b = (ahead.piece * SECT + m_ / R) * 4; const bool in = row < r1 && b < nb;
        const u32 block = in ? row * nb + b : 0;
        copy4(behind + lane * 4, lane < 16 ? scales.word_of(block) : scales.outer_of(block), in ? 4 : 0);
      } else if (S16) {                                                  // four scales of a row and section, of aligned blocks of 64
        const int row = row0 + lane / SECT % R, b = (ahead.piece * SECT + lane % SECT) * 4; const bool in = row < r1 && b < nb;
        if (lane < 16) copy16(behind, (const float*)absmax + (in ? row * nb + b : 0), in ? 16 : 0);
      } else {
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const int e = lane + 32 * j, r = e / (4 * SECT), s = e % (4 * SECT), row = row0 + r, b = ahead.piece * 4 * SECT + s; const bool in = row < r1 && b < nb;
          copy4(behind + ((s / 4 * R + r) * 4 + s % 4) * 4, (const float*)absmax + (in ? (u32)(row * nb + b) >> shift : 0u), in ? 4 : 0);
        }
      }
      if (XREG) ahead.tile += step; else ahead.next();
    }
    slot = slot == slot_end ? base : slot + SLOT;
    commit();
  };
  auto send = [&](Walk<WARPS>& walk, int count) {
    for (int i = 0; i < count && walk.tile < tiles; i++, walk.next()) {
      const int row0 = r0 + walk.tile * R, at = walk.piece * (CB * SECT);
#if PF == 0
      if (lane < 16 && row0 + lane / SECT < r1 && at + lane % SECT * 128 < row_bytes) send_for(w + (i64)(row0 + lane / SECT) * row_bytes + at + lane % SECT * 128);
#elif PF == 1
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int e = lane + 32 * j, row = row0 + e / (4 * SECT), a = at + e % (4 * SECT) * 32;
        if (row < r1 && a < row_bytes) send_for(w + (i64)row * row_bytes + a);
      }
#elif PF == 2
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int e = lane + 32 * j, row = row0 + e / PER, a = at + e % PER * 16;
        u32 d0, d1, d2, d3;
        if (row < r1 && a < row_bytes) asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(d0), "=r"(d1), "=r"(d2), "=r"(d3) : "l"(w + (i64)row * row_bytes + a));
      }
#endif
    }
  };
  auto fill = [&]() {
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) fetch();
    if (MORE) { Walk<WARPS> walk = ahead; send(walk, MORE); }
  };
  const int total = tiles * pieces;
  int left = total > warp ? (total - warp + WARPS - 1) / WARPS : 0;

  if (!LATE) let_next_kernel_start();
  out.send_for_rows(r0, r1);
  if (EARLY) { Walk<WARPS> walk = ahead; send(walk, EARLY); } else fill();
  if (threadIdx.x < 16) top[threadIdx.x] = 0;
  build_table(table, THREADS);
  if (XREG == 2) __syncthreads();
#if STAMP
  i64 c1 = clock64();
#endif
  wait_before_reading_x();
#if STAMP
  i64 c2 = clock64(), n2; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(n2));
#endif
  Values<THREADS> values; values.fetch(map);
  const float plus = NESTED ? *offset : 0.f;
#if XREG != 2
  // x: bf16 becomes fp16 (see few_rows_common.cu). Lanes of two sections read at once: the halves of a lane's 32 bytes change places
  // in every other section.
  auto place_x = [&](int v) { return (uint4*)(xs + (SECT > 1 ? v ^ (v >> 5 & 1) : v) * 16); };
  const int vectors = pieces * KB / 8;
  constexpr int BATCH = XB;
  uint4 q[BATCH];
  u32 most = 0;
  for (int v0 = threadIdx.x; ; v0 += BATCH * THREADS) {
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      const int v = v0 + j * THREADS;
      q[j] = make_uint4(0, 0, 0, 0);
      if (v * 8 < k) q[j] = read_x(x + v * 8);
    }
    if (EARLY && v0 == threadIdx.x) fill();
    if (TO_FP16) {
#pragma unroll
      for (int j = 0; j < BATCH; j++) most = max(most, largest(q[j]));
    }
    if (v0 - (int)threadIdx.x + BATCH * THREADS >= vectors) break;
#pragma unroll
    for (int j = 0; j < BATCH; j++) *place_x(v0 + j * THREADS) = q[j];
  }
  if (TO_FP16) {
    most = warp_max(most);
    if (lane == 0) atomicMax(&top[0], most);
    __syncthreads();
  }
  const float scale = TO_FP16 ? x_scale(top[0]) : 1.f;
  const int last = (vectors - 1) / (BATCH * THREADS) * (BATCH * THREADS);   // of the batches: the one that is in registers still
#pragma unroll
  for (int j = 0; j < BATCH; j++) {
    const int v = last + threadIdx.x + j * THREADS;
    if (v < vectors) *place_x(v) = TO_FP16 ? to_fp16(q[j], scale) : q[j];
  }
  if (TO_FP16) for (int v = threadIdx.x; v < last; v += THREADS) *place_x(v) = to_fp16(*place_x(v), scale);
  if (NESTED) values.put(map_);
  __syncthreads();
#else
  // A warp's pieces have the same columns: its lanes hold them as operands, scaled by the largest of these columns.
  int piece = warp % pieces;
  uint4 held[8];
  {
    const int column = piece * KB + g % SECT * 256 + t * 16;
#pragma unroll
    for (int i = 0; i < 8; i++) { held[i] = make_uint4(0, 0, 0, 0); if (column + i / 2 * 64 < k) held[i] = read_x(x + column + i / 2 * 64 + i % 2 * 8); }
  }
  if (EARLY) fill();
  u32 most = 0;
  if (TO_FP16) {
#pragma unroll
    for (int i = 0; i < 8; i++) most = max(most, largest(held[i]));
    most = warp_max(most);
    const float scale = x_scale(most);
#pragma unroll
    for (int i = 0; i < 8; i++) held[i] = to_fp16(held[i], scale);
  }
  const float unscale = TO_FP16 ? x_unscale(most) : 1.f;
  if (NESTED) { values.put(map_); __syncthreads(); }
#endif
#if STAMP
  i64 c3 = clock64();
#endif

  const u32 lane4 = (u32)(shared(smem + lane * 4) - shared(smem));        // lane * 4, of which the compiler cannot know: one instruction less a look-up
#if XREG != 2
  const int own = g % SECT, swap = SECT > 1 ? own & 1 : 0;
  const u8 *x_lo = xs + own * 512 + t * 32 + swap * 16, *x_hi = xs + own * 512 + t * 32 + (1 - swap) * 16;
  int piece = warp % pieces;
  uint4 held[XREG ? 8 : 1];
  if (XREG) {
#pragma unroll
    for (int b = 0; b < 4; b++) { held[2 * b] = *(const uint4*)(x_lo + (piece * KB + b * 64) * 2); held[2 * b + 1] = *(const uint4*)(x_hi + (piece * KB + b * 64) * 2); }
  }
#else
  const u8 *x_lo = xs, *x_hi = xs;
#endif
  int number = 0, at_piece = warp;
  if (LATE && left <= LATE) let_next_kernel_start();
  for (; left > 0; left--) {
    if (LATE && left == LATE) let_next_kernel_start();
    fetch();
    copies_left<DEPTH - 1>();
    __syncwarp();
    const u8* at = ring + number * SLOT;
    if (++number == DEPTH) number = 0;
    float s0[4], s1[4];
    if (PACKED) {
      const float* of = (const float*)(at + PIECE); const u32 word0 = __float_as_uint(of[g]), word1 = __float_as_uint(of[g + 8]);
#pragma unroll
      for (int b = 0; b < 4; b++) { s0[b] = scales.decode_of_word(word0, of[g + 16], plus, b, map_); s1[b] = scales.decode_of_word(word1, of[g + 24], plus, b, map_); }
    } else {
      const float4 p = ((const float4*)(at + PIECE))[g], q = ((const float4*)(at + PIECE))[g + 8];
      s0[0] = p.x; s0[1] = p.y; s0[2] = p.z; s0[3] = p.w; s1[0] = q.x; s1[1] = q.y; s1[2] = q.z; s1[3] = q.w;
    }
    float acc[4] = {0.f, 0.f, 0.f, 0.f};
#if DIAG == 1
    acc[0] = s0[0] + s1[3] + *(const float*)(at + lane * 64);
#endif
#pragma unroll
    for (int b = 0; b < (DIAG == 1 ? 0 : 4); b++) {
      const uint4 lo = XREG ? held[XREG ? 2 * b : 0] : *(const uint4*)(x_lo + (piece * KB + b * 64) * 2);
      const uint4 hi = XREG ? held[XREG ? 2 * b + 1 : 0] : *(const uint4*)(x_hi + (piece * KB + b * 64) * 2);
      const u32 xa[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
      const u8* p = at + ((b * 2 + (t >> 1)) ^ (g & 3) << 1) * 16 + (t & 1) * 8;
      const uint2 u = *(const uint2*)(p + g * CB), v = *(const uint2*)(p + (g + 8) * CB);
      float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 a = h ? u.y : u.x, d = h ? v.y : v.x;
        mma<0>(c, look_up<0>(table, a, lane4), look_up<0>(table, d, lane4), look_up<1>(table, a, lane4), look_up<1>(table, d, lane4), xa[4 * h], xa[4 * h + 1]);
        mma<0>(c, look_up<2>(table, a, lane4), look_up<2>(table, d, lane4), look_up<3>(table, a, lane4), look_up<3>(table, d, lane4), xa[4 * h + 2], xa[4 * h + 3]);
      }
      acc[0] = fmaf(c[0], s0[b], acc[0]); acc[1] = fmaf(c[1], s0[b], acc[1]);
      acc[2] = fmaf(c[2], s1[b], acc[2]); acc[3] = fmaf(c[3], s1[b], acc[3]);
    }
#if XREG == 2
#pragma unroll
    for (int i = 0; i < 4; i++) acc[i] *= unscale;
#endif
    // Operand row m holds section m / R of row m % R; its sum is in column m / R.
    if (SECT == 1) { if (t == 0) { *sum_at(at_piece * R + g) = acc[0]; *sum_at(at_piece * R + g + 8) = acc[2]; } }
    else if (SECT == 2) { if (t == 0) *sum_at(at_piece * R + g) = acc[0] + acc[3]; }
    else if (SECT == 4) {
      float v = t & 1 ? (g < 4 ? acc[2] : acc[3]) : (g < 4 ? acc[0] : acc[1]);
      v += of_other_lane(v, 1); v += of_other_lane(v, 16);
      if (lane < 16 && t == 0) *sum_at(at_piece * R + g) = v;
    } else {
      const int odd = g >> 1 & 1;
      float v = t == g >> 2 ? (odd ? acc[1] : acc[0]) : t == 2 + (g >> 2) ? (odd ? acc[3] : acc[2]) : 0.f;
      v += of_other_lane(v, 1); v += of_other_lane(v, 2); v += of_other_lane(v, 8); v += of_other_lane(v, 16);
      if (lane < 8 && t == 0) *sum_at(at_piece * R + g) = v;
    }
    __syncwarp();
    at_piece += WARPS;
    if (!XREG) { piece += WARPS; while (piece >= pieces) piece -= pieces; }
  }
#if STAMP
  i64 c4 = clock64();
#endif
  __syncthreads();
  for (int i = threadIdx.x; i < r1 - r0; i += THREADS) {
    const int first = i / R * pieces * R + i % R;
    float sum = 0.f;
    for (int j = 0; j < pieces; j++) sum += *sum_at(first + j * R);
    if (TO_FP16 && XREG != 2) sum *= x_unscale(top[0]);
    out.put(0, r0 + i, sum);
  }
  copies_left<0>();
#if STAMP
  if (threadIdx.x == 0) {
    i64 n5; u32 sm; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(n5)); asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    i64* s = (i64*)map + blockIdx.x * 10;
    s[0] = n0; s[1] = n2; s[2] = n5; s[3] = sm; s[4] = c1 - c0; s[5] = c2 - c1; s[6] = c3 - c2; s[7] = c4 - c3; s[8] = clock64() - c4;
  }
#endif
}
