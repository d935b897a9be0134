// One to eight rows of x, 4-bit weights: y = x W^T. x stays in the registers.
//
// Each warp streams its own pieces of W through a ring of its own, without a barrier, and multiplies with the weights as the 16-row operand.
// mma has eight columns for MP (2, 4 or 8) rows of x, so the operand's 16 rows are SECT = 8 / MP sections, of 256 columns each, of R = 16 / SECT rows
// of W: column j of the other operand has section j % SECT of row j / SECT of x, and of a row's sums those in the columns of its section
// count. A piece, R rows of SECT * 128 bytes, then takes the same instructions and registers for any MP. The pieces of a row divide the number of
// warps: a warp always has the same columns, its lanes hold x there as operands, and the loop reads weights alone. Where x has more columns than warps
// hold, a cluster's CL blocks share them, which also brings less of x to each. bf16 becomes fp16, each row of x scaled by the largest of the
// warp's own columns, so that no warp waits for another. Each piece has a place of its own for its sums, which meet once, at the end, in
// the order of the pieces; of a cluster's blocks each then finishes some of the rows of W, and the others send it theirs.
// Filled in: MP, WARPS, DEPTH (pieces in the ring of each), BLOCKS and EARLY (as in few_rows_direct.cu), OVER (1: the table has not
// room for all sums), LATE (pieces that a warp has left when the next kernel may start. Sooner, that one's table and what it sends for
// compete with the copies here; so late, they come when memory falls idle).
constexpr int SECT = 8 / MP, R = 16 / SECT, SUMS = R * MP, FOUR = MP == 2 ? 2 : 1;   // SUMS: of a piece. FOUR: rows of W that have four
constexpr int THREADS = WARPS * 32, CB = 128, KB = 256 * SECT, PIECE = 2048, SLOT = PIECE + 256;
constexpr int UNITS = 8 * SECT, AT_ONCE = 32 / UNITS;                  // of 16 bytes in a row of a piece; rows that a warp copies at once
constexpr int IN_TABLE = 8192;                                         // sums that lie in what the table leaves free
static_assert((MP == 2 || MP == 4 || MP == 8) && TABLE_SHIFT == 8, "others have no kernel here");

// Of blocks `at` and `at` + 1 (`both`: the row has it) quantised scales: codes, and the scales of these.
struct Codes {
  u32 codes; float outer0, outer1;
  DEVICE void read(const Scales& s, u32 at, bool both) {
    const u32 i = at >> s.shift, j = at + both >> s.shift; const u8* code = (const u8*)s.absmax;
    if (PACKED) { codes = read2(code + at); outer0 = read4(s.nested + (at >> s.nested_shift)); return; }
    codes = read1(code + i) | read1(code + j) << 8;
    outer0 = read4(s.nested + (i >> s.nested_shift)); outer1 = read4(s.nested + (j >> s.nested_shift));
  }
  DEVICE float2 decode(const Scales& s, float plus, const float* map_) const {
    return make_float2(s.decode_of_word(codes, outer0, plus, 0, map_), s.decode_of_word(codes, PACKED ? outer0 : outer1, plus, 1, map_));
  }
};

