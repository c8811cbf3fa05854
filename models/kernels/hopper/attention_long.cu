// out = softmax(q kᵀ / 8) v of rotated q and k, for LENGTH up to 1,024 (FlashAttention's online
// softmax: Dao 2023, arXiv:2307.08691).
//
// A block takes a whole head of a puzzle: its keys stay in shared memory, rotated once; queries come
// in rounds of 192, 64 for each of three warpgroups; values stream past them once a round, through
// a ring of stages. While the last round of a head is done with a tile of keys, those of the next
// head come. One thread loads, by TMA, in the order of use.
//
// Compile-time: LENGTH, ROPE, SAVE (lse and the rotated q and k, (B, L, 2, heads, 64), are written
// for the backward).

constexpr int WGS = 3, ROWS = 128, QUERIES = 64 * WGS, STAGES = 3;
constexpr int TILES = (LENGTH + ROWS - 1) / ROWS;       // of keys
constexpr int ROUNDS = (LENGTH + QUERIES - 1) / QUERIES;
constexpr int LAST = LENGTH - (TILES - 1) * ROWS;       // keys in the last tile
constexpr int LAST_N = (LAST + 7) / 8 * 8, LAST_STEPS = (LAST + 15) / 16;
constexpr int TILE = ROWS * 128, Q_BYTES = QUERIES * 128;

struct Barriers {  // full: the bytes have come; turned: rotated, too; empty: may be overwritten
  u64 k_full[TILES], k_turned[TILES], k_empty[TILES];
  u64 q_full[2], q_empty[2], v_full[STAGES], v_empty[STAGES];
};

// By a warpgroup: `rows` rows of a tile, the first of them token `first`, are turned in place, and
// written to `to` (the tokens' rows in it `stride` apart) if SAVE.
__device__ __forceinline__ void turn(unsigned char* tile, int rows, int first,
                                     const float* __restrict__ cos_from,
                                     const float* __restrict__ sin_from, bf16* to, u32 stride) {
#pragma unroll 2
  for (int j = threadIdx.x % 128; j < 4 * rows; j += 128) {
    int row = row_of(j), c = j % 4, token = first + row;
    if (ROPE) {  // rows past the end, too: zeros stay zeros
      int at = min(token, LENGTH - 1) * 64 + 8 * c;
      const Four *c_at = (const Four*)(cos_from + at), *s_at = (const Four*)(sin_from + at);
      Four cos[2] = {c_at[0], c_at[1]}, sin[2] = {s_at[0], s_at[1]};
      rotate(tile, row, c, cos, sin);
    }
    if (SAVE) {
      bf16* into = to + (u64)token * stride + 8 * c;
      store_if(token < LENGTH, into, *(const Eight*)chunk_of(tile, row, c));
      store_if(token < LENGTH, into + 32, *(const Eight*)chunk_of(tile, row, c + 4));
    }
  }
  proxy_fence();
}

struct Online { float top[2], total[2]; };  // of two rows; this lane's share of the total

// s becomes probabilities (before their division), o is brought to the new maximum.
template <int V>
__device__ __forceinline__ void soften(float (&s)[V], float (&o)[32], Online& state) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float most = state.top[h];
#pragma unroll
    for (int j = 2 * h; j < V; j += 4) most = fmaxf(most, fmaxf(s[j], s[j + 1]));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    float offset = most * (SCALE * LOG2E), sum = 0;
    float factor = power2(state.top[h] * (SCALE * LOG2E) - offset);
    state.top[h] = most;
#pragma unroll
    for (int j = 2 * h; j < V; j += 4)
#pragma unroll
      for (int b = 0; b < 2; b++) {
        s[j + b] = power2(s[j + b] * (SCALE * LOG2E) - offset);
        sum += s[j + b];
      }
    state.total[h] = state.total[h] * factor + sum;
