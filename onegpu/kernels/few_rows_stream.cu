// Hopper, 9 to 64 rows: y = x W^T with x and W streamed together by a warp of their own, which no other warp waits for.
//
// A cluster takes a range of whole rows of W; its CL blocks split the columns. A stage of the ring holds KC columns of a tile of W and of
// x, as the bulk engine brings them (boxes of 64 columns of x and of 128 bytes of `box` rows of W). The last warp fills stages that are
// empty. WN x WK warps multiply: WN along the rows of a tile (16 each, four to a wgmma), WK along the columns of a stage. They wait for
// what comes, not for one another: while some look up weights, the products of others run. Weights are expanded to the type
// of x, as the definition does (one rounding of value times scale), and are the register operand.
// Scales of 4 bits, and then the barriers, lie where the look-up table leaves 128 of every 256 bytes free.
// Filled in: NT, WN, WK, KC, STAGES, HALF_BLOCK (a scale for 32 columns), HELD (rows of W that a stage has room for, where those of a
// tile are more; 0: all), EARLY (stages that are sent for into L2 before the kernel in front has ended; STAY: weights may be read then,
// and fill the ring), BLOCKS (that share a
// multiprocessor, so that the next kernel gets ready while this one runs).
#ifndef STAY
#define STAY 0
#endif
constexpr int WORKERS = WN * WK * 32, THREADS = WORKERS + 32, BN = WN * 16, ROWS = 8 * NT, TILE = HELD ? HELD : BN;
constexpr int CB = FMT == 1 ? KC : KC / 2, GROUPS = KC / 64 / WK, BOX = CB < 128 ? CB : 128, BOXES = CB / BOX;   // BOX: bytes of a row in a box of W
constexpr int SPAN = HALF_BLOCK ? 32 : 64, SCALES = FMT == 2 ? KC / SPAN : 0, PER_ROW = PACKED ? 8 : SCALES * 4 * (1 + NESTED);   // bytes
constexpr int W_BYTES = TILE * CB, X_BYTES = ROWS * KC * 2, STAGE = (W_BYTES + X_BYTES + 1023) / 1024 * 1024;
constexpr int E_PITCH = TILE + 4, DIRECT = WK == 1 && CL == 1;          // DIRECT: no sums meet, tiles may be several
constexpr int SHARE = PACKED && SCALES == 4 && GROUPS == 2 && TILE % 16 == 0;   // the four lanes of a row decode one scale each, for all four
constexpr int ONE = NT == 8 && BLOCKS * WN * WK >= 16 || BLOCKS * WN * WK >= 24;                          // set of operands for products: two would spill
static_assert(WN % 4 == 0 && GROUPS * WK * 64 == KC && (CB == 64 || CB == 128 || CB == 256), "a warpgroup multiplies 64 rows, a warp whole groups of columns");
static_assert(TILE * BOX % 1024 == 0 && (BN - TILE) * BOX <= X_BYTES, "boxes begin where their swizzle does; warps without rows read what follows");
static_assert(FMT != 2 || TABLE_SHIFT == 8 && STAGES <= 7 && STAGES * TILE * PER_ROW + 128 <= 32768, "the table has room for scales and barriers");
static_assert((WK * E_PITCH + (CL > 1) * TILE) * ROWS * 4 <= STAGES * STAGE, "the sums have room in the ring");
static_assert(CL == 1 || TILE % (4 * CL) == 0, "each block of a cluster ends a part of the rows");

// The pair of weights in the lane's byte of w (`pick` chooses it and the lane's column of the table), and scaled, in the type of x.
DEVICE u32 own_weights(const u8* table, u32 w, u32 lane4, u32 pick) { return *(const u32*)(table + __byte_perm(w, lane4, pick)); }
DEVICE u32 scaled(u32 v, float scale) { return pack(h2f(v & 0xffffu) * scale, h2f(v >> 16) * scale); }
// Where a unit of 16 bytes of a row is, from the row's begin in the first box on.
DEVICE int place_of(int row, int unit) {
  return BOX == 64 ? (unit ^ row >> 1 & 3) * 16 : (unit >> 3) * TILE * 128 + ((unit ^ row) & 7) * 16;
}

