// decode_step_product.cu for 16-bit weights that are stored [K, N] (GPT-2's): x, the sums and SINK 0, 1 and 3 as there, of one part.
//
// A block takes strips of 32 columns of W and all of its rows, 16 of them (a chunk) a warp at a time. A lane reads four columns of
// four rows, so that a warp reads whole sectors, and turns them into the 16-row operand of the mma in registers: which four rows of
// a chunk a lane takes is free, as x is read in the same order. The first chunks of W are read before the kernel waits for the one
// in front of it. Sums of the warps are added in their order.
constexpr int STRIP = 32, HELD = 4, CHUNKS = K / 16;                     // HELD: chunks in a thread's registers
constexpr int BATCHES = ((CHUNKS + WARPS - 1) / WARPS + HELD - 1) / HELD;
constexpr int EIGHTS = (M + 7) / 8;
static_assert(K % 64 == 0 && K == SHARE, "all of a row, a multiple of 64");
static_assert(STRIP * M <= THREADS, "a thread finishes one sum");

struct Held { uint2 rows[HELD][4]; };

__global__ void __launch_bounds__(THREADS, 1)
transposed_product(const u16* w, const u16* bias, const u16* gain, const u16* norm_bias, const u16* outer_gain, const u16* outer_bias,
                   const void* in, const float2* ml, const float* added, float* stream, void* out, int n,
                   float eps, float one, float outer_eps, float outer_one) {
  SHARED(smem);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, strips = n / STRIP;
  u8* xs = smem;
  float* red = (float*)(xs + M * PITCH);
  float* shares = red + WARPS * STRIP * M;
  float* unscale = shares + SHARES;
  auto read = [&](Held& held, int strip, int batch) {
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      const int chunk = warp + (batch * HELD + i) * WARPS;
#pragma unroll
      for (int r = 0; r < 4; r++) {
        float2 v = make_float2(0.f, 0.f);
        if (strip < strips && chunk < CHUNKS) v = fresh2(w + (i64)(16 * chunk + 4 * t + r) * n + strip * STRIP + 4 * g);
        held.rows[i][r] = make_uint2(__float_as_uint(v.x), __float_as_uint(v.y));
      }
    }
  };

  // ---- what does not depend on the kernels before
  let_next_kernel_start();
  Held held;
  read(held, blockIdx.x, 0);
  Input x;
  x.prepare(gain, norm_bias, outer_gain, outer_bias, shares);

  wait_before_reading_x();

  x.load(in, ml, added, stream, eps, one, outer_eps, outer_one, xs, shares, unscale);
  __syncthreads();

  for (int strip = blockIdx.x; strip < strips; strip += gridDim.x) {
    float acc[2][EIGHTS][4] = {};
    for (int batch = 0; batch < BATCHES; batch++) {
      Held next;
      if (batch + 1 < BATCHES) read(next, strip, batch + 1);
      else read(next, strip + gridDim.x, 0);
#pragma unroll
      for (int i = 0; i < HELD; i++) {
        const int chunk = warp + (batch * HELD + i) * WARPS;
        if (chunk >= CHUNKS) break;
        const uint2 *w0 = &held.rows[i][0], *w1 = &held.rows[i][1], *w2 = &held.rows[i][2], *w3 = &held.rows[i][3];
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
          const uint2 xv = *(const uint2*)(xs + (8 * e + g) % M * PITCH + 2 * (16 * chunk + 4 * t));
          mma<BF16>(acc[0][e], __byte_perm(w0->x, w1->x, 0x5410), __byte_perm(w0->x, w1->x, 0x7632), __byte_perm(w2->x, w3->x, 0x5410), __byte_perm(w2->x, w3->x, 0x7632), xv.x, xv.y);
          mma<BF16>(acc[1][e], __byte_perm(w0->y, w1->y, 0x5410), __byte_perm(w0->y, w1->y, 0x7632), __byte_perm(w2->y, w3->y, 0x5410), __byte_perm(w2->y, w3->y, 0x7632), xv.x, xv.y);
        }
      }
      held = next;
    }
#pragma unroll
    for (int pair = 0; pair < 2; pair++)                                 // columns 4 g + 2 pair and the one behind it
#pragma unroll
      for (int e = 0; e < EIGHTS; e++) {
        const int m = 8 * e + 2 * t; float *s = red + (warp * STRIP + 4 * g + 2 * pair) * M, *a = acc[pair][e];
        if (m < M) { s[m] = a[0]; s[M + m] = a[2]; }
        if (m + 1 < M) { s[m + 1] = a[1]; s[M + m + 1] = a[3]; }
      }
    __syncthreads();
    if (threadIdx.x < STRIP * M) {
      const int column = strip * STRIP + threadIdx.x / M, m = threadIdx.x % M; const i64 where = (i64)m * n + column; float sum = 0.f;
#pragma unroll
      for (int i = 0; i < WARPS; i++) sum += red[i * STRIP * M + threadIdx.x];
      if (bias) sum += value(bias[column]);
      if (SINK == 3) ((u16*)out)[where] = (u16)pack(activated(sum), 0.f);
      else ((float*)out)[where] = SINK == 1 ? sum + fresh((const float*)out + where) : sum;
    }
    __syncthreads();                                                     // before the next strip's sums
  }
}
