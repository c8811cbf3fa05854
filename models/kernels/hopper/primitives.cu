// Instructions of Hopper as functions, for the token mixer: tensor copies, matrix loads. See mixer.py.

// Named barriers: sync waits until `threads` threads have come, arrive only counts as one of them.
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- tensor copies -----------------------------------------------------------------------------

// A box at (c0, c1, c2) into shared memory; to the same place of all blocks in mask, if MULTICAST.
template <bool MULTICAST>
__device__ __forceinline__ void load3(void* to, const TensorMap* map, u64* bar, int c0, int c1,
                                      int c2, u32 mask) {
  if (MULTICAST)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;"
        ::"r"(address(to)), "l"(map), "r"(address(bar)), "r"(c0), "r"(c1), "r"(c2),
        "h"((bf16)mask) : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5}], [%2];"
        ::"r"(address(to)), "l"(map), "r"(address(bar)), "r"(c0), "r"(c1), "r"(c2) : "memory");
}

// What lies outside of the tensor is not written.
__device__ __forceinline__ void store3(const TensorMap* map, const void* from, int c0, int c1,
                                       int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];"
               ::"l"(map), "r"(address(from)), "r"(c0), "r"(c1), "r"(c2) : "memory");
}

__device__ __forceinline__ void store2(const TensorMap* map, const void* from, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
               ::"l"(map), "r"(address(from)), "r"(c0), "r"(c1) : "memory");
}

__device__ __forceinline__ void stores_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

template <int PENDING>  // until all but the last PENDING stores of this thread have left the source
__device__ __forceinline__ void stores_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void stores_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Between ordinary writes to shared memory and a tensor copy that reads them.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- matrices ----------------------------------------------------------------------------------

// Descriptor of rows of 128 bytes, swizzled. K along a row: eight rows every 1,024 bytes. K down
// the rows (transposed): 64 columns every `block` bytes.
__device__ __forceinline__ u64 descriptor(u32 at, u32 block = 16) {
  return (u64)((at & 0x3FFFF) >> 4) | ((u64)(block >> 4) << 16) | (64ull << 32) | (1ull << 62);
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

template <int N>  // the compiler may not read d before this point
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

__device__ __forceinline__ void matrices_load_t(u32 (&r)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ void matrices_store(u32 at, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(at), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

__device__ __forceinline__ void matrices_store_t(u32 at, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};"
               ::"r"(at), "r"(a), "r"(b) : "memory");
}

// ---- numbers -----------------------------------------------------------------------------------

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }

__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

__device__ __forceinline__ float sum4(float x) {  // over the four lanes that share a row
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
