// More rows of x than shared memory holds: y = x W^T for up to 8 NT rows, weights and x streamed together.
//
// A cluster takes a range of whole rows of W in tiles of BN; its CL blocks split the columns. A stage of the ring holds
// KC columns of a tile of W, of x, and the scales. WN x WK warps: WN along the rows (RT tiles of 16 each), WK along the
// columns of a stage. Weights are expanded to the type of x, as the definition does (one rounding of value times scale), and are
// the 16-row operand; x is read from shared memory in the order in which the stored bytes give the columns.
// WGMMA (Hopper): four warps in a row of WN multiply together, x read from shared memory once for their 64 rows; columns stay in
// their order, so a lane picks its byte of every word. The products run while the next weights are expanded.
// Filled in: NT, RT, WN, WK, KC, STAGES, WGMMA, HALF_BLOCK (a scale for 32 columns).
constexpr int THREADS = WN * WK * 32, BN = WN * RT * 16, ROWS = 8 * NT;
constexpr int CB = FMT == 1 ? KC : KC / 2, GROUPS = KC / 64 / WK;
constexpr int SPAN = HALF_BLOCK ? 32 : 64, SCALES = FMT == 2 ? KC / SPAN : 0, PER_ROW = SCALES ? SCALES : 1;
constexpr int X_PITCH = WGMMA ? KC * 2 : KC * 2 + 16, W_BYTES = BN * CB, X_BYTES = ROWS * X_PITCH;
constexpr int ALIGN = WGMMA ? 1024 : 16, STAGE = (W_BYTES + X_BYTES + BN * (PACKED ? 8 : SCALES * 4 * (1 + NESTED)) + ALIGN - 1) / ALIGN * ALIGN;
constexpr int E_PITCH = BN + 4, DIRECT = WGMMA && WK == 1 && CL == 1;    // DIRECT: no sums meet
constexpr int SUMS = DIRECT ? 0 : (ROWS * E_PITCH * 4 + ALIGN - 1) / ALIGN * ALIGN;
constexpr int AHEAD = STAGES - 1;
static_assert(AHEAD > 0, "a stage on its way, one that is read");
static_assert(!WGMMA || (RT == 1 && WN % 4 == 0), "a warpgroup multiplies 64 rows");
static_assert(GROUPS * WK * 64 == KC && (CB == 64 || CB == 128 || (WGMMA && CB == 256)), "a warp takes whole groups of 64 columns");

// wgmma: units of 16 bytes of W change places so that eight rows, the same unit of each, spread over the banks.
DEVICE int spread(int row, int unit) { return unit ^ (CB >= 128 ? row & 7 : row >> 1 & 3); }
DEVICE int place_of(int row, int unit) { return spread(row, unit) * 16; }
// The pair of weights in the lane's byte of w (`pick` chooses it and the lane's column of the table), scaled, in the type of x.
DEVICE u32 own_weights(const u8* table, u32 w, u32 lane4, u32 pick, float scale) {
  u32 at = TABLE_SHIFT == 8 ? __byte_perm(w, lane4, pick) : __byte_perm(w, lane4 * 2, pick) >> 1, v = *(const u32*)(table + at);
  return pack(h2f(v & 0xffffu) * scale, h2f(v >> 16) * scale);
}
// The pair of weights in byte B, scaled, in the type of x.
template <int B> DEVICE u32 weights(const u8* table, u32 w, u32 lane, float scale) {
  u32 v = look_up<B>(table, w, lane * 4);
  return pack(h2f(v & 0xffffu) * scale, h2f(v >> 16) * scale);
}

