// h float32 [rows, width] = norm(table[ids] * scale + places[position + offset]), of 16-bit [vocabulary, width] and [spots, width].
// Either table may be missing. An index that is not in its table gives NaN. NORM: 0 none, 1 RMSNorm, 2 LayerNorm. A block a row.
DEVICE float block_sum(float v, float* sums) {
  v = warp_sum(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = v;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < 8; w++) sum += sums[w];
  return sum;
}

__global__ void __launch_bounds__(256, 1)
embed(const i64* ids, const u16* table, const i64* position, const u16* places, const u16* gain, const u16* bias, float* h, i64 vocabulary,
      i64 spots, int width, int position_step, int offset, float scale, float eps, float one) {
  SHARED_ARRAY(float, sums, 8);
  wait_before_reading_x();
  let_next_kernel_start();                                               // later kernels read, before they wait, what the step before wrote
  const float nan = __uint_as_float(0x7fffffffu); const int thread = threadIdx.x;
  const i64 id = table ? fresh_i64(ids + blockIdx.x) : 0, at = places ? fresh_i64(position + (i64)blockIdx.x * position_step) + offset : 0;
  float* row = h + (i64)blockIdx.x * width; float sum = 0.f;
  for (int i = thread; i < width; i += 256) {
    float v = 0.f;
    if (table) v = id >= 0 && id < vocabulary ? value(table[id * width + i]) * scale : nan;
    if (places) v += at >= 0 && at < spots ? value(places[at * width + i]) : nan;
    row[i] = v; sum += v;
  }
  if (NORM == 0) return;
  const float mean = NORM == 2 ? block_sum(sum, sums) / width : 0.f; float squares = 0.f;
  for (int i = thread; i < width; i += 256) { float v = row[i] - mean; squares = fmaf(v, v, squares); }
  const float factor = rsqrtf(block_sum(squares, sums) / width + eps);
  for (int i = thread; i < width; i += 256) row[i] = fmaf((row[i] - mean) * factor, (gain ? value(gain[i]) : 1.f) + one, bias ? value(bias[i]) : 0.f);
}
