// Runs one CUDA kernel on the CPU, a thread of a block being a fiber: enough of CUDA for onegpu/kernels/few_rows_*.cu.
// Asynchronous copies arrive as late as the wait allows, so that a missing wait or a slot reused too early shows.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>
using std::max; using std::min;
#define EMULATED
#define DEVICE inline
#define CONSTANT static const
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
struct uint2 { uint32_t x, y; }; struct uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; }; struct float4 { float x, y, z, w; };
inline uint4 make_uint4(uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return {a, b, c, d}; }
inline uint2 make_uint2(uint32_t a, uint32_t b) { return {a, b}; }
inline float2 make_float2(float a, float b) { return {a, b}; }
inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }

struct Meeting { int expected = 0, arrived = 0; unsigned generation = 0; };
struct Copy { void* dst; const void* src; int size, take; };
struct Warp { Meeting meeting; uint32_t a[32][4], b[32][2], v[32]; };
struct Block { uint8_t* smem; std::vector<uint8_t> statics = std::vector<uint8_t>(1024 * 1024, 0xff); Meeting meeting; std::vector<Warp> warps; };
struct Fiber { ucontext_t context; std::vector<char> stack; bool ended = false; int thread, block; std::vector<std::vector<Copy>> groups{{}}; };
struct Index { int x; };
static Index threadIdx, blockIdx, gridDim;
static std::vector<Block> blocks; static std::vector<Fiber> fibers; static Meeting cluster_meeting;
static Fiber* now; static ucontext_t scheduler; static int cluster_first; static std::function<void()> body;

