// Steps of the few-row kernels, between few_rows_common.cu and the text of one of them: how x and the values of quantised scales come into
// shared memory, how warps walk and stream, how the sums of a cluster's blocks meet.

// Where a warp is: it takes every STEP-th piece.
template <int STEP> struct Walk {
  int tile, piece, pieces;
  DEVICE void next() { piece += STEP; while (piece >= pieces) { piece -= pieces; tile++; } }
};

// Up to ROWS rows of x, `vectors` of eight columns each from `col0` on, into shared memory: place(row, vector) says where. OF: warps. FP16: see
// to_fp16; `top` is zeros before and the largest |x| of each row after. Begins and ends with all warps together. `meanwhile`: what each
// warp does while its first vectors are on their way: it sends for weights then, behind which x would come late.
template <int ROWS, int OF, int FP16, class Place, class Meanwhile>
DEVICE void hold_x(const u16* x, u32* top, int m, int k, int col0, int vectors, Place place, Meanwhile meanwhile) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, chunks = (vectors + 31) / 32;
  // A warp takes 32 vectors of one row at a time, and several before it uses the first: one trip to memory, not one a row.
  constexpr int BATCH = 8;
  for (int u0 = warp; u0 == warp || u0 < ROWS * chunks; u0 += BATCH * OF) {
    uint4 q[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      const int u = u0 + j * OF, r = u % ROWS, v = u / ROWS * 32 + lane, col = col0 + v * 8;
      q[j] = make_uint4(0, 0, 0, 0);
      if (u < ROWS * chunks && v < vectors && r < m && col < k) q[j] = *(const uint4*)(x + (i64)r * k + col);
    }
    if (u0 == warp) {
      meanwhile();
      if (FP16) __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      const int u = u0 + j * OF, r = u % ROWS, v = u / ROWS * 32 + lane;
      if (u >= ROWS * chunks) break;
      if (v < vectors) *(uint4*)place(r, v) = q[j];
      if (FP16) {
        const u32 biggest = warp_max(largest(q[j]));
        if (lane == 0) atomicMax(&top[r], biggest);
      }
    }
  }
  __syncthreads();
  if (!FP16) return;
#pragma unroll 4
  for (int u = warp; u < ROWS * chunks; u += OF) {                    // what this thread wrote
    const int r = u % ROWS, v = u / ROWS * 32 + lane;
    if (v < vectors) { uint4* p = (uint4*)place(r, v); *p = to_fp16(*p, x_scale(top[r])); }
  }
  __syncthreads();
}

// The values of quantised scales, on their way into shared memory while x is too, by OF threads.
template <int OF> struct Values {
  static constexpr int EACH = (256 + OF - 1) / OF;
  float v[EACH];
  DEVICE void fetch(const float* map) {
#pragma unroll
    for (int i = 0; i < EACH; i++) v[i] = NESTED && (int)threadIdx.x + i * OF < 256 ? map[threadIdx.x + i * OF] : 0.f;
  }
  DEVICE void put(float* map_) const {
#pragma unroll
    for (int i = 0; i < EACH; i++) if (NESTED && (int)threadIdx.x + i * OF < 256) map_[threadIdx.x + i * OF] = v[i];
  }
};

