// out = softmax(q kᵀ) v, of base 2, for LENGTH up to 1,024: q and k come rotated, and q scaled by
// log2(e) / 8, so that a score is an exponent of 2 (FlashAttention: Dao 2023, arXiv:2307.08691).
//
// A block takes a whole head of a puzzle: its keys stay in shared memory; queries come in rounds of
// 192, 64 for each of three warpgroups; values stream past them once a round, through a ring of
// stages. While the last round of a head is done with a tile of keys, those of the next head come.
// One thread loads, by TMA, in the order of use.
//
// BOLD: no maximum is subtracted, which costs a fifth of the time. That is right as long as the sum
// of a row stays in float32, with room to spare: each warp marks a head of which one leaves
// [2⁻⁹⁰, 2¹⁰⁰]. Without BOLD only marked heads are done, again, with the maximum.
//
// Compile-time: LENGTH, BOLD, SAVE (lse, of base 2, is written for the backward).

constexpr int WGS = 3, ROWS = 128, QUERIES = 64 * WGS, STAGES = 3, MARKS = 4 * WGS;
constexpr int TILES = (LENGTH + ROWS - 1) / ROWS;       // of keys; two at least
constexpr int ROUNDS = (LENGTH + QUERIES - 1) / QUERIES;
constexpr int LAST = LENGTH - (TILES - 1) * ROWS;       // keys in the last tile
constexpr int LAST_N = (LAST + 7) / 8 * 8, LAST_WORDS = (LAST + 15) / 16 * 4;
constexpr int TILE = ROWS * 128, Q_BYTES = QUERIES * 128;
#define MINUS_INFINITY __uint_as_float(0xFF800000u)

struct Barriers {  // full: the bytes have come; empty: may be overwritten
  u64 k_full[TILES], k_empty[TILES], q_full[2], q_empty[2], v_full[STAGES], v_empty[STAGES];
};

struct Sums { float top[2], total[2]; };  // of two rows; this lane's share of the total

// Keys past the end are not seen.
__device__ __forceinline__ void mask_last(float (&s)[LAST_N / 2]) {
#pragma unroll
  for (int i = 0; i < LAST_N / 2; i++)
    if (i / 4 * 8 + 8 > LAST && i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2 >= LAST)
      s[i] = MINUS_INFINITY;
}

// s becomes 2^s.
template <int V> __device__ __forceinline__ void raise(float (&s)[V], Sums& sums) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float sum = 0;
#pragma unroll
    for (int j = 2 * h; j < V; j += 4)
#pragma unroll
      for (int b = 0; b < 2; b++) sum += s[j + b] = power2(s[j + b]);
    sums.total[h] += sum;
  }
}

// s becomes 2^(s - maximum); o and the total are brought to the new maximum.
template <int V>
__device__ __forceinline__ void raise_safely(float (&s)[V], float (&o)[32], Sums& sums) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float most = sums.top[h], sum = 0;
#pragma unroll
    for (int j = 2 * h; j < V; j += 4) most = fmaxf(most, fmaxf(s[j], s[j + 1]));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    float factor = power2(sums.top[h] - most);
    sums.top[h] = most;
#pragma unroll
    for (int j = 2 * h; j < V; j += 4)
#pragma unroll
      for (int b = 0; b < 2; b++) sum += s[j + b] = power2(s[j + b] - most);
    sums.total[h] = sums.total[h] * factor + sum;
#pragma unroll
    for (int j = 2 * h; j < 32; j += 4) o[j] *= factor, o[j + 1] *= factor;
  }
}

// s = q kᵀ; the product o += p v with the values of the tile before is under way, then, and goes on
// under the exponentials of s.
template <int V>
__device__ __forceinline__ void multiply(float (&s)[V], float (&o)[32], u32 (&p)[ROWS / 4],
                                         const void* q, const void* k, const void* v) {
  settle(p);
  settle(o);
  wgmma_begin();
  scores(s, q, k);
  mix(o, p, v, 1);
  wgmma_wait<1>();
  settle(s);
}

