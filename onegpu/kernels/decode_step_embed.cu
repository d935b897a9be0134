// h float32 [rows, width] = norm(table[ids] * scale + places[position + offset]), of 16-bit [vocabulary, width] and [spots, width].
// Either table may be missing. An index that is not in its table gives NaN. NORM: 0 none, 1 RMSNorm, 2 LayerNorm. A block a row.
DEVICE float block_sum(float v, float* sums) {
  v = warp_sum(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = v;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < 16; w++) sum += sums[w];
  return sum;
}

__global__ void __launch_bounds__(512, 1)
embed(const i64* ids, const u16* table, const i64* position, const u16* places, const u16* gain, const u16* bias, float* h, i64 vocabulary,
      i64 spots, int width, int position_step, int offset, float scale, float eps, float one) {
  SHARED_ARRAY(float, sums, 16);
  wait_before_reading_x();
  let_next_kernel_start();                                               // later kernels read, before they wait, what the step before wrote
  const float nan = __uint_as_float(0x7fffffffu); const int thread = threadIdx.x;
  const i64 id = table ? fresh_i64(ids + blockIdx.x) : 0, at = places ? fresh_i64(position + (i64)blockIdx.x * position_step) + offset : 0;
  float* row = h + (i64)blockIdx.x * width; float sum = 0.f;
  const bool known = table && id >= 0 && id < vocabulary, placed = places && at >= 0 && at < spots;
  const float none = (table && !known) || (places && !placed) ? nan : 0.f;
  // Eight values a read where rows allow it: reading is all the time that this takes, and one wave of it is half of two.
  const int step = width % 8 || (((u64)table | (u64)places) & 15) ? 1 : 8; const u64 policy = evict_first();
  for (int i = step * thread; i < width; i += step * 512) {
    uint4 t = make_uint4(0, 0, 0, 0), p = t;
    if (step == 8) {
      t = read16(table + (known ? id : 0) * width + i, known, policy); p = read16(places + (placed ? at : 0) * width + i, placed, policy);
    } else {
      if (known) t.x = table[id * width + i];
      if (placed) p.x = places[at * width + i];
    }
    const u32 a[4] = {t.x, t.y, t.z, t.w}, b[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (j >= step) break;
      const float v = none + value((u16)(a[j / 2] >> j % 2 * 16)) * scale + value((u16)(b[j / 2] >> j % 2 * 16));
      row[i + j] = v; sum += v;
    }
  }
  if (NORM == 0) return;
  const float mean = NORM == 2 ? block_sum(sum, sums) / width : 0.f; float squares = 0.f;
  for (int i = thread; i < width; i += 512) { float v = row[i] - mean; squares = fmaf(v, v, squares); }
  const float factor = rsqrtf(block_sum(squares, sums) / width + eps);
  for (int i = thread; i < width; i += 512) row[i] = fmaf((row[i] - mean) * factor, (gain ? value(gain[i]) : 1.f) + one, bias ? value(bias[i]) : 0.f);
}