ENTRY __global__ void __launch_bounds__(THREADS, 1)
few_rows(const u8* __restrict__ w, const u16* __restrict__ x, u16* __restrict__ y, const u16* __restrict__ bias,
         const void* __restrict__ absmax, const float* __restrict__ nested, const float* __restrict__ map,
         const float* __restrict__ offset, int m, int n, int k, int shift, int nested_shift) {
  SHARED(smem);
  const int lane = threadIdx.x & 31, warp = of_warp(threadIdx.x >> 5), g = lane >> 2, t = lane & 3, rank = cluster_rank();
  const int wn = warp % WN, wk = warp / WN, cluster = blockIdx.x / CL, clusters = gridDim.x / CL;
  const int four = n >= 4 * clusters ? 4 : 1;                            // rows of a block begin where four are stored at once
  auto begin_of = [&](int c) { return min((int)((u32)(four == 4 ? (n + 3) / 4 : n) * c / clusters) * four, n); };
  const int r0 = begin_of(cluster), r1 = begin_of(cluster + 1);
  const int tiles = (r1 - r0 + BN - 1) / BN, all = (k + KC - 1) / KC, share = (all + CL - 1) / CL;
  const int p0 = rank * share, pieces = max(min(share, all - p0), 0), items = tiles * pieces;
  const int nb = k / SPAN, row_bytes = FMT == 1 ? k : k / 2;
  u8* table = smem;
  float* map_ = (float*)(smem + TABLE);
  float* sums = (float*)(smem + TABLE + (NESTED ? 1024 : 0));            // [ROWS, BN], one tile
  u8* ring = (u8*)sums + SUMS;
  const Scales scales = {absmax, nested, map, offset, shift, nested_shift};
  const Output out = {y, bias, (const float*)absmax, n};
  const u64 policy = evict_first();

  struct Cursor {
    int row0, piece, stage; Shared to;                                   // `to`: the stage, for copies
    DEVICE void next(int pieces) { to += STAGE; if (++stage == STAGES) { stage = 0; to -= STAGES * STAGE; } if (++piece == pieces) { piece = 0; row0 += BN; } }
  };
  auto fetch_w = [&](const Cursor& at) {
    const int piece = p0 + at.piece;
#pragma unroll
    for (int u = threadIdx.x; u < W_BYTES / 16; u += THREADS) {
      int row = u / (CB / 16), unit = u % (CB / 16), byte = piece * CB + unit * 16;
      if (at.row0 + row < r1) copy16(at.to + row * CB + (WGMMA ? spread(row, unit) : swizzled<CB>(row, unit)) * 16, w + (i64)(at.row0 + row) * row_bytes + (byte < row_bytes ? byte : 0), byte < row_bytes ? 16 : 0, policy);
    }
    if (PACKED) {                                                        // the words of all rows, then their scales
#pragma unroll
      for (int e = threadIdx.x; e < BN; e += THREADS) {
        const int row = at.row0 + e, b = piece * SCALES; const bool inside = row < r1 && b < nb;
        const u32 block = inside ? row * nb + b : 0; const Shared to = at.to + W_BYTES + X_BYTES + e * 4;
        copy4(to, scales.word_of(block), inside ? 4 : 0); copy4(to + BN * 4, scales.outer_of(block), inside ? 4 : 0);
      }
      return;
    }
    for (int e = threadIdx.x; e < BN * SCALES; e += THREADS) {
      int row = at.row0 + e / PER_ROW, b = piece * SCALES + e % PER_ROW;
      scales.fetch_both(at.to + W_BYTES + X_BYTES + e * 4, BN * SCALES * 4, row * nb + b, row < r1 && b < nb);
    }
  };
  auto fetch_x = [&](const Cursor& at) {
#pragma unroll
    for (int u = threadIdx.x; u < ROWS * KC / 8; u += THREADS) {
      int row = u / (KC / 8), unit = u % (KC / 8), col = (p0 + at.piece) * KC + unit * 8;
      const int place = WGMMA ? (unit >> 3) * ROWS * 128 + row * 128 + ((unit ^ row) & 7) * 16 : row * X_PITCH + unit * 16;
      if (row < m) copy16(at.to + W_BYTES + place, x + (i64)row * k + (col < k ? col : 0), col < k ? 16 : 0);
    }
  };

  // Weights may be read before `wait`, x must not: the first stages come in two halves.
  let_next_kernel_start();
  out.send_for_rows(r0, r1);
  Cursor f = {r0, 0, 0, shared(ring)}, c = f;
#pragma unroll
  for (int i = 0; i < AHEAD; i++) { if (i < items) fetch_w(f); f.next(pieces); }
  if (FMT == 2) {
    if (WGMMA) build_plain_table(table, THREADS);
    else build_table(table, THREADS);
  }
  wait_before_reading_x();
  f = c;
#pragma unroll
  for (int i = 0; i < AHEAD; i++) { if (i < items) fetch_x(f); f.next(pieces); commit(); }
  Values<THREADS> values; values.fetch(map);
  const float plus = NESTED ? *offset : 0.f;
  values.put(map_);                                                      // seen when the warps meet at the first stage

  float acc[RT][NT][4];
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int i = 0; i < NT; i++) acc[r][i][0] = acc[r][i][1] = acc[r][i][2] = acc[r][i][3] = 0.f;

  auto finish = [&](int row0) {
    if (DIRECT) {
      const int first = row0 + wn * 16 + g;
      const float2 v[2] = {out.of_row(max(min(first, r1 - 1), 0)), out.of_row(max(min(first + 8, r1 - 1), 0))};
#pragma unroll
      for (int i = 0; i < NT; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int row = first + 8 * (j >> 1), r = 8 * i + 2 * t + (j & 1);
          if (row < r1 && r < m) out.put(r, row, acc[0][i][j], v[j >> 1]);
          acc[0][i][j] = 0.f;
        }
      return;
    }
    for (int turn = 0; turn < WK; turn++) {                              // in this order, whoever is first
      if (wk == turn) {
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
          for (int i = 0; i < NT; i++) {
            float *p = sums + (8 * i + 2 * t) * E_PITCH + (wn * RT + r) * 16 + g, (&s)[4] = acc[r][i];
            if (turn) { s[0] += p[0]; s[1] += p[E_PITCH]; s[2] += p[8]; s[3] += p[E_PITCH + 8]; }
            p[0] = s[0]; p[E_PITCH] = s[1]; p[8] = s[2]; p[E_PITCH + 8] = s[3];
            s[0] = s[1] = s[2] = s[3] = 0.f;
          }
      }
      __syncthreads();
    }
    put_tiles<BN, E_PITCH, ROWS, THREADS>(out, [&](int i) { return sums + i; }, m, rank, row0, r1, 1, true);
  };

  const Int8Pairs pairs(m);
  auto step = [&](int item, u32 (&even)[16], u32 (&odd)[16]) {            // wgmma: the operands of even and of odd groups
    copies_left<AHEAD - 1>();
    if (WGMMA) products_left<0>();
    if (WGMMA) copies_seen_by_wgmma();
    __syncthreads();
    if (item + AHEAD < items) { fetch_w(f); fetch_x(f); f.next(pieces); }
    commit();
    const u8* stage = ring + c.stage * STAGE;
    if (WGMMA && (wn >> 2) * 64 < r1 - c.row0) {               // for whole warpgroups
#pragma unroll
      for (int b = 0; b < GROUPS; b++) {
        const int group = wk * GROUPS + b, row = wn * 16 + g;
        const u8* p = stage + row * CB;
        const u8* xs = stage + W_BYTES + group * ROWS * 128;
        u32 (&a)[16] = b & 1 ? odd : even;
        if (FMT == 2) {
          float s[4];                                                    // rows g, g + 8; halves of the group
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int r = row + 8 * (i & 1), at = HALF_BLOCK ? group * 2 + (i >> 1) : group;
            const float* code = (const float*)(stage + W_BYTES + X_BYTES) + r * (PACKED ? 1 : SCALES) + (PACKED ? 0 : at);
            s[i] = *code;
            if (PACKED) s[i] = scales.decode_of_word(__float_as_uint(s[i]), code[BN], plus, (SCALES == 4 ? 0 : (c.row0 + r) * nb + (p0 + c.piece) * SCALES & 3) + at, map_);
            else if (NESTED) s[i] = scales.decode(__float_as_uint(s[i]), code[BN * SCALES], plus, (c.row0 + r) * nb + (p0 + c.piece) * SCALES + at, map_);
            if (!HALF_BLOCK && i == 1) { s[2] = s[0]; s[3] = s[1]; break; }
          }
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int unit = place_of(g, group * 2 + h);
            const uint4 e = *(const uint4*)(p + unit), d = *(const uint4*)(p + 8 * CB + unit);
            const u32 q[8] = {e.x, d.x, e.y, d.y, e.z, d.z, e.w, d.w};
#pragma unroll
            for (int i = 0; i < 8; i++) a[8 * h + i] = own_weights(table, q[i], lane * 4, 0x5504 | t << 4, s[2 * h + (i & 1)]);
          }
        } else {
#pragma unroll
          for (int s = 0; s < 4; s++) {
            const u16* q = (const u16*)(p + place_of(g, group * 4 + s)) + t;
            a[4 * s] = pairs.of<0>(q[0]); a[4 * s + 1] = pairs.of<0>(q[4 * CB]); a[4 * s + 2] = pairs.of<0>(q[4]); a[4 * s + 3] = pairs.of<0>(q[4 * CB + 4]);
          }
        }
        before_products();
#pragma unroll
        for (int s = 0; s < 4; s++) wgmma<BF16>(acc[0], a[4 * s], a[4 * s + 1], a[4 * s + 2], a[4 * s + 3], xs, s);
        close_products();
        products_left<1>();
      }
    }
