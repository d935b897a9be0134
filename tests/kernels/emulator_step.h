// Beside emulator.h: what the kernels of a decoding step use (onegpu/kernels/decode_step_*.cu).
#include "emulator.h"
inline float4 fresh4(const float* p) { float4 v; memcpy(&v, p, 16); return v; }
inline uint4 fresh16(const uint16_t* p) { if ((uint64_t)p % 16) abort(); uint4 v; memcpy(&v, p, 16); return v; }
inline float2 fresh2(const void* p) { float2 v; memcpy(&v, p, 8); return v; }
inline float fresh(const float* p) { return *p; }
inline long long fresh_i64(const long long* p) { return *p; }
inline float exp2_(float x) { return exp2f(x); }
inline uint32_t hidden(uint32_t v, const void*) { return v; }
inline float reciprocal(float x) { return 1.f / x; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float shuffle_xor(float v, int o) {
  Warp& w = warp_(); int lane = now->thread % 32;
  w.v[lane] = __float_as_uint(v); __syncwarp();
  float r = __uint_as_float(w.v[lane ^ o]);
  __syncwarp();
  return r;
}
inline void transposed(uint32_t (&b)[4], const void* row) {
  static thread_local const uint8_t* rows[256][32];                        // of up to eight blocks
  Warp& w = warp_(); int lane = now->thread % 32, at = now->block * 32 + now->thread / 32;
  if ((uint64_t)row % 16) abort();
  rows[at][lane] = (const uint8_t*)row; __syncwarp();
  for (int i = 0; i < 4; i++) {
    uint16_t lo, hi; int col = lane / 4, r = 2 * (lane % 4);
    memcpy(&lo, rows[at][8 * i + r] + 2 * col, 2); memcpy(&hi, rows[at][8 * i + r + 1] + 2 * col, 2);
    b[i] = lo | (uint32_t)hi << 16;
  }
  __syncwarp();
}
template <int THREADS_> void meet_threads() {
  static Meeting meetings[64]; meetings[now->block].expected = THREADS_;
  meet(meetings[now->block]);
}
template <int GROUPS_, int THREADS_> void meet_group(int group) {
  if (GROUPS_ == 1) { __syncthreads(); return; }
  static Meeting meetings[8]; meetings[group].expected = THREADS_;      // of one block, as an emulated grid without clusters runs them
  meet(meetings[group]);
}
inline Shared shared_of_lane(void* p) { return (Shared)p; }
inline uint32_t turned(uint32_t a) {
  Warp& w = warp_(); int g = now->thread % 32 / 4, t = now->thread % 4;
  w.v[now->thread % 32] = a; __syncwarp();
  auto at = [&](int row, int col) { return w.v[row * 4 + col / 2] >> 16 * (col % 2) & 0xffff; };
  uint32_t r = at(2 * t, g) | at(2 * t + 1, g) << 16;
  __syncwarp();
  return r;
}
inline void* there(const void* p, int rank) { return blocks[rank].smem + ((const uint8_t*)p - block().smem); }
inline void send(float* p, int rank, float v, void* b) { memcpy(there(p, rank), &v, 4); b = there(b, rank); owed_(b) -= 4; settle(b); }
inline void cluster_ready() { cluster_sync(); }
inline void wait_for_blocks(void* b, int parity) { wait_for(b, parity); }