#pragma unroll
    for (int j = 2 * h; j < 32; j += 4) o[j] *= factor, o[j + 1] *= factor;
  }
}

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(128 * (WGS + 1), 1)
attend_long(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap kv_map,
            const float* __restrict__ cos, const float* __restrict__ sin, bf16* __restrict__ out,
            float* __restrict__ lse, bf16* __restrict__ turned, u32 heads, u32 items) {
  unsigned char* keys = aligned_shared();
  unsigned char* queries = keys + TILES * TILE;
  unsigned char* values = queries + 2 * Q_BYTES;
  Barriers& bars = *(Barriers*)(values + STAGES * TILE);
  if (threadIdx.x == 0) {
    for (int i = 0; i < TILES; i++) {
      barrier_init(&bars.k_full[i], 1);
      barrier_init(&bars.k_turned[i], 4);
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

  if (threadIdx.x >= 128 * WGS) {  // ---- the loading warpgroup: one thread of it
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x % 128) return;
    u32 round = 0, step = 0, head_parity = 0;
    for (u32 item = blockIdx.x; item < items; item += gridDim.x, head_parity ^= 1) {
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
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
  const int lane = threadIdx.x % 32, wg = threadIdx.x / 128;
  const int first = wg * 64 + threadIdx.x / 32 % 4 * 16;  // row of the warp in a round
  const u32 width = heads * 64;
  u32 round = 0, step = 0, head_parity = 0;
  auto arrive = [&](u64* bar) {
    __syncwarp();
    if (lane == 0) barrier_arrive(bar);
  };

  for (u32 item = blockIdx.x; item < items; item += gridDim.x, head_parity ^= 1) {
    const u64 token = (u64)(item / heads) * LENGTH;  // the puzzle's first
    const u32 column = item % heads * 64;
    bf16* turned_q = turned + token * 2 * width + column;
    // The warpgroups take turns in rotating the tiles of keys.
    auto turn_keys = [&](int j) {
      if (j >= TILES || j % WGS != wg) return;
      barrier_wait(&bars.k_full[j], head_parity);
      turn(keys + j * TILE, ROWS, j * ROWS, cos, sin, turned_q + width, 2 * width);
      arrive(&bars.k_turned[j]);
    };
    turn_keys(0);
#pragma unroll 1
    for (int r = 0; r < ROUNDS; r++, round++) {
      unsigned char* q = queries + round % 2 * Q_BYTES + wg * 8192;
      barrier_wait(&bars.q_full[round % 2], round / 2 & 1);
      turn(q, 64, r * QUERIES + wg * 64, cos, sin, turned_q, 2 * width);
      sync_threads(1 + wg, 128);

      float o[32];
      Online state = {{__uint_as_float(0xFF800000u), __uint_as_float(0xFF800000u)}, {0, 0}};
#pragma unroll
      for (int i = 0; i < 32; i++) o[i] = 0;

      // The product with the values of tile j is under way when tile j + 1 begins.
      auto prepare = [&](int j) {
        if (r > 0) return;
        turn_keys(j + 1);
        barrier_wait(&bars.k_turned[j], head_parity);
      };
      auto release = [&](int j) {
        if (j > 0) arrive(&bars.v_empty[(step - 1) % STAGES]);
        if (r == ROUNDS - 1) arrive(&bars.k_empty[j]);
      };
#pragma unroll 1
      for (int j = 0; j < TILES - 1; j++, step++) {
        float s[ROWS / 2];
        u32 p[ROWS / 4];
        prepare(j);
        wgmma_begin();
        scores(s, q, keys + j * TILE);
        wgmma_wait<0>();
        settle(s);
        settle(o);
        release(j);
        soften(s, o, state);
        pack(p, s);
        barrier_wait(&bars.v_full[step % STAGES], step / STAGES & 1);
        settle(p);
        settle(o);
        wgmma_begin();
        mix(o, p, values + step % STAGES * TILE, 1);
      }
      {
        constexpr int j = TILES - 1;
        float s[LAST_N / 2];
        u32 p[LAST_STEPS * 4];
        prepare(j);
        wgmma_begin();
        scores(s, q, keys + j * TILE);
        wgmma_wait<0>();
        settle(s);
        settle(o);
        release(j);
#pragma unroll
        for (int i = 0; i < LAST_N / 2; i++)
          if (i / 4 * 8 + 8 > LAST && i / 4 * 8 + lane % 4 * 2 + i % 2 >= LAST)
            s[i] = __uint_as_float(0xFF800000u);
        soften(s, o, state);
        pack(p, s);
        barrier_wait(&bars.v_full[step % STAGES], step / STAGES & 1);
        settle(p);
        settle(o);
        wgmma_begin();
        mix(o, p, values + step % STAGES * TILE, 1);
        step++;
      }
      int row = r * QUERIES + first + lane / 4;
      float factor[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float total = state.total[h];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        factor[h] = 1 / total;
        if (SAVE && lane % 4 == 0 && row + 8 * h < LENGTH)
          lse[(u64)item * LENGTH + row + 8 * h] = state.top[h] * SCALE + __logf(total);
      }
      wgmma_wait<0>();
      settle(o);
      arrive(&bars.v_empty[(step - 1) % STAGES]);
#pragma unroll
      for (int j = 0; j < 32; j++) o[j] *= factor[j / 2 % 2];
      sync_threads(1 + wg, 128);  // all of the warpgroup's products with q are done
      store_rows(o, q + (first % 64) * 128, r * QUERIES + first, out + token * width + column,
                 width);
      proxy_fence();
      arrive(&bars.q_empty[round % 2]);
    }
  }
}