ENTRY __global__ void __launch_bounds__(THREADS, BLOCKS)
few_rows(const u8* __restrict__ w, const u16* __restrict__ x, u16* __restrict__ y, const u16* __restrict__ bias,
         const void* __restrict__ absmax, const float* __restrict__ nested, const float* __restrict__ map,
         const float* __restrict__ offset, int m, int n, int k, int shift, int nested_shift) {
  SHARED(smem);
  SHARED_ARRAY(int, row0, 1);                                            // for the end; in the loop it spares a register
  const int lane = threadIdx.x & 31, warp = of_warp(threadIdx.x >> 5), g = lane >> 2, t = lane & 3, rank = cluster_rank();
  const int clusters = (int)gridDim.x / CL, cluster = (int)blockIdx.x / CL;
  const int share = n / clusters, more = n % clusters;                   // the first `more` clusters have a row more
  const int r0 = cluster * share + min(cluster, more), rows = share + (cluster < more ? 1 : 0);
  const int pieces = ((k + KB - 1) / KB + CL - 1) / CL, row_bytes = k / 2, nb = k / 64;
  const int first = warp / pieces, piece = rank * pieces + warp % pieces, step = WARPS / pieces;   // of a warp: its first tile, its columns, tiles to the next
  u8* table = smem;
  if (threadIdx.x == 0) row0[0] = r0;
  float* map_ = (float*)(smem + TABLE);
  u8* rings = (u8*)(map_ + (NESTED ? 256 : 0)); u8* ring = rings + warp * DEPTH * SLOT;
  const int own = (rows + CL * FOUR - 1) / (CL * FOUR) * FOUR;           // rows that a block of the cluster finishes; the last one what is left
  u8* pushes = rings + WARPS * DEPTH * SLOT;                             // CL > 1: a barrier, which counts the sums that the other blocks send
  float* sent = (float*)(pushes + (CL > 1 ? 16 : 0));                // CL > 1: what the blocks have summed of those, [CL, own, MP]
  float* over = sent + (CL > 1 ? CL * own * MP : 0);                     // sums for which the table has no room
  auto sum_at = [&](int i) { return OVER && i >= IN_TABLE ? over + (i - IN_TABLE) : (float*)(table + (i >> 5) * 256 + 128) + (i & 31); };
  const Scales scales = {absmax, nested, map, offset, shift, nested_shift};
  const Output out = {y, bias, (const float*)absmax, n};
  const u64 policy = evict_first();

  // Section s of row r of a piece is row s * R + r of the operand. A lane copies the same unit of rows AT_ONCE apart.
  const int unit = lane % UNITS, row_of = lane / UNITS, to_row = unit / 8 * R + row_of, at_byte = piece * (CB * SECT) + unit * 16;
  const Shared base = shared(ring + to_row * CB + swizzled<CB>(to_row, unit % 8) * 16), slot_end = base + (DEPTH - 1) * SLOT;
  const u8* w0 = w + (i64)(r0 + row_of) * row_bytes + at_byte;
  const int rows_left = at_byte < row_bytes ? rows - row_of : 0;
  // And of scales two: one, with another some rows on; of quantised ones two side by side.
  constexpr int IN_ROW = 4 * SECT;
  const int scale_row = NESTED ? lane / 2 % R : lane / IN_ROW % R, in_piece = NESTED ? lane / 2 / R * 4 + lane % 2 * 2 : lane % IN_ROW;
  const int block0 = (r0 + scale_row) * nb + piece * 4 * SECT + in_piece, scales_left = piece * 4 * SECT + in_piece < nb ? rows - scale_row : 0;
  const Shared scales_base = shared(ring + PIECE + ((in_piece / 4 * R + scale_row) * 4 + in_piece % 4) * 4);
  Shared slot = base; const int stride = step * R;
  // Codes come to registers, a piece ahead of the weights; before the products of the piece in front each lane makes its two scales
  // and puts them where plain ones are copied to. Columns past the end have the offset, and meet zeros of x.
  const bool both = piece * 4 * SECT + in_piece + 1 < nb;
  Codes next = {}, filled[DEPTH - 1];
  auto read_scales = [&](int ahead) {
    if (NESTED && scales_left > ahead) next.read(scales, block0 + ahead * nb, both);
  };
  auto fetch = [&](int ahead) {                                          // from that row on
    if (ahead < rows) {
      const u8* from = w0 + (u32)(ahead * row_bytes);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int down = j * AT_ONCE, take = rows_left - ahead > down ? 16 : 0;
        copy16((Shared)((u64)slot ^ (u64)((down & 3) << 5)) + down * CB, take ? from + (i64)down * row_bytes : w, take, policy);
      }
      if (!NESTED) {
        const Shared behind = scales_base + (int)(slot - base);
        const bool inside = scales_left > ahead; const u32 b = inside ? block0 + ahead * nb : 0;
        constexpr int DOWN = 8 / SECT; const bool too = scales_left - DOWN > ahead;
        copy4(behind, (const float*)absmax + (b >> shift), inside ? 4 : 0);
        copy4(behind + DOWN * 16, (const float*)absmax + (too ? b + DOWN * nb >> shift : 0), too ? 4 : 0);
      }
    }
    slot = slot == slot_end ? base : slot + SLOT;
    commit();
  };
  auto fill = [&]() {
    read_scales(first * R);
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) { filled[i] = next; fetch(first * R + i * stride); read_scales(first * R + (i + 1) * stride); }
  };

  out.send_for_rows(r0, r0 + rows);
  for (int i = 0; i < EARLY; i++) {                                      // may not read weights yet, but may send for them
    const int row = (first + i * step) * R + lane / SECT, at = piece * (CB * SECT) + lane % SECT * CB;
    if (lane < 16 && row < rows && at < row_bytes) send_for(w + (i64)(r0 + row) * row_bytes + at);
  }
  if (!EARLY) fill();
  if (CL > 1) expect_pushes(pushes, threadIdx.x == 0, max(min(own, (rows + FOUR - 1) / FOUR * FOUR - rank * own), 0) * MP * (CL - 1));
  build_table(table, THREADS);
  __syncthreads();
  wait_before_reading_x();
  Values<THREADS> values; values.fetch(map);
  const float plus = NESTED ? *offset : 0.f;
  uint4 held[8];
  const int column = piece * KB + g % SECT * 256 + t * 16; const bool there = g / SECT < m;
  const u16* from_x = x + (i64)(g / SECT) * k + column;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    held[i] = make_uint4(0, 0, 0, 0);
    if (there && column + i / 2 * 64 < k) held[i] = read_x(from_x + i / 2 * 64 + i % 2 * 8);
  }
  if (EARLY) fill();
  float unscale0 = 1.f, unscale1 = 1.f;                                  // of the rows of x whose sums this lane has
  if (BF16) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) most = larger_b(larger_b(larger_b(larger_b(most, held[i].x), held[i].y), held[i].z), held[i].w);
    most = max(most & 0xffff, most >> 16);
