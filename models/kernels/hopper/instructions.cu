// The instructions of Hopper (PTX, sm_90a) that gemm.cu uses, one function each.

// Store into another block of the cluster and count the 4 bytes at its barrier.
__device__ __forceinline__ void store_remote(float* p, float value, u64* bar, u32 block) {
  asm volatile(
      "{\n.reg .b32 to, remote;\n"
      "mapa.shared::cluster.u32 to, %0, %3;\n"
      "mapa.shared::cluster.u32 remote, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %1, [remote];\n}"
      ::"r"(address(p)), "r"(__float_as_uint(value)), "r"(address(bar)), "r"(block) : "memory");
}

// A box of x, or of W (whose map has the dimensions k, b, q, j, row / 32: see gemm.cu), into shared
// memory, here or in the blocks of `mask`: 64 columns from `column` of the rows from `row`.
#define TMA(DIMENSIONS, MULTICAST, COORDINATES, MASK)                                      \
  asm volatile("cp.async.bulk.tensor." DIMENSIONS                                          \
               ".shared::cluster.global.mbarrier::complete_tx::bytes" MULTICAST            \
               " [%0], [%1, {" COORDINATES "}], [%2]" MASK ";"                             \
               ::"r"(address(to)), "l"(map), "r"(address(bar)), "r"(column), "r"(row),     \
               "r"(0), "h"((unsigned short)mask) : "memory")

template <bool MULTICAST>
__device__ __forceinline__ void load_x(void* to, const TensorMap* map, u64* bar, int column,
                                       int row, u32 mask) {
  if (MULTICAST) TMA("2d", ".multicast::cluster", "%3, %4", ", %6");
  else TMA("2d", "", "%3, %4", "");
}

template <bool MULTICAST>
__device__ __forceinline__ void load_w(void* to, const TensorMap* map, u64* bar, int column,
                                       int row, u32 mask) {
  row /= 32;
  if (MULTICAST) TMA("5d", ".multicast::cluster", "%3, %5, %5, %5, %4", ", %6");
  else TMA("5d", "", "%3, %5, %5, %5, %4", "");
}

// Matrix descriptor: rows of 128 bytes, swizzled in groups of 8 rows (1,024 bytes).
__device__ __forceinline__ u64 descriptor(const void* p) {
  return (u64)((address(p) & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

__device__ __forceinline__ Eight load8(const bf16* p) {
  Eight v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.pair[0]), "=r"(v.pair[1]), "=r"(v.pair[2]), "=r"(v.pair[3]) : "l"(p));
  return v;
}

__device__ __forceinline__ void store8(bf16* p, Eight v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.pair[0]),
               "r"(v.pair[1]), "r"(v.pair[2]), "r"(v.pair[3]) : "memory");
}

__device__ __forceinline__ float get(const Eight& v, int i) {  // element i as float
  return __uint_as_float(i & 1 ? v.pair[i / 2] & 0xFFFF0000u : v.pair[i / 2] << 16);
}

__device__ __forceinline__ Eight round8(const float* v) {
  Eight r;
#pragma unroll
  for (int i = 0; i < 4; i++)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r.pair[i]) : "f"(v[2 * i + 1]), "f"(v[2 * i]));
  return r;
}

// ---- 8 bits ------------------------------------------------------------------------------------

typedef unsigned char e4m3;
struct alignas(8) EightSmall { u32 four[2]; };  // 8 e4m3

__device__ __forceinline__ void store8(e4m3* p, EightSmall v) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(v.four[0]), "r"(v.four[1])
               : "memory");
}

__device__ __forceinline__ EightSmall round8_e4m3(const float* v) {  // what is beyond 448 is ±448
  EightSmall r;
#pragma unroll
  for (int i = 0; i < 2; i++)
    asm("{\n.reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}"
        : "=r"(r.four[i]) : "f"(v[4 * i]), "f"(v[4 * i + 1]), "f"(v[4 * i + 2]), "f"(v[4 * i + 3]));
  return r;
}

// 1 / (1 + exp(-x)), off by 3e-4 at most (absolute), in one special-function instruction.
__device__ __forceinline__ float sigmoid_fast(float x) {
  return 0.5f * tanh_approx(0.5f * x) + 0.5f;
}

// 1 / (1 + exp(-x)): relative error under 2⁻²⁰, bf16 rounds at 2⁻⁸.
__device__ __forceinline__ float sigmoid(float x) {
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
  return r;
}