// The sums of tiles of BN rows of W, from those of their cluster's blocks, into y. Tile number q of them begins at row0 + q * BN, and
// at(q * ROWS8 * PITCH + r * PITCH + row) is where row of x r and row of W `row` have their sum. CL 1: all have been written and seen. After
// it they may be overwritten, or the block end. OF_BLOCK: parts of a sum that each block has, one tile apart.
template <int BN, int PITCH, int ROWS8, int OF, int OF_BLOCK = 1, class At>
DEVICE void put_tiles(const Output& out, At at, int m, int rank, int row0, int r1, int tiles, bool last) {
  if (CL > 1) cluster_sync();
  else if (OF_BLOCK > 1) __syncthreads();
  for (int i = 4 * (threadIdx.x + rank * OF), q = 0; q < tiles; i += 4 * CL * OF) {
    while (i >= m * BN && q < tiles) { i -= m * BN; q++; row0 += BN; }
    if (q == tiles) break;
    const int row = i % BN, r = i / BN; if (row0 + row >= r1) continue;
    const int first = (q * ROWS8 + r) * PITCH + row;
    float4 sum = CL * OF_BLOCK == 1 ? *(const float4*)at(first) : make_float4(0.f, 0.f, 0.f, 0.f);
    if (CL * OF_BLOCK > 1) {
      float4 v[CL * OF_BLOCK];
#pragma unroll
      for (int j = 0; j < CL * OF_BLOCK; j++) {
        const float* p = at(first + j / CL * ROWS8 * PITCH);
        v[j] = CL > 1 ? cluster_read4(p, j % CL) : *(const float4*)p;
      }
#pragma unroll
      for (int j = 0; j < CL * OF_BLOCK; j++) { sum.x += v[j].x; sum.y += v[j].y; sum.z += v[j].z; sum.w += v[j].w; }
    }
    float2 values[4]; out.of_rows(row0 + row, r1, values);
    out.put4(r, row0 + row, r1, sum, values);
  }
  __syncwarp();
  if (CL > 1 && last) { cluster_arrive(); cluster_wait(); }               // what was read is in y's stores: no fence needed to end
  else if (CL > 1) cluster_sync();
  else if (!last) __syncthreads();
}

// The same where each block has one tile, without a meeting: block j of a cluster adds rows j BN / CL and on of W. Each adds its OF_BLOCK parts and
// sends the others theirs; slot(i): where rank r's sums come to lie, ROWS8 BN / CL from r times that on. `pushes`: a barrier that
// expects m BN / CL (CL - 1) sums; all blocks have been seen to have begun.
template <int BN, int PITCH, int ROWS8, int OF, int OF_BLOCK, class At, class Slot>
DEVICE void push_tile(const Output& out, At at, Slot slot, void* pushes, int m, int rank, int row0, int r1) {
  constexpr int OWN = BN / CL;
  __syncthreads();
#pragma unroll
  for (int j = 1; j <= CL; j++) {                                        // its own last
    const int to = (rank + j) % CL;
    for (int i = 4 * threadIdx.x; i < m * OWN; i += 4 * OF) {
      const int first = i / OWN * PITCH + to * OWN + i % OWN;
      float4 sum = *(const float4*)at(first);
#pragma unroll
      for (int q = 1; q < OF_BLOCK; q++) { const float4 v = *(const float4*)at(first + q * ROWS8 * PITCH); sum.x += v.x; sum.y += v.y; sum.z += v.z; sum.w += v.w; }
      float* p = slot(rank * ROWS8 * OWN + i);
      if (j < CL) push4(p, to, sum, pushes); else *(float4*)p = sum;
    }
  }
  float2 values[4]; out.of_rows(row0 + rank * OWN + 4 * threadIdx.x % OWN, r1, values);   // on their way while sums are
  wait_for_pushes(pushes);
#pragma unroll 1                                                         // more would spill
  for (int i = 4 * threadIdx.x; i < m * OWN; i += 4 * OF) {
    if (4 * OF % OWN && i >= 4 * OF) out.of_rows(row0 + rank * OWN + i % OWN, r1, values);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int j = 0; j < CL; j++) { const float4 v = *(const float4*)slot(j * ROWS8 * OWN + i); sum.x += v.x; sum.y += v.y; sum.z += v.z; sum.w += v.w; }
    out.put4(i / OWN, row0 + rank * OWN + i % OWN, r1, sum, values);
  }
}
// What the blocks do early for it: `first` is one thread.
DEVICE void expect_pushes(void* pushes, bool first, int sums) {
  if (first) { barrier_init(pushes, 1); barriers_ready(); arrive_and_expect(pushes, sums * 4); }
  cluster_arrive();
}

#ifdef SLOTS
// The kernels in which each warp streams 16 rows of a tile of W at a time through a ring of its own. Filled in: CB (bytes of each row in
// a piece), SLOTS (of the ring), EARLY (0: weights may be read at once; else the kernel in front may be writing them, and so many pieces
// of each warp are only sent for, into L2, until it has ended).
constexpr int KB = FMT == 0 ? CB / 2 : FMT == 1 ? CB : 2 * CB;         // columns of a piece
constexpr int GROUP = FMT == 0 ? 32 : 64, GROUPS = KB / GROUP;         // columns that the four lanes of a row take together
constexpr int SCALES = FMT == 2 ? GROUPS : 0, PER_ROW = SCALES ? SCALES : 1;
constexpr int PIECE = 16 * CB, SLOT = PIECE + (PACKED ? 128 : 64 * SCALES * (1 + NESTED));