ENTRY __global__ void __launch_bounds__(THREADS, BLOCKS)
few_rows(const u8* __restrict__ w, const u16* __restrict__ x, u16* __restrict__ y, const u16* __restrict__ bias,
         const void* __restrict__ absmax, const float* __restrict__ nested, const float* __restrict__ map,
         const float* __restrict__ offset, int m, int n, int k, int shift, int nested_shift, const __grid_constant__ XMap x_map,
         const __grid_constant__ XMap w_map, int box) {
  SHARED(smem);
  const int lane = threadIdx.x & 31, warp = of_warp(threadIdx.x >> 5), g = lane >> 2, t = lane & 3, rank = cluster_rank();
  const int wn = WK > 1 ? warp % WN : warp, wk = WK > 1 ? warp / WN : 0, cluster = blockIdx.x / CL, clusters = gridDim.x / CL;
  const int four = n >= 4 * clusters ? 4 : 1;                            // rows of a block begin where four are stored at once
  auto begin_of = [&](int c) { return min((int)((u32)(four == 4 ? (n + 3) / 4 : n) * c / clusters) * four, n); };
  const int r0 = begin_of(cluster), r1 = begin_of(cluster + 1);
  const int tiles = (r1 - r0 + box - 1) / box, all = (k + KC - 1) / KC, share = (all + CL - 1) / CL;
  const int p0 = rank * share, pieces = max(min(share, all - p0), 0), items = tiles * pieces;
  const int nb = k / SPAN;
  u8* table = smem;
  float* map_ = (float*)(smem + TABLE);
  u8* ring = smem + TABLE + (NESTED ? 1024 : 0);
  u8 *full = FMT == 2 ? table + TABLE - 128 : ring + STAGES * STAGE, *empty = full + 8 * STAGES, *pushes = empty + 8 * STAGES;   // barriers
  const Scales scales = {absmax, nested, map, offset, shift, nested_shift};
  const Output out = {y, bias, (const float*)absmax, n};
  auto scales_at = [&](int stage, int row) { const int at = (stage * TILE + row) * PER_ROW; return table + (at >> 7) * 256 + 128 + (at & 127); };
  struct Cursor {
    int row0, piece, stage, turn;                                        // `turn`: the parity of the ring's
    DEVICE void next(int pieces, int box) { if (++stage == STAGES) { stage = 0; turn ^= 1; } if (++piece == pieces) { piece = 0; row0 += box; } }
  };
  Cursor c = {r0, 0, 0, 0};
  const bool whole = !NESTED && shift == 0 && nb % (SCALES + !SCALES) == 0;         // the scales of a row in a stage lie side by side, aligned
  const u64 policy = evict_first();

  auto fetch_w = [&](const Cursor& at) {                                 // by the last warp
    const int piece = p0 + at.piece;
    u8 *to = ring + at.stage * STAGE, *bar = full + 8 * at.stage;
    if (lane == 0) {
      arrive_and_expect(bar, X_BYTES + box * CB);
#pragma unroll
      for (int b = 0; b < BOXES; b++) copy_w(to + b * TILE * BOX, &w_map, piece * CB + b * BOX, at.row0, bar, policy);
    }
    if (FMT == 2) {
      const u32 b0 = piece * SCALES; const int rows = min(box, r1 - at.row0);   // others have zeros of x, or are not stored
      auto to_of = [&](int e) { return shared_of_lane(scales_at(at.stage, e)); };
      if (SCALES >= 4 && whole)
        for (int e = lane; e < rows; e += 32)
#pragma unroll
          for (int i = 0; i < SCALES; i += 4) copy16(to_of(e) + 4 * i, (const float*)absmax + (at.row0 + e) * nb + b0 + i, 16);
      else
        for (int e = lane; e < rows; e += 32) {
          const u32 block = (at.row0 + e) * nb + b0; const Shared to = to_of(e);
          if (PACKED) { copy4(to, scales.word_of(block), 4); copy4(to + 4, scales.outer_of(block), 4); }
#pragma unroll
          for (int i = 0; i < (PACKED ? 0 : SCALES); i++) scales.fetch_both(to + 4 * i, SCALES * 4, block + i, b0 + i < nb);
        }
      arrive_after_copies(bar);
    }
  };
  auto fetch_x = [&](const Cursor& at) {
    if (lane != 0) return;
#pragma unroll
    for (int b = 0; b < KC / 64; b++) copy_x(ring + at.stage * STAGE + W_BYTES + b * ROWS * 128, &x_map, (p0 + at.piece) * KC + b * 64, full + 8 * at.stage);
  };

  let_next_kernel_start();
  out.send_for_rows(r0, r1);
  float plus = 0.f;
  if (warp == WN * WK) {
    if (lane == 0) {
      send_for_map(&x_map); send_for_map(&w_map);
      for (int i = 0; i < STAGES; i++) { barrier_init(full + 8 * i, FMT == 2 ? 33 : 1); barrier_init(empty + 8 * i, WN * WK); }
      if (CL > 1) barrier_init(pushes, 1);
      barriers_ready();
      if (CL > 1) arrive_and_expect(pushes, m * (TILE / CL) * (CL - 1) * 4);
      Cursor f = c;
      for (int i = 0; i < (STAY ? 0 : EARLY) && i < items; i++, f.next(pieces, box))
#pragma unroll
        for (int b = 0; b < BOXES; b++) send_for_w(&w_map, (p0 + f.piece) * CB + b * BOX, f.row0);
    }
    __syncwarp();
    if (STAY) {
      Cursor f = c;
      for (int i = 0; i < STAGES && i < items; i++, f.next(pieces, box)) fetch_w(f);
    }
    wait_before_reading_x();
    for (int i = 0; i < STAGES && i < items; i++, c.next(pieces, box)) { if (!STAY) fetch_w(c); fetch_x(c); }
  } else {
    if (FMT == 2) build_plain_table(table, WORKERS);
    wait_before_reading_x();
    Values<WORKERS> values; values.fetch(map);
    plus = NESTED ? *offset : 0.f;
    values.put(map_);
  }
  __syncthreads();

  const Int8Pairs pairs(m);
  float acc[NT][4];
#pragma unroll
  for (int i = 0; i < NT; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.f;
  // Where SHARE, lane t decodes that of row g + 8 (t & 1) in group t >> 1: where the word is in the first stage, and which byte of it.
  const int word0 = SHARE ? kept(scales_at(0, wn * 16 + g + 8 * (t & 1)) - smem) : 0, byte = SHARE ? kept(0x4440 + wk * GROUPS + (t >> 1)) : 0;
  float decoded = 0.f;
  auto step = [&](int item, u32 (&even)[16], u32 (&odd)[16]) {            // the operands of even and of odd groups
    const u8* stage = ring + of_warp(c.stage) * STAGE;
    auto release = [&]() { if (item > 0 && lane == 0) arrive(empty + 8 * (c.stage ? c.stage - 1 : STAGES - 1)); };   // the stage before
    wait_for(full + 8 * c.stage, c.turn);
    const bool filled = (wn >> 2) * 64 < min(box, r1 - c.row0);          // for whole warpgroups
    if (!filled) release();
#pragma unroll
    for (int b = 0; b < (filled ? GROUPS : 0); b++) {
      const int group = wk * GROUPS + b, row = wn * 16 + g;
      const u8 *p = stage + row * BOX, *xs = stage + W_BYTES + group * ROWS * 128;
      u32 (&a)[16] = b & 1 && !ONE ? odd : even;
      if (ONE) { products_left<0>(); if (b == 0) release(); }
      if (FMT == 2) {
        if (SHARE && b == 0) {
          const float2 code = *(const float2*)(smem + word0 + c.stage * (TILE * PER_ROW * 2));
          decoded = fmaf(map_[__byte_perm(__float_as_uint(code.x), 0, byte)], code.y, plus);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {                                    // before the shuffles, which nothing is moved across
          const int unit = place_of(g, group * 2 + h);
          const uint4 e = *(const uint4*)(p + unit), d = *(const uint4*)(p + 8 * BOX + unit);
          const u32 q[8] = {e.x, d.x, e.y, d.y, e.z, d.z, e.w, d.w};
#pragma unroll
          for (int i = 0; i < 8; i++) a[8 * h + i] = own_weights(table, q[i], lane * 4, 0x5504 | t << 4);
        }
        float s[4];                                                      // rows g, g + 8; halves of the group
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int r = row + 8 * (i & 1), at = HALF_BLOCK ? group * 2 + (i >> 1) : group;
          const float* code = (const float*)scales_at(c.stage, r) + (PACKED ? 0 : at);
          s[i] = SHARE ? of_four(decoded, 2 * b + i) : *code;
          if (PACKED && !SHARE) s[i] = scales.decode_of_word(__float_as_uint(s[i]), code[1], plus, (SCALES == 4 ? 0 : (c.row0 + r) * nb + (p0 + c.piece) * SCALES & 3) + at, map_);
          else if (NESTED && !SHARE) s[i] = scales.decode(__float_as_uint(s[i]), code[SCALES], plus, (c.row0 + r) * nb + (p0 + c.piece) * SCALES + at, map_);
          if (!HALF_BLOCK && i == 1) { s[2] = s[0]; s[3] = s[1]; break; }
        }
#pragma unroll
        for (int i = 0; i < 16; i++) a[i] = scaled(a[i], s[i >> 3 << 1 | i & 1]);
      } else {
#pragma unroll
        for (int s = 0; s < 4; s++) {
          const u16* q = (const u16*)(p + place_of(g, group * 4 + s)) + t;
          a[4 * s] = pairs.of<0>(q[0]); a[4 * s + 1] = pairs.of<0>(q[4 * BOX]); a[4 * s + 2] = pairs.of<0>(q[4]); a[4 * s + 3] = pairs.of<0>(q[4 * BOX + 4]);
        }
      }
      before_products();
#pragma unroll
      for (int s = 0; s < 4; s++) wgmma<BF16>(acc, a[4 * s], a[4 * s + 1], a[4 * s + 2], a[4 * s + 3], xs, s);
      close_products();
      if (!ONE) { products_left<1>(); if (b == 0) release(); }
    }
  };
  if (warp == WN * WK) {
    for (int item = STAGES; item < items; item++) { wait_for(empty + 8 * c.stage, c.turn ^ 1); __syncwarp(); fetch_w(c); fetch_x(c); c.next(pieces, box); }
  } else {
    u32 a0[16], a1[16];
    for (int tile = 0, item = 0; tile < tiles; tile++) {
      for (int piece = 0; piece < pieces; piece++, item++) {
        if (GROUPS % 2 && !ONE && item & 1) step(item, a1, a0); else step(item, a0, a1);
        c.next(pieces, box);
      }
      sums_ready<0>(acc);
      if (!DIRECT || tiles == 1) break;
      const int row0 = r0 + tile * box, end = min(r1, row0 + box), first = row0 + wn * 16 + g;
      const float2 v[2] = {out.of_row(max(min(first, end - 1), 0)), out.of_row(max(min(first + 8, end - 1), 0))};
#pragma unroll
      for (int i = 0; i < NT; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int row = first + 8 * (j >> 1), r = 8 * i + 2 * t + (j & 1);
          if (row < end && r < m) out.put(r, row, acc[i][j], v[j >> 1]);
          acc[i][j] = 0.f;
        }
    }
  }
  if (DIRECT && tiles != 1) return;
  __syncthreads();                                                       // the ring has been read: a part of the sums for each warp
  if (CL > 1) cluster_arrive();
  if (warp < WN * WK) {
#pragma unroll
    for (int i = 0; i < NT; i++) {
      float *p = (float*)ring + (wk * ROWS + 8 * i + 2 * t) * E_PITCH + wn * 16 + g, (&s)[4] = acc[i];
      if (TILE == BN || wn * 16 < TILE) { p[0] = s[0]; p[E_PITCH] = s[1]; }
      if (TILE == BN || wn * 16 + 8 < TILE) { p[8] = s[2]; p[E_PITCH + 8] = s[3]; }
    }
  }
  auto part = [&](int i) { return (float*)ring + i; };
  if (CL > 1) {                                                          // none sends before all have read their rings
    cluster_wait();
    push_tile<TILE, E_PITCH, ROWS, THREADS, WK>(out, part, [&](int i) { return (float*)ring + WK * ROWS * E_PITCH + i; }, pushes, m, rank, r0, r1);
  } else {
    if (WK == 1) __syncthreads();
    put_tiles<TILE, E_PITCH, ROWS, THREADS, WK>(out, part, m, rank, r0, r1, 1, true);
  }
}
