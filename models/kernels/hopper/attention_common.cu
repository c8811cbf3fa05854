// What the attention kernels share (sm_90a). A puzzle's qkv product is (L, 3, heads, 64) bf16.
//
// A tile is some tokens × 64 features in shared memory: rows of 128 bytes whose 16-byte chunks are
// swizzled (chunk ^ row % 8), as TMA writes and wgmma reads them. Tokens past the end are zeros.
//
// Compile-time: LENGTH; and the wgmma functions, written by attention.py.

constexpr float LOG2E = 1.4426950408889634f, SCALE = 0.125f;

// Once for the warp.
__device__ __forceinline__ void arrive_if(u64* bar) {
  __syncwarp();
  if (bar && threadIdx.x % 32 == 0) barrier_arrive(bar);
}

__device__ __forceinline__ void sync_threads(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// What this thread wrote to shared memory becomes visible to wgmma and TMA (after a barrier).
__device__ __forceinline__ void proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Columns [column, column + 64) of a puzzle's tokens from `token` on, as many as the map's box has.
__device__ __forceinline__ void load_tile(unsigned char* to, const TensorMap* map, u64* bar,
                                          int column, int token, int puzzle) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];"
      ::"r"(address(to)), "l"(map), "r"(address(bar)), "r"(column), "r"(token), "r"(puzzle)
      : "memory");
}

// ---- wgmma -------------------------------------------------------------------------------------

// Matrix descriptor of rows of 128 bytes, swizzled in groups of 8 rows (1,024 bytes), either way
// round: along the rows (16 columns further: + 2) or across them (16 rows further: + 128).
__device__ __forceinline__ u64 descriptor(const void* p) {
  return (u64)((address(p) & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Nothing that uses or makes these registers moves to the other side.
template <int COUNT> __device__ __forceinline__ void settle(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int COUNT> __device__ __forceinline__ void settle(u32 (&p)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(p[i])::"memory");
}

// s (64, 2 V) = a bᵀ over the 64 features; a and b are tiles from their first row of interest.
template <int V>
__device__ __forceinline__ void scores(float (&s)[V], const void* a, const void* b) {
  u64 at = descriptor(a), bt = descriptor(b);
#pragma unroll
  for (int k = 0; k < 4; k++) wgmma_scores(s, at + 2 * k, bt + 2 * k, k);
  wgmma_commit();
}

// d (64, 64) (+)= p b over tokens: p from registers (as packed by `pack`), b a tile.
template <int WORDS>
__device__ __forceinline__ void mix(float (&d)[32], const u32 (&p)[WORDS], const void* b,
                                    int accumulate = 0) {
  u64 bt = descriptor(b);
#pragma unroll
  for (int t = 0; t < WORDS / 4; t++)
    wgmma_mix(d, p[4 * t], p[4 * t + 1], p[4 * t + 2], p[4 * t + 3], bt + 128 * t, accumulate | t);
  wgmma_commit();
}

__device__ __forceinline__ u32 round2(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// The accumulators of a (64, 2 V) product as the operand of the next one, with zeros for columns
// past the end: word 2 j + h is of the thread's row h (lane / 4 + 8 h), two of the columns 8 j ….
template <int WORDS, int V>
__device__ __forceinline__ void pack(u32 (&p)[WORDS], const float (&s)[V]) {
#pragma unroll
  for (int i = 0; i < WORDS; i++) p[i] = 2 * i < V ? round2(s[2 * i % V], s[(2 * i + 1) % V]) : 0;
}

// ---- shared memory -----------------------------------------------------------------------------

__device__ __forceinline__ unsigned char* chunk_of(unsigned char* tile, int row, int chunk) {
  return tile + row * 128 + ((chunk ^ (row & 7)) << 4);
}

__device__ __forceinline__ void store_matrices(const void* to, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(address(to)), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

__device__ __forceinline__ float power2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// Without a branch, at which the compiler would wait for all products under way.
__device__ __forceinline__ void store_if(bool inside, bf16* to, Eight v) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
               "@p st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}"
               ::"l"(to), "r"(v.pair[0]), "r"(v.pair[1]), "r"(v.pair[2]), "r"(v.pair[3]),
               "r"((int)inside) : "memory");
}

// 16 rows of d (64, 64), from `row` on, to global memory through 16 rows of shared memory `by`,
// which start at a multiple of 8 rows of a tile.
__device__ __forceinline__ void store_rows(const float (&d)[32], unsigned char* by, int row,
                                           bf16* to, u32 stride) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < 4; t++)
    store_matrices(chunk_of(by, (lane / 8 & 1) * 8 + lane % 8, 2 * t + lane / 16),
                   round2(d[8 * t], d[8 * t + 1]), round2(d[8 * t + 2], d[8 * t + 3]),
                   round2(d[8 * t + 4], d[8 * t + 5]), round2(d[8 * t + 6], d[8 * t + 7]));
  __syncwarp();
#pragma unroll
  for (int k = 0; k < 4; k++) {
    int r = 4 * k + lane / 8;
    Eight v = *(const Eight*)chunk_of(by, r, lane % 8);
    store_if(row + r < LENGTH, to + (u64)(row + r) * stride + lane % 8 * 8, v);
  }
  __syncwarp();
}

// ---- rotation ----------------------------------------------------------------------------------

__device__ __forceinline__ void rotate(unsigned char* tile, int row, int c, const Four (&cos)[2],
                                       const Four (&sin)[2]) {
  Eight* first = (Eight*)chunk_of(tile, row, c);
  Eight* second = (Eight*)chunk_of(tile, row, c + 4);
  Eight x = *first, y = *second;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float c0 = cos[i / 2].v[2 * i % 4], c1 = cos[i / 2].v[2 * i % 4 + 1];
    float s0 = sin[i / 2].v[2 * i % 4], s1 = sin[i / 2].v[2 * i % 4 + 1];
    float x0 = low(x.pair[i]), x1 = high(x.pair[i]), y0 = low(y.pair[i]), y1 = high(y.pair[i]);
    x.pair[i] = round2(x0 * c0 - y0 * s0, x1 * c1 - y1 * s1);
    y.pair[i] = round2(y0 * c0 + x0 * s0, y1 * c1 + x1 * s1);
  }
  *first = x;
  *second = y;
}

// The gradient of a rotated q or k, rotated back.
__device__ __forceinline__ void rotate_back(float (&d)[32], const float (&cos)[16],
                                            const float (&sin)[16]) {
#pragma unroll
  for (int i = 0; i < 16; i++) {
    float x = d[i], y = d[i + 16];
    d[i] = x * cos[i] + y * sin[i];
    d[i + 16] = y * cos[i] - x * sin[i];
  }
}

// Row and chunk (of four) number i: eight neighbouring lanes touch all 32 banks.
__device__ __forceinline__ int row_of(int i) { return i / 32 * 8 + i % 8 / 4 * 4 + i / 8 % 4; }

// ---- the block's set-up ------------------------------------------------------------------------

__device__ __forceinline__ unsigned char* aligned_shared() {
  extern __shared__ unsigned char dynamic[];
  return dynamic + (-address(dynamic) & 1023);
}
