// Hopper, 8 to 64 rows: y = x W^T with x held whole in shared memory, as wgmma reads it.
//
// A cluster takes a range of whole rows of W in tiles of BN = 64 WN; its CL blocks split the columns. WN x WK warpgroups: WN along
// the rows of a tile, WK take turns along the columns. Each warp streams its own 16 rows (pieces of CB bytes of each) through a
// ring of its own with asynchronous copies, without a barrier in the loop. Weights are the register operand; x is permuted within
// each 64 columns when it comes, so that a lane's stored bytes are its operands in order.
// 4-bit: looked-up fp16 pairs are the operand; the sum over each 64 columns is scaled in float32 while the next products run.
// bf16 x becomes fp16 up to a power of two a row, of this block's columns. int8: nothing is scaled before the end.
// Filled in: NT (eights of x), WN, WK, and those of Ring.
constexpr int WARPS = 4 * WN * WK, THREADS = 32 * WARPS, BN = 64 * WN, ROWS = 8 * NT;
constexpr int E_PITCH = BN + 4, DIRECT = WK == 1 && CL == 1;           // DIRECT: no sums meet
constexpr int IN_TABLE = FMT == 2 && ROWS * E_PITCH <= 8192;  // the sums, in what the table leaves free
// Tiles between two meetings of the blocks of a cluster: as many as the table has room for; else two, where x leaves room.
constexpr int MEET = IN_TABLE ? 8192 / (ROWS * E_PITCH) : ROWS <= 16 && CL >= 4 ? 2 : 1;
constexpr int SUMS = DIRECT || IN_TABLE ? 0 : (MEET * ROWS * E_PITCH + 31) / 32 * 32;
constexpr int TO_FP16 = FMT == 2 && BF16, MMA_BF16 = BF16 && FMT != 2;
static_assert(FMT != 0 && GROUPS % 2 == 0, "products alternate between two sets of registers");

