// h float32 [rows, width] = table[ids], 16-bit [vocabulary, width]; an id that is not in the table gives NaN. A block a row.
__global__ void __launch_bounds__(256, 1)
embed(const i64* ids, const u16* table, float* h, i64 vocabulary, int width) {
  let_next_kernel_start();
  wait_before_reading_x();
  const i64 id = fresh_i64(ids + blockIdx.x);
  for (int i = threadIdx.x; i < width; i += 256)
    h[(i64)blockIdx.x * width + i] = id >= 0 && id < vocabulary ? value(table[id * width + i]) : __uint_as_float(0x7fffffffu);
}
