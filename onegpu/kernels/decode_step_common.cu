// What the kernels of a decoding step need beyond few_rows_common.cu, which comes before this text.
#ifndef EMULATED
// Values that the kernel before wrote: read past the L1 cache, which may hold them as they were.
DEVICE float4 fresh4(const float* p) { float4 v; asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory"); return v; }
DEVICE uint4 fresh16(const u16* p) { uint4 v; asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory"); return v; }
DEVICE float2 fresh2(const void* p) { float2 v; asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory"); return v; }
DEVICE float fresh(const float* p) { float v; asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory"); return v; }
DEVICE i64 fresh_i64(const i64* p) { i64 v; asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(v) : "l"(p) : "memory"); return v; }
// A constant that the compiler does not know, so that it stays in a register. p: in shared memory.
DEVICE u32 hidden(u32 v, const void* p) { return __shfl_sync(~0u, saddr(p) + v, threadIdx.x & 31) - shared(p); }
DEVICE float exp2_(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float shuffle_xor(float v, int o) { return __shfl_xor_sync(~0u, v, o); }
// Two 8 x 16 tiles of 16-bit values as right operands of an mma that sums over their rows.
DEVICE void transposed(u32 (&b)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(saddr(row)) : "memory");
}
// A barrier in shared memory, of 8 bytes: a phase ends when all have arrived and all bytes that were expected have come.
DEVICE void arrive_after_copies(void* b) { asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(saddr(b)) : "memory"); }
DEVICE void bulk_copy(void* to, const void* from, int bytes, void* b, u64 policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" :: "r"(saddr(to)), "l"(from), "r"(bytes), "r"(saddr(b)), "l"(policy) : "memory");
}
// All blocks of the cluster run, and barriers that were `ready` before are. Unlike cluster_sync(), orders no other memory, which takes long.
DEVICE void cluster_ready() { asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// A value into the shared memory of a block of the cluster, at the place that `p` is in this one, and counted as 4 bytes by the barrier
// at the place of `b` there, for which that block waits with `wait_for_blocks`.
DEVICE void send(float* p, int rank, float v, void* b) {
  asm volatile("{ .reg .b32 a, b; mapa.shared::cluster.u32 a, %0, %2; mapa.shared::cluster.u32 b, %1, %2;\nst.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [a], %3, [b]; }" :: "r"(saddr(p)), "r"(saddr(b)), "r"(rank), "r"(__float_as_uint(v)) : "memory");
}
DEVICE void wait_for_blocks(void* b, int parity) {
  asm volatile("{ .reg .pred p;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}" :: "r"(saddr(b)), "r"(parity) : "memory");
}
// The threads of one of the GROUPS_ of a block.
template <int GROUPS_, int THREADS_> DEVICE void meet_group(int group) {
  if (GROUPS_ == 1) __syncthreads();
  else asm volatile("bar.sync %0, %1;" :: "r"(group + 1), "n"(THREADS_) : "memory");
}
template <int THREADS_> DEVICE void meet_threads() { asm volatile("bar.sync 1, %0;" :: "n"(THREADS_) : "memory"); }
DEVICE Shared shared_of_lane(void* p) { return saddr(p); }             // for copies without a cache hint
#endif

constexpr float LOG2E = 1.4426950408889634f;
DEVICE float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += shuffle_xor(v, o);
  return v;
}
// The larger one; NaN counts as nothing, it shows up elsewhere.
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