ENTRY __global__ void __launch_bounds__(THREADS, 1)
few_rows(const u8* __restrict__ w, const u16* __restrict__ x, u16* __restrict__ y, const u16* __restrict__ bias,
         const void* __restrict__ absmax, const float* __restrict__ nested, const float* __restrict__ map,
         const float* __restrict__ offset, int m, int n, int k, int shift, int nested_shift) {
  SHARED(smem);
  const int lane = threadIdx.x & 31, warp = of_warp(threadIdx.x >> 5), g = lane >> 2, t = lane & 3, rank = cluster_rank();
  const int wn = (warp >> 2) % WN, wk = (warp >> 2) / WN, mine = wn * 64 + (warp & 3) * 16;  // this warp's rows of a tile
  const int cluster = blockIdx.x / CL, clusters = gridDim.x / CL;
  const int r0 = (int)((i64)n * cluster / clusters), r1 = (int)((i64)n * (cluster + 1) / clusters);
  const int tiles = (r1 - r0 + BN - 1) / BN, all = (k + KB - 1) / KB, share = (all + CL - 1) / CL;
  const int p0 = rank * share, pieces = max(min(share, all - p0), 0);
  const int nb = k / 64, row_bytes = FMT == 1 ? k : k / 2;
  u8* table = smem;
  u8* xs = smem + TABLE;                                                 // [columns / 64][ROWS][128 bytes], units swizzled
  u32* top = (u32*)(xs + share * KB * 2 * ROWS);                         // largest |x| of each row, as bits
  float* map_ = (float*)(top + 64);
  float* red = map_ + (NESTED ? 256 : 0);
  u8* ring = (u8*)(red + SUMS) + warp * SLOTS * SLOT;
  auto sum_at = [&](int i) { return IN_TABLE ? (float*)(table + (i >> 5) * 256 + 128) + (i & 31) : red + i; };
  const Scales scales = {absmax, nested, map, offset, shift, nested_shift};
  const Output out = {y, bias, (const float*)absmax, n};
  const u64 policy = evict_first();

  const Walk<WK> start = {pieces ? wk / pieces : tiles, pieces ? wk % pieces : 0, pieces}; Walk<WK> here = start;
  Ring<WK> stream = {w, ring, scales, r0 + mine, BN, r1, tiles, p0, row_bytes, nb, policy};
  stream.open(start);

  let_next_kernel_start();
  out.send_for_rows(r0, r1);
  if (EARLY) stream.begin_early(); else stream.fill();
  if (threadIdx.x < 64) top[threadIdx.x] = 0;
  if (FMT == 2) build_plain_table(table, THREADS);
  wait_before_reading_x();
  Values<THREADS> values; values.fetch(map);
  const float plus = NESTED ? *offset : 0.f;

  // x: a warp takes 64 columns of four rows at a time. Columns 16 t + 4 s + 2 h + {0, 1} of 64 go where lane t finds pair h of step s.
  constexpr int FOURS = ROWS / 4, BATCH = 8;
  const int units = share * GROUPS * FOURS, v = lane & 7;
  auto x_of = [&](int u) { return xs + u / FOURS * ROWS * 128 + (u % FOURS * 4 + (lane >> 3)) * 128; };
  for (int u0 = warp; u0 == warp || u0 < units; u0 += BATCH * WARPS) {
    uint4 q[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      const int u = u0 + j * WARPS, r = u % FOURS * 4 + (lane >> 3), col = p0 * KB + u / FOURS * 64 + v * 8;
      q[j] = make_uint4(0, 0, 0, 0);
      if (u < units && r < m && col < k) q[j] = *(const uint4*)(x + (i64)r * k + col);
    }
    if (u0 == warp) {                                                    // not before: x would come behind the weights
      if (EARLY) stream.fill();
      if (TO_FP16) __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      const int u = u0 + j * WARPS, r = u % FOURS * 4 + (lane >> 3);
      if (u >= units) break;
      const u32 p[4] = {q[j].x, q[j].y, q[j].z, q[j].w};
      u8* to = x_of(u) + (v >> 1) * 4;
#pragma unroll
      for (int i = 0; i < 4; i++) *(u32*)(to + ((4 * (v & 1) + i) ^ (r & 7)) * 16) = p[i];
      if (TO_FP16) {
        const u32 most = max_of_8(largest(q[j]));
        if (v == 0) atomicMax(&top[r], most);
      }
    }
  }
  if (TO_FP16) {
    __syncthreads();
#pragma unroll 4
    for (int u = warp; u < units; u += WARPS) {                          // units of 16 bytes: whole rows, in any order
      uint4* p = (uint4*)(x_of(u) + v * 16);
      *p = to_fp16(*p, x_scale(top[u % FOURS * 4 + (lane >> 3)]));
    }
  }
  values.put(map_);
  copies_seen_by_wgmma();
  __syncthreads();

  const u32 lane4 = lane * 4;
  const Int8Pairs pairs(m);
  float acc[NT][4], c[2][NT][4], before0 = 0.f, before1 = 0.f;           // before: the scales of the products under way
#pragma unroll
  for (int i = 0; i < NT; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) acc[i][j] = 0.f;
  auto add = [&](float (&sum)[NT][4]) {
#pragma unroll
    for (int i = 0; i < NT; i++) {
      acc[i][0] = fmaf(sum[i][0], before0, acc[i][0]); acc[i][1] = fmaf(sum[i][1], before0, acc[i][1]);
      acc[i][2] = fmaf(sum[i][2], before1, acc[i][2]); acc[i][3] = fmaf(sum[i][3], before1, acc[i][3]);
    }
  };
  for (int tile = 0; tile < tiles; tile++) {
    const int row0 = r0 + tile * BN;
    const bool filled = row0 + wn * 64 < r1;                             // for whole warpgroups
    while (here.tile == tile) {
      const int piece = here.piece;
      const u8* slot = stream.next(tile, piece, plus, map_);
      u32 word0 = 0, word1 = 0; float outer0 = 0.f, outer1 = 0.f;         // of rows g and g + 8
      if (PACKED) {
        const u32* s = (const u32*)(slot + PIECE) + g;
        const int low = 8 * ((u32)((row0 + mine + g) * nb + (p0 + piece) * SCALES) & 3), high = 8 * ((u32)((row0 + mine + g + 8) * nb + (p0 + piece) * SCALES) & 3);
        word0 = s[0] >> low; word1 = s[8] >> high; outer0 = __uint_as_float(s[16]); outer1 = __uint_as_float(s[24]);
      }
      if (filled) {
#pragma unroll
        for (int b = 0; b < GROUPS; b++) {
          const u8* x_group = xs + (piece * GROUPS + b) * ROWS * 128;
          u32 a[16];
          if (FMT == 2) {
            const u8* p = slot + swizzled<CB>(g, b * 2 + (t >> 1)) * 16 + (t & 1) * 8;
            const uint2 e = *(const uint2*)(p + g * CB), d = *(const uint2*)(p + (g + 8) * CB);
#pragma unroll
            for (int h = 0; h < 2; h++) {
              const u32 up = h ? e.y : e.x, low = h ? d.y : d.x; u32* q = a + 8 * h;
              q[0] = look_up<0>(table, up, lane4); q[1] = look_up<0>(table, low, lane4); q[2] = look_up<1>(table, up, lane4); q[3] = look_up<1>(table, low, lane4);
              q[4] = look_up<2>(table, up, lane4); q[5] = look_up<2>(table, low, lane4); q[6] = look_up<3>(table, up, lane4); q[7] = look_up<3>(table, low, lane4);
            }
            float (&sum)[NT][4] = c[b & 1];
            before_products();
            wgmma<MMA_BF16, 0>(sum, a[0], a[1], a[2], a[3], x_group, 0);
#pragma unroll
            for (int s = 1; s < 4; s++) wgmma<MMA_BF16>(sum, a[4 * s], a[4 * s + 1], a[4 * s + 2], a[4 * s + 3], x_group, s);
            close_products();
            if (b) { sums_ready<1>(c[b & 1 ^ 1]); add(c[b & 1 ^ 1]); }
            if (PACKED) {
              before0 = scales.decode_of_word(word0, outer0, plus, b, map_); before1 = scales.decode_of_word(word1, outer1, plus, b, map_);
            } else {
              const float* s = (const float*)(slot + PIECE) + g * SCALES + b;
              before0 = s[0]; before1 = s[8 * SCALES];
            }
          } else {
            const u8* p = slot + swizzled<CB>(g, b * 4 + t) * 16;
            const uint4 e = *(const uint4*)(p + g * CB), d = *(const uint4*)(p + (g + 8) * CB);
            const u32 up[4] = {e.x, e.y, e.z, e.w}, low[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
            for (int s = 0; s < 4; s++) { a[4 * s] = pairs.of<0>(up[s]); a[4 * s + 1] = pairs.of<0>(low[s]); a[4 * s + 2] = pairs.of<1>(up[s]); a[4 * s + 3] = pairs.of<1>(low[s]); }
            before_products();
#pragma unroll
            for (int s = 0; s < 4; s++) wgmma<MMA_BF16>(acc, a[4 * s], a[4 * s + 1], a[4 * s + 2], a[4 * s + 3], x_group, s);
            close_products();
            products_left<1>();
          }
        }
        if (FMT == 2) { sums_ready<0>(c[1]); add(c[1]); }
      }
      __syncwarp();
      here.next();
    }
    if (FMT == 1) sums_ready<0>(acc);
    if (TO_FP16) {
#pragma unroll
      for (int i = 0; i < NT; i++) {
        const float u0 = x_unscale(top[8 * i + 2 * t]), u1 = x_unscale(top[8 * i + 2 * t + 1]);
        acc[i][0] *= u0; acc[i][2] *= u0; acc[i][1] *= u1; acc[i][3] *= u1;
      }
    }
    if (DIRECT) {
#pragma unroll
      for (int i = 0; i < NT; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int row = row0 + mine + g + 8 * (j >> 1), r = 8 * i + 2 * t + (j & 1);
          if (row < r1 && r < m) out.put(r, row, acc[i][j]);
          acc[i][j] = 0.f;
        }
      continue;
    }
    const int before = tile % MEET; const bool meet = before == MEET - 1 || tile + 1 == tiles;
    for (int turn = 0; turn < WK; turn++) {                              // in this order, whoever is first
      if (wk == turn) {
#pragma unroll
        for (int i = 0; i < NT; i++)
#pragma unroll
          for (int j = 0; j < 4; j++) {
            float* p = sum_at((before * ROWS + 8 * i + 2 * t + (j & 1)) * E_PITCH + mine + g + 8 * (j >> 1));
            *p = turn ? acc[i][j] + *p : acc[i][j];
            acc[i][j] = 0.f;
          }
      }
      if (turn + 1 < WK || (CL == 1 && meet)) __syncthreads();
    }
    if (meet) put_tiles<BN, E_PITCH, ROWS, THREADS>(out, sum_at, m, rank, row0 - before * BN, r1, before + 1, tile + 1 == tiles);
  }
  copies_left<0>();
}