static void pause_() { swapcontext(&now->context, &scheduler); threadIdx.x = now->thread; blockIdx.x = cluster_first + now->block; }
static void meet(Meeting& m) {
  unsigned g = m.generation;
  if (++m.arrived == m.expected) { m.arrived = 0; m.generation++; return; }
  while (m.generation == g) pause_();
}
static Block& block() { return blocks[now->block]; }
static Warp& warp_() { return block().warps[now->thread / 32]; }
inline void __syncthreads() { meet(block().meeting); }
inline void __syncwarp() { meet(warp_().meeting); }
#define SHARED(name) uint8_t* name = block().smem
#define SHARED_ARRAY(type, name, count) type* name = (type*)(block().statics.data() + __LINE__ * 1024)
inline float __uint_as_float(uint32_t v) { float f; memcpy(&f, &v, 4); return f; }
inline uint32_t __float_as_uint(float f) { uint32_t v; memcpy(&v, &f, 4); return v; }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t s) {
  uint64_t all = (uint64_t)b << 32 | a; uint32_t r = 0;
  for (int i = 0; i < 4; i++) r |= (uint32_t)(all >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
  return r;
}
inline uint32_t atomicMax(uint32_t* p, uint32_t v) { uint32_t o = *p; *p = max(o, v); return o; }

inline float half_to_float(uint16_t h) { _Float16 f; memcpy(&f, &h, 2); return (float)f; }
inline uint16_t float_to_half(float f) { _Float16 h = (_Float16)f; uint16_t v; memcpy(&v, &h, 2); return v; }
inline uint16_t float_to_bf16(float f) { uint32_t v = __float_as_uint(f); return std::isnan(f) ? 0x7fff : (v + 0x7fff + (v >> 16 & 1)) >> 16; }
inline float bf16_to_float(uint16_t h) { return __uint_as_float((uint32_t)h << 16); }
inline float h2f(uint32_t h) { return half_to_float((uint16_t)h); }
inline uint32_t pack_h(float lo, float hi) { return float_to_half(lo) | (uint32_t)float_to_half(hi) << 16; }
inline uint32_t pack_b(float lo, float hi) { return float_to_bf16(lo) | (uint32_t)float_to_bf16(hi) << 16; }
inline uint32_t sub_h(uint32_t a, uint32_t b) { return pack_h(h2f(a) - h2f(b), h2f(a >> 16) - h2f(b >> 16)); }
inline uint32_t add_b(uint32_t a, uint32_t b) { return pack_b(bf16_to_float(a) + bf16_to_float(b), bf16_to_float(a >> 16) + bf16_to_float(b >> 16)); }
inline uint32_t larger_b(uint32_t a, uint32_t b) { b &= 0x7fff7fff; return max(a & 0xffffu, b & 0xffffu) | max(a >> 16, b >> 16) << 16; }
inline uint32_t mul_b(uint32_t a, uint32_t b) { return pack_b(bf16_to_float(a) * bf16_to_float(b), bf16_to_float(a >> 16) * bf16_to_float(b >> 16)); }
typedef uint8_t* Shared;
inline Shared shared(const void* p) { return (Shared)p; }
inline Shared shared_of_lane(void* p) { return (Shared)p; }
inline uint64_t evict_first() { return 0; }
inline void copy(void* dst, const void* src, int size, int take) {
  if ((uint64_t)dst % size || (uint64_t)src % size) abort();
  now->groups.back().push_back({dst, src, size, take});
}
inline void copy16(void* dst, const void* src, int take, uint64_t = 0) { copy(dst, src, 16, take); }
inline void copy4(void* dst, const void* src, int take) { copy(dst, src, 4, take); }
inline uint4 read16(const void* p, bool inside, uint64_t) {
  if ((uint64_t)p % 16) abort();
  return inside ? *(const uint4*)p : make_uint4(0, 0, 0, 0);
}
inline uint32_t read1(const void* p) { return *(const uint8_t*)p; }
inline uint32_t read2(const void* p) { return *(const uint16_t*)p; }
inline float read4(const float* p) { return *p; }
inline float4 read16(const float* p) { if ((uint64_t)p % 16) abort(); float4 v; memcpy(&v, p, 16); return v; }
inline uint4 read_x(const uint16_t* p) {
  if ((uint64_t)p % 16) abort();
  return *(const uint4*)p;
}
inline void commit() { now->groups.emplace_back(); }
template <int N> void copies_left() {
  while ((int)now->groups.size() - 1 > N) {
    for (auto& c : now->groups.front()) { memcpy(c.dst, c.src, c.take); memset((char*)c.dst + c.take, 0, c.size - c.take); }
    now->groups.erase(now->groups.begin());
  }
}
inline void send_for(const void*) {}
inline void wait_before_reading_x() {}
inline void let_next_kernel_start() {}
inline int cluster_rank() { return now->block; }
inline void cluster_sync() { meet(cluster_meeting); }
inline void cluster_arrive() {}
inline void cluster_wait() { meet(cluster_meeting); }
inline float cluster_read(const float* p, int rank) { return *(const float*)(blocks[rank].smem + ((const uint8_t*)p - block().smem)); }
inline float4 cluster_read4(const float* p, int rank) {
  if ((uint64_t)p % 16) abort();
  return *(const float4*)(blocks[rank].smem + ((const uint8_t*)p - block().smem));
}
inline int of_warp(int v) { return v; }
inline uint32_t warp_max(uint32_t v) {
  Warp& w = warp_(); w.v[now->thread % 32] = v; __syncwarp();
  for (uint32_t o : w.v) v = max(v, o);
  __syncwarp();
  return v;
}
inline float of_other_lane(float v, int o) {
  Warp& w = warp_(); int lane = now->thread % 32; w.v[lane] = __float_as_uint(v); __syncwarp();
  v = __uint_as_float(w.v[lane ^ o]); __syncwarp();
  return v;
}
inline float of_lane(float v, int lane) {
  Warp& w = warp_(); w.v[now->thread % 32] = __float_as_uint(v); __syncwarp();
  v = __uint_as_float(w.v[lane]); __syncwarp();
  return v;
}
inline float of_four(float v, int t) { return of_lane(v, now->thread % 32 / 4 * 4 + t); }
inline int kept(int v) { return v; }
inline uint32_t max_of_8(uint32_t v) {
  Warp& w = warp_(); int lane = now->thread % 32; w.v[lane] = v; __syncwarp();
  for (int i = 0; i < 8; i++) v = max(v, w.v[lane / 8 * 8 + i]);
  __syncwarp();
  return v;
}
template <int B> void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  Warp& w = warp_(); int lane = now->thread % 32, g = lane / 4, t = lane % 4;
  uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  memcpy(w.a[lane], a, 16); memcpy(w.b[lane], b, 8); __syncwarp();
  auto at = [](uint32_t v, int half) { uint16_t h = v >> 16 * half; return B ? bf16_to_float(h) : half_to_float(h); };
  for (int i = 0; i < 4; i++) {
    int row = g + i / 2 * 8, col = 2 * t + i % 2;
    for (int k = 0; k < 16; k++) c[i] += at(w.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) * at(w.b[col * 4 + k % 8 / 2][k / 8], k % 2);
  }
  __syncwarp();
}
// A warp's part of wgmma: x as the hardware finds it, in tiles of 128 bytes a row with swizzled units.
template <int B, int ADD = 1, int EIGHTS> void wgmma(float (&c)[EIGHTS][4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, const uint8_t* x, int step) {
  if ((uint64_t)x % 1024) abort();
  int lane = now->thread % 32, g = lane / 4, t = lane % 4;
  for (int i = 0; i < EIGHTS; i++) {
    if (!ADD) c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0.f;
    uint32_t b[2];
    for (int h = 0; h < 2; h++) memcpy(&b[h], x + (8 * i + g) * 128 + ((2 * step + h) ^ g) * 16 + 4 * t, 4);
    mma<B>(c[i], a0, a1, a2, a3, b[0], b[1]);
  }
}
inline void before_products() {}
inline void close_products() {}
template <int N> void products_left() {}
template <int N, int EIGHTS> void sums_ready(float (&)[EIGHTS][4]) {}
inline void copies_seen_by_wgmma() {}
// Barriers: bulk copies arrive when somebody waits for them. Their state is in the 8 bytes themselves.
struct Barrier { uint16_t expected, left; uint8_t phase, ready; int16_t kilo; };
static_assert(sizeof(Barrier) == 8);
struct Bulk { void* to; const void* from; int bytes; void* barrier; };
static std::vector<Bulk> bulks; static std::vector<std::pair<void*, long>> owed;
inline Barrier* at_(void* b) { if ((uint64_t)b % 8) abort(); return (Barrier*)b; }
inline long& owed_(void* b) { for (auto& o : owed) if (o.first == b) return o.second; owed.push_back({b, 0}); return owed.back().second; }
inline void settle(void* b) {
  Barrier* x = at_(b);
  if (x->left == 0 && owed_(b) == 0) { x->phase ^= 1; x->left = x->expected; }
}
inline void barrier_init(void* b, int arrivals) { *at_(b) = {(uint16_t)arrivals, (uint16_t)arrivals, 0, 1, 0}; owed_(b) = 0; }
inline void barriers_ready() {}
inline void arrive(void* b) { Barrier* x = at_(b); if (x->left == 0 || x->ready != 1) abort(); x->left--; settle(b); }
inline void arrive_and_expect(void* b, int bytes) { owed_(b) += bytes; arrive(b); }
inline void arrive_after_copies(void* b) {
  commit(); copies_left<0>(); arrive(b);
}
inline void bulk_copy(void* to, const void* from, int bytes, void* b, uint64_t = 0) {
  if ((uint64_t)to % 16 || (uint64_t)from % 16 || bytes % 16 || bytes <= 0) abort();
  bulks.push_back({to, from, bytes, b});
}
inline void wait_for(void* b, int parity) {
  for (int turns = 0; at_(b)->phase == (parity & 1); turns++) {
    if (turns > 100000) abort();
    for (size_t i = 0; i < bulks.size();) {
      if (bulks[i].barrier != b) { i++; continue; }
      Bulk c = bulks[i]; bulks.erase(bulks.begin() + i);
      memcpy(c.to, c.from, c.bytes); owed_(b) -= c.bytes;
    }
    settle(b);
    if (at_(b)->phase == (parity & 1)) pause_();
  }
}
inline void push4(float* p, int rank, float4 v, void* b) {
  auto there = [&](void* q) { return blocks[rank].smem + ((uint8_t*)q - block().smem); };
  if ((uint64_t)p % 16) abort();
  *(float4*)there(p) = v; owed_(there(b)) -= 16; settle(there(b));
}
inline void wait_for_pushes(void* b) { wait_for(b, 0); }
struct XMap { const uint16_t* x; int rows, m, k, width; };
inline void copy_x(uint8_t* to, const XMap* map, int col, void* b) {
  static const uint16_t zeros[8] = {};
  for (int row = 0; row < map->rows; row++)
    for (int unit = 0; unit < 8; unit++) {
      int at = col + unit * 8;
      bulks.push_back({to + row * 128 + ((unit ^ row) & 7) * 16, row < map->m && at < map->k ? map->x + (int64_t)row * map->k + at : zeros, 16, b});
    }
}
// Of rows of `k` bytes, in boxes of 128 bytes or of 64, swizzled as the hardware does.
inline void copy_w(uint8_t* to, const XMap* map, int byte, int row0, void* b, uint64_t) {
  static const uint16_t zeros[8] = {};
  for (int row = 0; row < map->rows; row++)
    for (int unit = 0; unit < map->width / 16; unit++) {
      const int at = byte + unit * 16, other = map->width == 128 ? (unit ^ row) & 7 : (unit ^ row >> 1) & 3;
      bulks.push_back({to + row * map->width + other * 16, row0 + row < map->m && at < map->k ? (const uint8_t*)map->x + (int64_t)(row0 + row) * map->k + at : (const uint8_t*)zeros, 16, b});
    }
}
inline void send_for_map(const XMap*) {}
inline void send_for_w(const XMap*, int, int) {}
static void run_grid(int grid, int threads, int cluster, size_t smem_bytes, std::function<void()> f) {
  body = f; gridDim.x = grid;
  for (cluster_first = 0; cluster_first < grid; cluster_first += cluster) {
    blocks.clear(); blocks.resize(cluster); fibers.clear(); fibers.resize(cluster * threads);
    cluster_meeting = {cluster * threads};
    for (auto& b : blocks) {
      b.smem = (uint8_t*)aligned_alloc(1024, (smem_bytes + 1023) / 1024 * 1024); memset(b.smem, 0xff, smem_bytes);
      b.meeting.expected = threads; b.warps.resize(threads / 32);
      for (auto& w : b.warps) w.meeting.expected = 32;
    }
    for (int i = 0; i < cluster * threads; i++) {
      Fiber& f = fibers[i]; f.thread = i % threads; f.block = i / threads; f.stack.resize(65536);
      getcontext(&f.context); f.context.uc_stack.ss_sp = f.stack.data(); f.context.uc_stack.ss_size = f.stack.size(); f.context.uc_link = &scheduler;
      makecontext(&f.context, (void (*)())+[] { body(); now->ended = true; }, 0);
    }
    for (int left = cluster * threads; left;) {
      left = 0;
      for (auto& f : fibers) {
        if (f.ended) continue;
        now = &f; threadIdx.x = f.thread; blockIdx.x = cluster_first + f.block;
        swapcontext(&scheduler, &f.context); left += !f.ended;
      }
    }
    for (auto& b : blocks) free(b.smem);
  }
}
