// Few rows of x, held whole in shared memory: y = x W^T for up to MP (1, 2, 4 or 8) rows.
//
// A cluster takes a range of whole rows of W, in tiles of 16; its CL blocks split the columns. Within a block, the pieces
// (16 rows, CB bytes of each) of its tiles go round the warps. Each warp streams its own pieces through a ring of its
// own, without a barrier, and multiplies with the weights as the 16-row operand: the contraction runs in whatever order the
// stored bytes have, x is read to match. Sums of the warps meet in shared memory after every TG tiles, in fixed order.
//
// 4-bit: looked-up fp16 pairs are the operand, the sum over each 64 columns is scaled in float32. bf16 x becomes fp16,
// exactly up to a factor: each row is scaled by a power of two (its largest value below 2^15; sums are float32).
// Filled in: MP, WARPS, TG, and those of Ring.
constexpr int THREADS = WARPS * 32;
constexpr int SUMS = TG * WARPS * 16 * MP;                              // of the warps, in floats
static_assert(!PACKED, "others have kernels for them");
constexpr int TO_FP16 = FMT == 2 && BF16, MMA_BF16 = BF16 && FMT != 2;

ENTRY __global__ void __launch_bounds__(THREADS, 1)
few_rows(const u8* __restrict__ w, const u16* __restrict__ x, u16* __restrict__ y, const u16* __restrict__ bias,
         const void* __restrict__ absmax, const float* __restrict__ nested, const float* __restrict__ map,
         const float* __restrict__ offset, int m, int n, int k, int shift, int nested_shift) {
  SHARED(smem);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3, rank = cluster_rank();
  const int cluster = blockIdx.x / CL, clusters = gridDim.x / CL;
  const int r0 = (int)((i64)n * cluster / clusters), r1 = (int)((i64)n * (cluster + 1) / clusters);
  const int tiles = (r1 - r0 + 15) / 16, all = (k + KB - 1) / KB, share = (all + CL - 1) / CL;
  const int p0 = rank * share, pieces = max(min(share, all - p0), 0);  // of this block
  const int pitch = (share * KB * 2 + 127) / 128 * 128 + (FMT == 0 ? 64 : 16), nb = k / 64;
  const int row_bytes = FMT == 0 ? 2 * k : FMT == 1 ? k : k / 2;
  u8* table = smem;
  float* map_ = (float*)(smem + TABLE);
  u8* xs = smem + TABLE + (NESTED ? 1024 : 0);
  float* red = (float*)(xs + MP * pitch);
  u8* ring = (u8*)(red + SUMS) + warp * SLOTS * SLOT;
  float* part = (float*)(ring + (WARPS - warp) * SLOTS * SLOT);          // CL > 1: sums of this block, [tiles, 16, MP]
  SHARED_ARRAY(u32, top, 16);                                            // largest |x| of each row, as bits
  const Scales scales = {absmax, nested, map, offset, shift, nested_shift};
  const Output out = {y, bias, (const float*)absmax, n};
  const u64 policy = evict_first();

  const Walk<WARPS> start = {pieces ? warp / pieces : tiles, pieces ? warp % pieces : 0, pieces}; Walk<WARPS> here = start;
  Ring<WARPS> stream = {w, ring, scales, r0, 16, r1, tiles, p0, row_bytes, nb, policy};
  stream.open(start);

  let_next_kernel_start();
  out.send_for_rows(r0, r1);
  if (EARLY) stream.begin_early(); else stream.fill();
  if (threadIdx.x < 16) top[threadIdx.x] = 0;
  build_table(table, THREADS);
  wait_before_reading_x();
  Values<THREADS> values; values.fetch(map);
  const float plus = NESTED ? *offset : 0.f;
  hold_x<MP, WARPS, TO_FP16>(x, top, m, k, p0 * KB, share * KB / 8, [&](int r, int v) { return xs + r * pitch + v * 16; }, [&]() { if (EARLY) stream.fill(); });
  if (NESTED) { values.put(map_); __syncthreads(); }

  const u32 lane4 = lane * 4;
  const Int8Pairs pairs(m);
  const u8* x_lane = xs + g % MP * pitch + t * (GROUP / 2);
  float acc[4] = {0.f, 0.f, 0.f, 0.f};
  for (int q0 = 0; q0 < tiles; q0 += TG) {
    const int q1 = min(q0 + TG, tiles); int done = q0;
    auto flush = [&](int upto) {
      for (; done < upto; done++) {
        const int first = ((done - q0) * WARPS + warp) * 16 * MP;
        if (MP == 1) { if (t == 0) { red[first + g] = acc[0]; red[first + g + 8] = acc[2]; } }
        else if (2 * t < MP) {
          *(float2*)(red + first + g * MP + 2 * t) = make_float2(acc[0], acc[1]);
          *(float2*)(red + first + (g + 8) * MP + 2 * t) = make_float2(acc[2], acc[3]);
        }
        acc[0] = acc[1] = acc[2] = acc[3] = 0.f;
      }
    };
    while (here.tile < q1) {
      const int tile = here.tile, piece = here.piece;
      flush(tile);
      const u8* slot = stream.next(tile, piece, plus, map_);
      float s0[SCALES + 1], s1[SCALES + 1];
#pragma unroll
      for (int b = 0; b < SCALES; b++) { s0[b] = ((const float*)(slot + PIECE))[g * SCALES + b]; s1[b] = ((const float*)(slot + PIECE))[(g + 8) * SCALES + b]; }
#pragma unroll
      for (int b = 0; b < GROUPS; b++) {
        const uint4* xp = (const uint4*)(x_lane + (piece * KB + b * GROUP) * 2);
        const uint4 x0 = xp[0], x1 = FMT != 0 ? xp[1] : make_uint4(0, 0, 0, 0);
        const u32 xa[8] = {x0.x, x0.y, x0.z, x0.w, x1.x, x1.y, x1.z, x1.w};
        if (FMT == 2) {
          const u8* p = slot + swizzled<CB>(g, b * 2 + (t >> 1)) * 16 + (t & 1) * 8;
          const uint2 u = *(const uint2*)(p + g * CB), v = *(const uint2*)(p + (g + 8) * CB);
          float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const u32 a = h ? u.y : u.x, d = h ? v.y : v.x;
            const u32 a0 = look_up<0>(table, a, lane4), a1 = look_up<1>(table, a, lane4), a2 = look_up<2>(table, a, lane4), a3 = look_up<3>(table, a, lane4);
            const u32 d0 = look_up<0>(table, d, lane4), d1 = look_up<1>(table, d, lane4), d2 = look_up<2>(table, d, lane4), d3 = look_up<3>(table, d, lane4);
            mma<0>(c, a0, d0, a1, d1, xa[4 * h], xa[4 * h + 1]);
            mma<0>(c, a2, d2, a3, d3, xa[4 * h + 2], xa[4 * h + 3]);
          }
          acc[0] = fmaf(c[0], s0[b], acc[0]); acc[1] = fmaf(c[1], s0[b], acc[1]);
          acc[2] = fmaf(c[2], s1[b], acc[2]); acc[3] = fmaf(c[3], s1[b], acc[3]);
        } else {
          const u8* p = slot + swizzled<CB>(g, b * 4 + t) * 16;
          const uint4 u = *(const uint4*)(p + g * CB), v = *(const uint4*)(p + (g + 8) * CB);
          const u32 a[4] = {u.x, u.y, u.z, u.w}, d[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int s = 0; s < (FMT == 0 ? 2 : 4); s++) {
            if (FMT == 0) mma<MMA_BF16>(acc, a[2 * s], d[2 * s], a[2 * s + 1], d[2 * s + 1], xa[2 * s], xa[2 * s + 1]);
            else mma<MMA_BF16>(acc, pairs.of<0>(a[s]), pairs.of<0>(d[s]), pairs.of<1>(a[s]), pairs.of<1>(d[s]), xa[2 * s], xa[2 * s + 1]);
          }
        }
      }
      __syncwarp();
      here.next();
    }
    flush(q1);
    __syncthreads();
    for (int i = threadIdx.x; i < (q1 - q0) * 16 * MP; i += THREADS) {
      const int row = r0 + q0 * 16 + i / MP, r = i % MP, first = i / (16 * MP) * WARPS * 16 * MP + i % (16 * MP);
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < WARPS; j++) sum += red[first + j * 16 * MP];
      if (TO_FP16) sum *= x_unscale(top[r]);
      if (CL > 1) part[q0 * 16 * MP + i] = sum;
      else if (r < m && row < r1) out.put(r, row, sum);
    }
    if (q1 < tiles) __syncthreads();
  }
  copies_left<0>();
  if (CL > 1) {
    cluster_sync();
    for (int i = threadIdx.x + rank * THREADS; i < tiles * 16 * MP; i += CL * THREADS) {
      const int row = r0 + i / MP, r = i % MP; float sum = 0.f;
#pragma unroll
      for (int j = 0; j < CL; j++) sum += cluster_read(part + i, j);
      if (r < m && row < r1) out.put(r, row, sum);
    }
    cluster_sync();                                                      // no block ends while another reads its sums
  }
}