#pragma unroll
    for (int b = 0; b < (WGMMA ? 0 : GROUPS); b++) {
      const int group = wk * GROUPS + b;
      u32 a[RT][16];                                                     // four steps of 16 columns, four registers each
#pragma unroll
      for (int r = 0; r < RT; r++) {
        const int row = (wn * RT + r) * 16 + g;
        const u8* p = stage + row * CB;
        if (FMT == 2) {
          const float* s = (const float*)(stage + W_BYTES + X_BYTES);
          const int at = HALF_BLOCK ? group * 2 + (t >> 1) : group;
          s += PACKED ? row : row * SCALES + at;
          float s0 = s[0], s1 = s[PACKED ? 8 : 8 * SCALES];
          if (PACKED) {
            const int first = SCALES == 4 ? 0 : (c.row0 + row) * nb + (p0 + c.piece) * SCALES & 3, other = SCALES == 4 ? 0 : (c.row0 + row + 8) * nb + (p0 + c.piece) * SCALES & 3;
            s0 = scales.decode_of_word(__float_as_uint(s0), s[BN], plus, first + at, map_);
            s1 = scales.decode_of_word(__float_as_uint(s1), s[BN + 8], plus, other + at, map_);
          } else if (NESTED) {
            const u32 block = (c.row0 + row) * nb + (p0 + c.piece) * SCALES + at;
            s0 = scales.decode(__float_as_uint(s0), s[BN * SCALES], plus, block, map_);
            s1 = scales.decode(__float_as_uint(s1), s[(BN + 8) * SCALES], plus, block + 8 * nb, map_);
          }
          const int unit = swizzled<CB>(g, group * 2 + (t >> 1)) * 16 + (t & 1) * 8;
          const uint2 u = *(const uint2*)(p + unit), v = *(const uint2*)(p + 8 * CB + unit);
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const u32 e = h ? u.y : u.x, d = h ? v.y : v.x; u32* q = a[r] + 8 * h;
            q[0] = weights<0>(table, e, lane, s0); q[1] = weights<0>(table, d, lane, s1); q[2] = weights<1>(table, e, lane, s0); q[3] = weights<1>(table, d, lane, s1);
            q[4] = weights<2>(table, e, lane, s0); q[5] = weights<2>(table, d, lane, s1); q[6] = weights<3>(table, e, lane, s0); q[7] = weights<3>(table, d, lane, s1);
          }
        } else {
          const int unit = swizzled<CB>(g, group * 4 + t) * 16;
          const uint4 u = *(const uint4*)(p + unit), v = *(const uint4*)(p + 8 * CB + unit);
          const u32 e[4] = {u.x, u.y, u.z, u.w}, d[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int s = 0; s < 4; s++) { a[r][4 * s] = pairs.of<0>(e[s]); a[r][4 * s + 1] = pairs.of<0>(d[s]); a[r][4 * s + 2] = pairs.of<1>(e[s]); a[r][4 * s + 3] = pairs.of<1>(d[s]); }
        }
      }
      const u8* xp = stage + W_BYTES + g * X_PITCH + (group * 64 + t * 16) * 2;
#pragma unroll
      for (int i = 0; i < NT; i++) {
        const uint4 e = *(const uint4*)(xp + 8 * i * X_PITCH), f = *(const uint4*)(xp + 8 * i * X_PITCH + 16);
        const u32 xb[8] = {e.x, e.y, e.z, e.w, f.x, f.y, f.z, f.w};
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
          for (int r = 0; r < RT; r++) mma<BF16>(acc[r][i], a[r][4 * s], a[r][4 * s + 1], a[r][4 * s + 2], a[r][4 * s + 3], xb[2 * s], xb[2 * s + 1]);
      }
    }
    if (c.piece == pieces - 1) { if (WGMMA) sums_ready<0>(acc[0]); finish(c.row0); }
    c.next(pieces);
  };
  u32 a0[16], a1[16];
  for (int item = 0; item < items; item++) step(item, a0, a1);
}