// Whether the bold pass marked this head.
__device__ __forceinline__ bool marked(const u32* marks, u32 item) {
  u32 any = 0;
#pragma unroll
  for (int i = 0; i < MARKS; i++) any |= marks[item * MARKS + i];
  return any;
}

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(128 * (WGS + 1), 1)
attend_long(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap kv_map,
            bf16* __restrict__ out, float* __restrict__ lse, u32* __restrict__ marks, u32 heads,
            u32 items) {
  unsigned char* keys = aligned_shared();
  unsigned char* queries = keys + TILES * TILE;
  unsigned char* values = queries + 2 * Q_BYTES;
  Barriers& bars = *(Barriers*)(values + STAGES * TILE);
  if (threadIdx.x == 0) {
    for (int i = 0; i < TILES; i++) {
      barrier_init(&bars.k_full[i], 1);
      barrier_init(&bars.k_empty[i], 4 * WGS);
    }
    for (int i = 0; i < 2; i++) {
      barrier_init(&bars.q_full[i], 1);
      barrier_init(&bars.q_empty[i], 4 * WGS);
    }
    for (int i = 0; i < STAGES; i++) {
      barrier_init(&bars.v_full[i], 1);
      barrier_init(&bars.v_empty[i], 4 * WGS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  u32 round = 0, step = 0, head_parity = 0;
  if (threadIdx.x >= 128 * WGS) {  // ---- the loading warpgroup: one thread of it
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x % 128) return;
    for (u32 item = blockIdx.x; item < items; item += gridDim.x) {
      if (!BOLD && !marked(marks, item)) continue;
      int head = item % heads, puzzle = item / heads;
      for (int r = 0; r < ROUNDS; r++, round++) {
        barrier_wait(&bars.q_empty[round % 2], (round / 2 & 1) ^ 1);
        barrier_expect(&bars.q_full[round % 2], Q_BYTES);
        load_tile(queries + round % 2 * Q_BYTES, &q_map, &bars.q_full[round % 2], head * 64,
                  r * QUERIES, puzzle);
        for (int j = 0; j < TILES; j++, step++) {
          if (r == 0) {
            barrier_wait(&bars.k_empty[j], head_parity ^ 1);
            barrier_expect(&bars.k_full[j], TILE);
            load_tile(keys + j * TILE, &kv_map, &bars.k_full[j], (heads + head) * 64, j * ROWS,
                      puzzle);
          }
          u32 stage = step % STAGES;
          barrier_wait(&bars.v_empty[stage], (step / STAGES & 1) ^ 1);
          barrier_expect(&bars.v_full[stage], TILE);
          load_tile(values + stage * TILE, &kv_map, &bars.v_full[stage], (2 * heads + head) * 64,
                    j * ROWS, puzzle);
        }
      }
      head_parity ^= 1;
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
  const int lane = threadIdx.x % 32, wg = threadIdx.x / 128;
  const int first = wg * 64 + threadIdx.x / 32 % 4 * 16;  // row of the warp in a round
  const u32 width = heads * 64;
  for (u32 item = blockIdx.x; item < items; item += gridDim.x) {
    if (!BOLD && !marked(marks, item)) continue;
    const u64 token = (u64)(item / heads) * LENGTH;  // the puzzle's first
    const u32 column = item % heads * 64;
    bool outside = false;  // one of this warp's sums
#pragma unroll 1
    for (int r = 0; r < ROUNDS; r++, round++) {
      unsigned char* q = queries + round % 2 * Q_BYTES + wg * 8192;
      float o[32], s[ROWS / 2];
      u32 p[ROWS / 4];
      Sums sums = {{MINUS_INFINITY, MINUS_INFINITY}, {0, 0}};
#pragma unroll
      for (int i = 0; i < 32; i++) o[i] = 0;
      auto keys_come = [&](int j) { if (r == 0) barrier_wait(&bars.k_full[j], head_parity); };
      auto values_come = [&] { barrier_wait(&bars.v_full[step % STAGES], step / STAGES & 1); };
      auto let_keys_go = [&](int j) { if (r == ROUNDS - 1) arrive_if(&bars.k_empty[j]); };

      keys_come(0);
      barrier_wait(&bars.q_full[round % 2], round / 2 & 1);
      wgmma_begin();
      scores(s, q, keys);
      wgmma_wait<0>();
      settle(s);
      let_keys_go(0);
      if (BOLD) raise(s, sums); else raise_safely(s, o, sums);
      pack(p, s);

      auto mixed = [&] {  // the product under way is done
        wgmma_wait<0>();
        settle(o);
        settle(p);
        arrive_if(&bars.v_empty[step % STAGES]);
        step++;
      };
#pragma unroll 1
      for (int j = 1; j < TILES - 1; j++) {
        keys_come(j);
        values_come();
        multiply(s, o, p, q, keys + j * TILE, values + step % STAGES * TILE);
        let_keys_go(j);
        if (BOLD) raise(s, sums);
        mixed();
        if (!BOLD) raise_safely(s, o, sums);
        pack(p, s);
      }
      float t[LAST_N / 2];
      u32 last[LAST_WORDS];
      keys_come(TILES - 1);
      values_come();
      multiply(t, o, p, q, keys + (TILES - 1) * TILE, values + step % STAGES * TILE);
      let_keys_go(TILES - 1);
      mask_last(t);
      if (BOLD) raise(t, sums);
      mixed();
      if (!BOLD) raise_safely(t, o, sums);
      pack(last, t);
      values_come();
      settle(last);
      settle(o);
      wgmma_begin();
      mix(o, last, values + step % STAGES * TILE, 1);

      const int row = r * QUERIES + first + lane / 4;
      float factor[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float total = sums.total[h];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        factor[h] = 1 / total;
        outside |= !(total >= 0x1p-90f && total <= 0x1p100f);
        if (SAVE && lane % 4 == 0 && row + 8 * h < LENGTH)
          lse[(u64)item * LENGTH + row + 8 * h] = (BOLD ? 0 : sums.top[h]) + __log2f(total);
      }
      wgmma_wait<0>();
      settle(o);
      settle(last);
      arrive_if(&bars.v_empty[step % STAGES]);
      step++;
#pragma unroll
      for (int j = 0; j < 32; j++) o[j] *= factor[j / 2 % 2];
      sync_threads(1 + wg, 128);  // all of the warpgroup's products with q are done
      store_rows(o, q + (first % 64) * 128, r * QUERIES + first, out + token * width + column,
                 width);
      proxy_fence();
      arrive_if(&bars.q_empty[round % 2]);
    }
    if (BOLD) {
      outside = __any_sync(~0u, outside);
      if (lane == 0) marks[item * MARKS + threadIdx.x / 32] = outside;
    }
    head_parity ^= 1;
  }
}