#pragma unroll
    for (int o = 1; o < 4 * SECT; o *= 2) most = max(most, __float_as_uint(of_other_lane(__uint_as_float(most), o)));
#pragma unroll
    for (int i = 0; i < 8; i++) held[i] = scaled_to_fp16(held[i], x_scale(most));
    const float mine = x_unscale(most);
    unscale0 = of_lane(mine, 4 * SECT * (2 * t / SECT));
    if (SECT == 1) unscale1 = of_lane(mine, 8 * t + 4);
  }
  if (NESTED) {
    values.put(map_);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) ((float2*)(ring + i * SLOT + PIECE))[lane] = filled[i].decode(scales, plus, map_);
  }

  // lane * 4, of which the compiler cannot know: one instruction less a look-up.
  const u32 lane4 = (u32)(shared(smem + lane * 4) - shared(smem));
  int place = warp * SUMS;
  if (first * R >= rows) let_next_kernel_start();
  for (int row = first * R; row < rows; row += stride) {
    if (row + LATE * stride >= rows) let_next_kernel_start();
    u8* filling = ring + (int)(slot - base);
    fetch(row + (DEPTH - 1) * stride);
    copies_left<DEPTH - 1>();
    __syncwarp();
    const u8* at = ring + (int)(slot - base);                            // the next to be filled is the next to be read
    // Not ahead of the copies, which would then wait for codes.
    const float2 made = NESTED ? next.decode(scales, plus, map_) : make_float2(0.f, 0.f);
    read_scales(row + DEPTH * stride);
    const float4 p = ((const float4*)(at + PIECE))[g], q = ((const float4*)(at + PIECE))[g + 8];
    const float s0[4] = {p.x, p.y, p.z, p.w}, s1[4] = {q.x, q.y, q.z, q.w};
    if (NESTED) ((float2*)(filling + PIECE))[lane] = made;
    float acc[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int b = 0; b < 4; b++) {
      const uint4 lo = held[2 * b], hi = held[2 * b + 1];
      const u32 xa[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
      const u8* p = at + swizzled<CB>(g, b * 2 + (t >> 1)) * 16 + (t & 1) * 8;
      const uint2 u = *(const uint2*)(p + g * CB), v = *(const uint2*)(p + (g + 8) * CB);
      float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 a = h ? u.y : u.x, d = h ? v.y : v.x;
        mma<0>(c, look_up<0>(table, a, lane4), look_up<0>(table, d, lane4), look_up<1>(table, a, lane4), look_up<1>(table, d, lane4), xa[4 * h], xa[4 * h + 1]);
        mma<0>(c, look_up<2>(table, a, lane4), look_up<2>(table, d, lane4), look_up<3>(table, a, lane4), look_up<3>(table, d, lane4), xa[4 * h + 2], xa[4 * h + 3]);
      }
      acc[0] = fmaf(c[0], s0[b], acc[0]); acc[1] = fmaf(c[1], s0[b], acc[1]);
      acc[2] = fmaf(c[2], s1[b], acc[2]); acc[3] = fmaf(c[3], s1[b], acc[3]);
    }
    // A lane has rows g and g + 8 of the operand and columns 2 t and 2 t + 1. Sums of a piece: [R, MP].
    if (SECT == 1) {
      float* s = sum_at(place + g * MP + 2 * t);                         // a piece's sums are whole lines of the table
      float* low = sum_at(place + (g + 8) * MP + 2 * t);
      *(float2*)s = make_float2(acc[0] * unscale0, acc[1] * unscale1);
      *(float2*)low = make_float2(acc[2] * unscale0, acc[3] * unscale1);
    } else if (SECT == 2) {
      *sum_at(place + g * MP + t) = (acc[0] + acc[3]) * unscale0;
    } else {
      float v = t & 1 ? (g < 4 ? acc[2] : acc[3]) : (g < 4 ? acc[0] : acc[1]);
      v += of_other_lane(v, 1); v += of_other_lane(v, 16);
      if (lane < 16 && t % 2 == 0) *sum_at(place + g * MP + t / 2) = v * unscale0;
    }
    __syncwarp();
    place += WARPS * SUMS;
  }
  __syncthreads();
  if (CL == 1) {
    for (int i = threadIdx.x; i < rows * MP; i += THREADS) {
      const int at = i / SUMS * pieces * SUMS + i % SUMS; float sum = 0.f;
      for (int j = 0; j < pieces; j++) sum += *sum_at(at + j * SUMS);
      if (i % MP < m) out.put(i % MP, row0[0] + i / MP, sum);
    }
  } else {
    cluster_wait();                                                      // all have begun
    for (int i = 4 * threadIdx.x; i < rows * MP; i += 4 * THREADS) {
      const int at = i / SUMS * pieces * SUMS + i % SUMS, to = i / (own * MP); float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
      for (int j = 0; j < pieces; j++) { const float4 v = *(const float4*)sum_at(at + j * SUMS); sum.x += v.x; sum.y += v.y; sum.z += v.z; sum.w += v.w; }
      float* p = sent + (rank - to) * own * MP + i;
      if (to == rank) *(float4*)p = sum; else push4(p, to, sum, pushes);
    }
    __syncthreads();
    wait_for_pushes(pushes);
    const int r1 = max(min(own, rows - rank * own), 0);
    for (int i = threadIdx.x; i < r1 * MP; i += THREADS) {
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < CL; j++) sum += sent[j * own * MP + i];
      if (i % MP < m) out.put(i % MP, row0[0] + rank * own + i / MP, sum);
    }
  }
  copies_left<0>();
}