// Of a warp that takes every STEP-th piece; `rows`: its first row of the first tile, `tile`: rows to the next.
template <int STEP> struct Ring {
  static constexpr int UNITS = CB / 16, AT_ONCE = 32 / UNITS;           // rows that a warp copies at once
  const u8 *w, *begin; Scales scales; int rows, tile, r1, tiles, p0, row_bytes, nb; u64 policy;
  Walk<STEP> ahead; Shared slot, first; int number;
  DEVICE int row_of_lane() const { return (threadIdx.x & 31) / UNITS; }
  DEVICE int place() const { return row_of_lane() * CB + swizzled<CB>(row_of_lane(), (threadIdx.x & 31) % UNITS) * 16; }
  DEVICE void open(Walk<STEP> from) { ahead = from; slot = first = shared(begin + place()); number = 0; }
  DEVICE void fetch() {
    const int lane = threadIdx.x & 31;
    if (ahead.tile < tiles) {
      const int tile_row = rows + ahead.tile * tile, row0 = tile_row + row_of_lane(), piece = p0 + ahead.piece, at = piece * CB + lane % UNITS * 16, take = at < row_bytes ? 16 : 0;
      const u8* from = w + (i64)row0 * row_bytes + (take ? at : 0);
#pragma unroll
      for (int j = 0; j < 16 / AT_ONCE; j++)                             // the swizzle is the same every AT_ONCE rows
        if (row0 + j * AT_ONCE < r1) copy16(slot + j * AT_ONCE * CB, from + (i64)(j * AT_ONCE) * row_bytes, take, policy);
      if (PACKED) {                                                      // 16 words, then 16 scales
        const int row = tile_row + (lane & 15), b = piece * SCALES; const bool inside = row < r1 && b < nb;
        const u32 block = inside ? row * nb + b : 0;
        copy4(slot + (PIECE + lane * 4 - place()), lane < 16 ? scales.word_of(block) : scales.outer_of(block), inside ? 4 : 0);
      }
#pragma unroll
      for (int j = 0; j < (PACKED ? 0 : SCALES / 2); j++) {
        int e = lane + 32 * j, row = tile_row + e / PER_ROW, b = piece * SCALES + e % PER_ROW;
        scales.fetch_both(slot + (PIECE + e * 4 - place()), 64 * SCALES, row * nb + b, row < r1 && b < nb);
      }
      ahead.next();
    }
    slot = slot == first + (SLOTS - 1) * SLOT ? first : slot + SLOT;
    commit();
  }
  DEVICE void fill() {
#pragma unroll
    for (int i = 0; i < SLOTS - 1; i++) fetch();
  }
  DEVICE void begin_early() const {                                      // may not read weights yet, but may send for them
    Walk<STEP> walk = ahead;
    for (int i = 0; i < EARLY && walk.tile < tiles; i++, walk.next()) {
      const int row = rows + walk.tile * tile + (threadIdx.x & 15), at = (p0 + walk.piece) * CB;
      if ((threadIdx.x & 31) < 16 && row < r1 && at < row_bytes) send_for(w + (i64)row * row_bytes + at);
    }
  }
  // The next piece, of this tile and number: its bytes, its scales as floats behind them (not where PACKED).
  DEVICE u8* next(int of_tile, int piece, float plus, const float* map_) {
    const int lane = threadIdx.x & 31;
    fetch();
    copies_left<SLOTS - 1>();
    __syncwarp();
    u8* at = (u8*)begin + number * SLOT;
    if (++number == SLOTS) number = 0;
    if (NESTED && !PACKED) {
#pragma unroll
      for (int j = 0; j < SCALES / 2; j++) {
        int e = lane + 32 * j, row = rows + of_tile * tile + e / PER_ROW, b = (p0 + piece) * SCALES + e % PER_ROW;
        float* s = (float*)(at + PIECE) + e;
        *s = scales.decode(__float_as_uint(*s), s[16 * SCALES], plus, row * nb + b, map_);
      }
      __syncwarp();
    }
    return at;
  }
};
#endif
