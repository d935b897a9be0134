// Pieces that the few-row kernels share; few_rows.py puts one kernel's text behind this and sets, as macros: FMT (0: 16-bit
// weights, 1: int8, 2: 4-bit), FP4 (the codebook), BF16 (activations and outputs; else fp16), NESTED (absmax is quantised; 2: blocks of
// 64, whole words of codes and one scale for them in every piece of a row, what few_rows.py sees to),
// TABLE_SHIFT (log2 of a table row's bytes, 7 or 8) and CL (blocks of a cluster, which share the columns).
typedef unsigned int u32; typedef unsigned short u16; typedef unsigned char u8; typedef long long i64; typedef unsigned long long u64;

#ifndef ENTRY
#define ENTRY
#endif
#ifndef WGMMA
#define WGMMA 0
#endif
#ifndef EMULATED
#define DEVICE __device__ __forceinline__
#define CONSTANT __constant__
#define SHARED(name) extern __shared__ __align__(1024) u8 name[]
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]
DEVICE float h2f(u32 h) { float f; asm("{ .reg .b16 a; cvt.u16.u32 a, %1; cvt.f32.f16 %0, a; }" : "=f"(f) : "r"(h)); return f; }
DEVICE u32 pack_h(float lo, float hi) { u32 d; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo)); return d; }
DEVICE u32 pack_b(float lo, float hi) { u32 d; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo)); return d; }
DEVICE u32 sub_h(u32 a, u32 b) { u32 d; asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE u32 add_b(u32 a, u32 b) { u32 d; asm("{ .reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 %0, %1, one, %2; }" : "=r"(d) : "r"(a), "r"(b)); return d; }
// The larger of a and |b| in each half, as bf16; NaN is the largest.
DEVICE u32 larger_b(u32 a, u32 b) { u32 d; asm("{ .reg .b32 t; abs.bf16x2 t, %2; max.NaN.bf16x2 %0, %1, t; }" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE u32 mul_b(u32 a, u32 b) { u32 d; asm("{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 %0, %1, %2, zero; }" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE u32 saddr(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// Where in shared memory a copy goes. The shuffle hides the address from ptxas, which otherwise (13.0) gives copies a uniform
// base register; with a cache hint it encodes those as an illegal instruction.
typedef u32 Shared;
DEVICE Shared shared(const void* p) { return __shfl_sync(~0u, saddr(p), threadIdx.x & 31); }
DEVICE Shared shared_of_lane(void* p) { return saddr(p); }             // for copies without a cache hint
DEVICE u64 evict_first() { u64 v; asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(v)); return v; }
// Asynchronous copies; `bytes` past the first `take` are zeros.
DEVICE void copy16(Shared dst, const void* src, int take, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" :: "r"(dst), "l"(src), "r"(take), "l"(policy) : "memory");
}
DEVICE void copy16(Shared dst, const void* src, int take) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(dst), "l"(src), "r"(take) : "memory"); }
DEVICE void copy4(Shared dst, const void* src, int take) { asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(dst), "l"(src), "r"(take) : "memory"); }
// 16 bytes past the first-level cache, zeros where not `inside`.
DEVICE uint4 read16(const void* p, bool inside, u64 policy) {
  uint4 v;
  asm volatile("{ .reg .pred p; setp.ne.s32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
               "@p ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %6; }"
               : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(p), "r"((int)inside), "l"(policy) : "memory");
  return v;
}
// Not through the read-only path, whose loads the compiler may move in front of the wait.
DEVICE uint4 read_x(const u16* p) { uint4 v; asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory"); return v; }
DEVICE u32 read1(const void* p) { u32 v; asm volatile("ld.global.u8 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
DEVICE u32 read2(const void* p) { u32 v; asm volatile("ld.global.u16 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
DEVICE float4 read16(const float* p) { float4 v; asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory"); return v; }
DEVICE float read4(const float* p) { float v; asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory"); return v; }
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void copies_left() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }
DEVICE void wait_before_reading_x() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
DEVICE void send_for(const void* p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }  // into L2: always coherent
DEVICE int cluster_rank() {
  u32 r = 0;
  if (CL > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Without a release, which is a fence for the whole GPU: to see that others are there, or have read.
DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Four sums to the same place of another block, and their bytes to its barrier `b`.
DEVICE void push4(float* p, int rank, float4 v, void* b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .b32 p, b; mapa.shared::cluster.u32 p, %0, %6; mapa.shared::cluster.u32 b, %1, %6;\n"
               "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [p], {%2, %3, %4, %5}, [b]; }"
               :: "r"(saddr(p)), "r"(saddr(b)), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(rank) : "memory");
#endif
}
DEVICE float cluster_read(const float* p, int rank) {
  float v = 0.f;
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %1, %2; ld.shared::cluster.f32 %0, [a]; }" : "=f"(v) : "r"(saddr(p)), "r"(rank) : "memory");
#endif
  return v;
}
DEVICE float4 cluster_read4(const float* p, int rank) {
  float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %4, %5; ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [a]; }"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(saddr(p)), "r"(rank) : "memory");
#endif
  return v;
}
// c[16 rows of W, 8 rows of x] += a[16, 16] b[16, 8], float32 sums.
template <int B> DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if (B) asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Hopper: c[64 rows of W, 8 NT rows of x] += a[64, 16] x[8 NT, 16]. A warp holds 16 of the 64 rows, as for mma. x: a tile of 64
// columns in shared memory, 128 bytes a row, 16-byte units swizzled (unit ^ row & 7); `step`: which 16 of the 64 columns. ADD 0: c =.
DEVICE u64 x_tile(const u8* x, int step) { return (u64)(((saddr(x) & 0x3ffff) >> 4) + 2 * step) | 1ull << 16 | 64ull << 32 | 1ull << 62; }
#define A4(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define WGMMA_TEXT(N, T, C, A, B, D) "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." T "." T " {" C "}, {" A "}, " B ", " D ", 1, 1, 0;"
template <int B, int ADD = 1> DEVICE void wgmma(float (&c)[1][4], u32 a0, u32 a1, u32 a2, u32 a3, const u8* x, int step) {
  const u64 b = x_tile(x, step);
  if (B) asm volatile(WGMMA_TEXT("8", "bf16", "%0,%1,%2,%3", "%4, %5, %6, %7", "%8", "%9") : A4(0) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(ADD));
  else asm volatile(WGMMA_TEXT("8", "f16", "%0,%1,%2,%3", "%4, %5, %6, %7", "%8", "%9") : A4(0) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(ADD));
}
template <int B, int ADD = 1> DEVICE void wgmma(float (&c)[2][4], u32 a0, u32 a1, u32 a2, u32 a3, const u8* x, int step) {
  const u64 b = x_tile(x, step);
  if (B) asm volatile(WGMMA_TEXT("16", "bf16", "%0,%1,%2,%3,%4,%5,%6,%7", "%8, %9, %10, %11", "%12", "%13") : A4(0), A4(1) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(ADD));
  else asm volatile(WGMMA_TEXT("16", "f16", "%0,%1,%2,%3,%4,%5,%6,%7", "%8, %9, %10, %11", "%12", "%13") : A4(0), A4(1) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(ADD));
}
template <int B, int ADD = 1> DEVICE void wgmma(float (&c)[4][4], u32 a0, u32 a1, u32 a2, u32 a3, const u8* x, int step) {
  const u64 b = x_tile(x, step);
  if (B) asm volatile(WGMMA_TEXT("32", "bf16", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "%16, %17, %18, %19", "%20", "%21") : A4(0), A4(1), A4(2), A4(3) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(ADD));
  else asm volatile(WGMMA_TEXT("32", "f16", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "%16, %17, %18, %19", "%20", "%21") : A4(0), A4(1), A4(2), A4(3) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(ADD));
}
template <int B, int ADD = 1> DEVICE void wgmma(float (&c)[8][4], u32 a0, u32 a1, u32 a2, u32 a3, const u8* x, int step) {
  const u64 b = x_tile(x, step);
  if (B) asm volatile(WGMMA_TEXT("64", "bf16", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31", "%32, %33, %34, %35", "%36", "%37") : A4(0), A4(1), A4(2), A4(3), A4(4), A4(5), A4(6), A4(7) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(ADD));
  else asm volatile(WGMMA_TEXT("64", "f16", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31", "%32, %33, %34, %35", "%36", "%37") : A4(0), A4(1), A4(2), A4(3), A4(4), A4(5), A4(6), A4(7) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(ADD));
}
template <int B, int ADD = 1> DEVICE void wgmma(float (&c)[16][4], u32 a0, u32 a1, u32 a2, u32 a3, const u8* x, int step) {
  const u64 b = x_tile(x, step);
  if (B) asm volatile(WGMMA_TEXT("128", "bf16", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63", "%64, %65, %66, %67", "%68", "%69") : A4(0), A4(1), A4(2), A4(3), A4(4), A4(5), A4(6), A4(7), A4(8), A4(9), A4(10), A4(11), A4(12), A4(13), A4(14), A4(15) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(ADD));
  else asm volatile(WGMMA_TEXT("128", "f16", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63", "%64, %65, %66, %67", "%68", "%69") : A4(0), A4(1), A4(2), A4(3), A4(4), A4(5), A4(6), A4(7), A4(8), A4(9), A4(10), A4(11), A4(12), A4(13), A4(14), A4(15) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(ADD));
}
DEVICE void before_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void products_left() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }
// N groups left, and `c` may be read: what the compiler does not see to change here it copies in front of the wait.
template <int N, int EIGHTS> DEVICE void sums_ready(float (&c)[EIGHTS][4]) {
  products_left<N>();
#pragma unroll
  for (int i = 0; i < EIGHTS; i++) asm volatile("" : A4(i) :: "memory");
}
// Barriers in shared memory, which count what arrives: threads, and bytes of copies by the bulk engine.
DEVICE void barrier_init(void* b, int arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(saddr(b)), "r"(arrivals) : "memory"); }
DEVICE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }   // bulk copies see them
DEVICE void arrive(void* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(saddr(b)) : "memory"); }
DEVICE void arrive_and_expect(void* b, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(saddr(b)), "r"(bytes) : "memory"); }
// Arrives when the copies that this thread has begun have come.
DEVICE void arrive_after_copies(void* b) { asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(saddr(b)) : "memory"); }
DEVICE void wait_for_pushes(void* b) {
  asm volatile("{ .reg .pred p;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], 0;\n@!p bra again;\n}" :: "r"(saddr(b)) : "memory");
}
DEVICE void wait_for(void* b, int parity) {
  asm volatile("{ .reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}" :: "r"(saddr(b)), "r"(parity) : "memory");
}
// The box of ROWS rows and 64 columns of x from column `col` on, placed as x_tile reads it; zeros outside of x.
struct alignas(64) XMap { u8 bytes[128]; };
DEVICE void copy_x(void* to, const XMap* map, int col, void* b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" :: "r"(saddr(to)), "l"(map), "r"(saddr(b)), "r"(col), "r"(0) : "memory");
}
// The box of rows of W from `row` on and of bytes from `byte` on, swizzled as x is (of 64 bytes a row: unit ^ row >> 1 & 3); zeros outside of W.
DEVICE void copy_w(void* to, const XMap* map, int byte, int row, void* b, u64 policy) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" :: "r"(saddr(to)), "l"(map), "r"(saddr(b)), "r"(byte), "r"(row), "l"(policy) : "memory");
}
DEVICE void send_for_w(const XMap* map, int byte, int row) { asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" :: "l"(map), "r"(byte), "r"(row) : "memory"); }
DEVICE void send_for_map(const XMap* map) { asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory"); }
DEVICE void copies_seen_by_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE int of_warp(int v) { return __shfl_sync(~0u, v, 0); }           // the compiler then knows that it is one value
DEVICE float of_other_lane(float v, int o) { return __shfl_xor_sync(~0u, v, o); }
DEVICE float of_lane(float v, int lane) { return __shfl_sync(~0u, v, lane); }
DEVICE float of_four(float v, int t) { return __shfl_sync(~0u, v, t, 4); }   // of lane t of these four
DEVICE int kept(int v) { return __shfl_sync(~0u, v, threadIdx.x & 31); }     // in a register: what the compiler could compute again, it does
DEVICE u32 warp_max(u32 v) { return __reduce_max_sync(~0u, v); }
DEVICE u32 max_of_8(u32 v) {                                             // of eight lanes in a row
#pragma unroll
  for (int o = 1; o < 8; o *= 2) v = max(v, __shfl_xor_sync(~0u, v, o));
  return v;
}
#endif

#ifndef EARLY
#define EARLY 0
#endif
DEVICE float lo_b(u32 v) { return __uint_as_float(v << 16); }
DEVICE float hi_b(u32 v) { return __uint_as_float(v & 0xffff0000u); }
DEVICE float value(u16 v) { return BF16 ? __uint_as_float((u32)v << 16) : h2f(v); }
DEVICE u32 pack(float lo, float hi) { return BF16 ? pack_b(lo, hi) : pack_h(lo, hi); }
// bf16 x as fp16, exactly up to a power of two a row: the largest |x| of the row (`top`, as bits) comes to lie below 2^15.
DEVICE u32 largest(uint4 q) {
  const u32 p[4] = {q.x, q.y, q.z, q.w}; u32 most = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) most = max(most, max(p[i] & 0x7fffu, p[i] >> 16 & 0x7fffu));
  return most;
}
DEVICE float x_scale(u32 top) { return __uint_as_float((u32)min(141 - (int)(top >> 7) + 127, 253) << 23); }
DEVICE float x_unscale(u32 top) { return __uint_as_float((u32)(127 - min(141 - (int)(top >> 7), 126)) << 23); }
DEVICE uint4 to_fp16(uint4 q, float scale) {
  return make_uint4(pack_h(lo_b(q.x) * scale, hi_b(q.x) * scale), pack_h(lo_b(q.y) * scale, hi_b(q.y) * scale),
                    pack_h(lo_b(q.z) * scale, hi_b(q.z) * scale), pack_h(lo_b(q.w) * scale, hi_b(q.w) * scale));
}

// The same, scaled in bf16, which a power of two leaves exact.
DEVICE u32 scaled_to_fp16(u32 v, u32 scale) { const u32 s = mul_b(v, scale); return pack_h(lo_b(s), hi_b(s)); }
DEVICE uint4 scaled_to_fp16(uint4 q, float scale) {
  const u32 two = __byte_perm(__float_as_uint(scale), 0, 0x3232);
  return make_uint4(scaled_to_fp16(q.x, two), scaled_to_fp16(q.y, two), scaled_to_fp16(q.z, two), scaled_to_fp16(q.w, two));
}

// What the epilogue adds: y = sum * row scale (int8: SCB / 127) + bias. ADDS: y is float32, and it is added to what stands there.
#ifndef ADDS
#define ADDS 0
#endif
struct Output {
  u16* y; const u16* bias; const float* row_scale; int n;
  DEVICE float2 of_row(int row) const { return make_float2(FMT == 1 ? row_scale[row] * (1.f / 127.f) : 1.f, bias ? value(bias[row]) : 0.f); }
  DEVICE float ended(float sum, float2 v) const {
    if (FMT == 1) sum *= v.x;
    if (bias) sum += v.y;
    return sum;
  }
  DEVICE void put(int m, int row, float sum, float2 v) const {
    if (ADDS) { float* h = (float*)y + (i64)m * n + row; *h = ended(sum, v) + read4(h); }
    else y[(i64)m * n + row] = (u16)pack(ended(sum, v), 0.f);
  }
  DEVICE void put(int m, int row, float sum) const { put(m, row, sum, of_row(row)); }
  // Four rows of W, of those below r1. `v`: of_row of each.
  DEVICE void put4(int m, int row, int r1, float4 sum, const float2 (&v)[4]) const {
    const float s[4] = {ended(sum.x, v[0]), ended(sum.y, v[1]), ended(sum.z, v[2]), ended(sum.w, v[3])};
    if (ADDS) {
      float* h = (float*)y + (i64)m * n + row;
      if (row + 4 <= r1 && ((row | n) & 3) == 0) { const float4 a = read16(h); *(float4*)h = make_float4(s[0] + a.x, s[1] + a.y, s[2] + a.z, s[3] + a.w); return; }
#pragma unroll
      for (int j = 0; j < 4; j++) if (row + j < r1) h[j] = s[j] + read4(h + j);
      return;
    }
    u16* to = y + (i64)m * n + row;
    if (row + 4 <= r1 && ((row | n) & 3) == 0) { *(uint2*)to = make_uint2(pack(s[0], s[1]), pack(s[2], s[3])); return; }
#pragma unroll
    for (int j = 0; j < 4; j++) if (row + j < r1) to[j] = (u16)pack(s[j], 0.f);
  }
  DEVICE void of_rows(int row, int r1, float2 (&v)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = of_row(max(min(row + j, r1 - 1), 0));
  }
  // What is read last, into L2: from memory, the end would wait for it.
  DEVICE void send_for_rows(int r0, int r1) const {
    const int row = r0 + 32 * (int)threadIdx.x;
    if (row >= r1 + 31) return;
    if (FMT == 1) send_for(row_scale + min(row, r1 - 1));
    if (bias) send_for(bias + min(row, r1 - 1));
  }
};

// The float32 scale of 64 (or 32) columns of a row. Quantised scales travel as the aligned word that holds the code.
struct Scales {
  const void* absmax; const float *nested, *map, *offset; int shift, nested_shift;
  DEVICE void fetch(Shared dst, i64 block, bool inside) const {
    i64 i = inside ? block >> shift : 0;
    const u8* p = (const u8*)absmax + (NESTED ? i : i * 4);
    copy4(dst, (const void*)((u64)p & ~3ull), inside ? 4 : 0);
  }
  // map_: the table of 256 values in shared memory.
  DEVICE float decode(u32 word, i64 block, const float* map_) const {
    i64 i = block >> shift;
    u32 at = (u32)((u64)absmax + i) & 3;
    return fmaf(map_[word >> (8 * at) & 255], nested[i >> nested_shift], *offset);
  }
  // The same with the code's own scale copied too, `far` bytes behind: read in the loop, that would be a trip to memory for each
  // few pieces. What lies outside gives the offset, and meets zeros of x.
  DEVICE void fetch_both(Shared dst, int far, u32 block, bool inside) const {
    fetch(dst, block, inside);
    if (NESTED) copy4(dst + far, nested + (inside ? block >> shift >> nested_shift : 0), inside ? 4 : 0);
  }
  DEVICE float decode(u32 word, float scale, float plus, u32 block, const float* map_) const {
    const u32 at = (u32)(u64)absmax + (block >> shift) & 3;
    return fmaf(map_[word >> (8 * at) & 255], scale, plus);
  }
  // NESTED 2: what a row has for the piece that begins with this block: the word with its codes, and their scale.
  DEVICE const void* word_of(u32 block) const { return (const u8*)absmax + (block & ~3u); }
  DEVICE const void* outer_of(u32 block) const { return nested + (block >> nested_shift); }
  DEVICE float decode_of_word(u32 word, float scale, float plus, int block_of_word, const float* map_) const { return fmaf(map_[word >> (8 * block_of_word) & 255], scale, plus); }
};
constexpr int PACKED = FMT == 2 && NESTED == 2;

// The two values of every byte, once for each lane, so that no two lanes meet in a bank: fp16 pairs.
constexpr int TABLE = FMT == 2 ? 256 << TABLE_SHIFT : 0;
CONSTANT float CODE[16] = {
#if FP4
  0.f, 0.0625f / 12, 8.f / 12, 1.f, 4.f / 12, 6.f / 12, 2.f / 12, 3.f / 12, 0.f, -0.0625f / 12, -8.f / 12, -1.f, -4.f / 12, -6.f / 12, -2.f / 12, -3.f / 12
#else
  -1.f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.f,
  0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.f
#endif
};
// `code`: the sixteen values in shared memory or constant memory. A thread's second nibble is always the same.
DEVICE void build_table_of(u8* table, const float* code, int threads) {
  const float low = code[threadIdx.x >> 3 & 15];
#pragma unroll 4
  for (int i = threadIdx.x; i < 2048; i += threads) {
    u32 p = pack_h(code[i >> 7], threads % 128 ? code[i >> 3 & 15] : low);
    *(uint4*)(table + (i >> 3 << TABLE_SHIFT) + (i & 7) * 16) = make_uint4(p, p, p, p);
  }
}
DEVICE void build_table(u8* table, int threads) {
  if (FMT != 2) return;
  SHARED_ARRAY(float, code, 16);                                         // indexed by lane: from constant memory that would be serial
  if (threadIdx.x < 16) code[threadIdx.x] = CODE[threadIdx.x];
  __syncthreads();
  build_table_of(table, code, threads);
}
// Without an array of its own in shared memory, so that what follows is aligned as wgmma wants it.
DEVICE void build_plain_table(u8* table, int threads) { build_table_of(table, CODE, threads); }
template <int B> DEVICE u32 look_up(const u8* table, u32 w, u32 lane4) {
  if (TABLE_SHIFT == 8) return *(const u32*)(table + __byte_perm(w, lane4, 0x5504 | B << 4));
  u32 at = B == 0 ? w << 7 : w >> (8 * B - 7);
  return *(const u32*)(table + (at & 0x7f80u | lane4));
}
// Two of four int8 as a pair of 16-bit floats, exactly. fp16: byte + 128 under the exponent of 1024. bf16: the low seven
// bits under that of 128, and the sign bit as -128 or -256 to add. The constants lie in registers: an instruction takes one as it
// is, not two. m: not negative, which the compiler does not know.
struct Int8Pairs {
  u32 low, high;
  DEVICE Int8Pairs(int m) { const u32 none = (u32)m >> 31; low = (BF16 ? 0x43004300u : 0x64646464u) + none; high = (BF16 ? 0xc300c300u : 0x64806480u) + none; }
  template <int H> DEVICE u32 of(u32 w) const {
    if (!BF16) return sub_h(__byte_perm(w ^ 0x80808080u, low, H ? 0x4342 : 0x4140), high);
    const u32 v = __byte_perm(w, 0, H ? 0x3322 : 0x1100);
    return add_b(v & 0x007f007fu | low, v & 0x00800080u | high);
  }
};

// Units of 16 bytes of a row of `width` bytes change places so that the eight rows of a fragment spread over the banks:
// 4-bit fragments are 8 bytes a lane (32 a row), others 16 (64 a row).
template <int WIDTH> DEVICE int swizzled(int row, int unit) {
  if (FMT == 2) return unit ^ (WIDTH == 128 ? (row & 3) << 1 : (row >> 1 & 1) << 1);
  return WIDTH == 128 ? unit ^ (row & 1) << 2 : unit;
}
