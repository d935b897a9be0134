// The parts of a row, put together in their order: a block a row, a thread a value. Behind few_rows_common.cu and decode_step_common.cu.
// parts: as decode_attention.cu writes them. Filled in: HD, QUERIES, GROUP, SPLITS.
constexpr int ROWS = QUERIES * GROUP, THREADS = (HD + 31) / 32 * 32;
constexpr int AT_ONCE = SPLITS < 16 ? SPLITS : 16;                       // parts that are asked for before the first is there

__global__ void __launch_bounds__(THREADS)
combine(const float* parts, u16* out, i64 o_b, i64 o_h, i64 o_t, int kv_heads) {
  let_next_kernel_start();
  const int row = blockIdx.x % ROWS, head = blockIdx.x / ROWS, b = head / kv_heads, kv = head % kv_heads, d = min((int)threadIdx.x, HD - 1);
  const i64 first = (i64)head * SPLITS * ROWS + row;
  const float *own = parts + first * HD + d, *ends = parts + (i64)gridDim.x * SPLITS * HD + first * 2;
  float top = -__uint_as_float(0x7f800000u), total = 0.f, sum = 0.f;
  wait_before_reading_x();
#pragma unroll 1
  for (int s0 = 0; s0 < SPLITS; s0 += AT_ONCE) {
    float2 end[AT_ONCE]; float v[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int s = min(s0 + i, SPLITS - 1) * ROWS;
      end[i] = fresh2(ends + s * 2); v[i] = fresh(own + s * HD);
      if (SPLITS % AT_ONCE && s0 + i >= SPLITS) end[i] = make_float2(top, 0.f), v[i] = 0.f;
    }
    float most = top;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) most = larger(most, end[i].x);
    const float shrink = top == most ? 1.f : exp2_(top - most);
    total *= shrink; sum *= shrink; top = most;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const float e = end[i].x == most ? 1.f : exp2_(end[i].x - most);
      total = fmaf(e, end[i].y, total); sum = fmaf(e, v[i], sum);
    }
  }
  if (threadIdx.x < HD) out[b * o_b + (kv * GROUP + row % GROUP) * o_h + row / GROUP * o_t + d] = (u16)pack(total == 0.f ? 0.f : sum / total, 0.f);
}
