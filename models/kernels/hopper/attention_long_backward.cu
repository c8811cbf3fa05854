// dqkv of attention_long.cu's attention, in two passes of which neither adds into memory:
//
//   KEYS: a block of rows is 64 WGS keys; queries and dout stream past them. dv and dk.
//   else: a block of rows is 64 WGS queries; keys and values stream past them. dq.
//
// The scores are formed once in either (7 products in place of 5), and in return probabilities and
// dS stay in registers, nothing is accumulated out of order, and no two warpgroups wait for each
// other. q and k are read as the forward pass had them, rotated, and q scaled by log2(e) / 8; their
// gradients are rotated back and scaled. The queries' pass also leaves what the other one needs of
// each query: lse and Σ out ⊙ dout.
//
// Compile-time: LENGTH, PADDED (tokens in `sums`), ROPE, KEYS, WGS (2, 3), COLS (tokens in a
// stage), STAGES.

constexpr int ROWS = 64 * WGS;
constexpr int TILES = (LENGTH + COLS - 1) / COLS, BLOCKS = (LENGTH + ROWS - 1) / ROWS;
constexpr int LAST = LENGTH - (TILES - 1) * COLS;  // tokens in the last tile
constexpr float LN2 = 0.6931471805599453f;
constexpr int OWN_BYTES = ROWS * 128, TILE = COLS * 128, SUMS_BYTES = COLS * 8;

struct Barriers { u64 own_full[2], own_empty[2], full[STAGES], empty[STAGES]; };

__device__ __forceinline__ void load_bytes(void* to, const void* from, u32 bytes, u64* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(bar)) : "memory");
}

struct Rows { float lse[2], delta[2]; };  // of the thread's two queries, if rows are queries

// Of the warp's 16 queries from `start` on, whose first row in out and dout is at `offset`. They are
// left in `to` (sums of this head) as well. Past the end: infinity and zero.
__device__ __forceinline__ Rows rows_from(const bf16* out, const bf16* dout, u64 offset, u32 stride,
                                          const float* lse, float* to, int start) {
  const int lane = threadIdx.x % 32, token = start + lane / 2;  // two lanes a query
  const bool inside = token < LENGTH;
  const u64 at = offset + (u64)min(token, LENGTH - 1) * stride + lane % 2 * 32;
  float own = inside ? lse[token] : __uint_as_float(0x7F800000u), delta = 0;
#pragma unroll
  for (int c = 0; c < 4; c++) {
    Eight x = *(const Eight*)(out + at + 8 * c), y = *(const Eight*)(dout + at + 8 * c);
#pragma unroll
    for (int i = 0; i < 4; i++)
      delta += low(x.pair[i]) * low(y.pair[i]) + high(x.pair[i]) * high(y.pair[i]);
  }
  delta += __shfl_xor_sync(~0u, delta, 1);
  if (!inside) delta = 0;
  to[token / 2 * 4 + token % 2 + lane % 2 * 2] = lane % 2 ? delta : own;
  Rows rows;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    rows.lse[h] = __shfl_sync(~0u, own, lane / 4 * 2 + 16 * h);
    rows.delta[h] = __shfl_sync(~0u, delta, lane / 4 * 2 + 16 * h);
  }
  return rows;
}

// One tile of COUNT tokens; `empty`: the barrier of the stage before, null for the first tile.
// sums: lse (of base 2), lse, delta, delta of two queries each, if columns are queries.
template <int COUNT>
__device__ __forceinline__ void add_tile(float (&first)[32], float (&second)[32],
                                         const unsigned char* own, const unsigned char* tile,
                                         const float* sums, const Rows& rows, u64* empty) {
  constexpr int N = (COUNT + 7) / 8 * 8, WORDS = (COUNT + 15) / 16 * 4;
  const int lane = threadIdx.x % 32;
  float s[N / 2], dp[N / 2];
  u32 p[WORDS], ds[WORDS];
  wgmma_begin();
  scores(s, own, tile);
  scores(dp, own + OWN_BYTES, tile + TILE);
  wgmma_wait<1>();
  settle(s);
  settle(first);
  settle(second);
  arrive_if(empty);
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    Four sum;
    if (KEYS) sum = *(const Four*)(sums + (4 * j + lane % 4) * 4);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float lse = KEYS ? sum.v[e % 2] : rows.lse[e / 2];
      float x = power2(s[4 * j + e] - lse);
      if (!KEYS && 8 * j + 8 > COUNT && 8 * j + lane % 4 * 2 + e % 2 >= COUNT) x = 0;
      s[4 * j + e] = x;
    }
  }
  if (KEYS) {
    pack(p, s);
    settle(p);
    wgmma_begin();
    mix(first, p, tile + TILE, 1);
    wgmma_wait<1>();
  } else {
    wgmma_wait<0>();
  }
  settle(dp);
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    Four sum;
    if (KEYS) sum = *(const Four*)(sums + (4 * j + lane % 4) * 4);
#pragma unroll
    for (int e = 0; e < 4; e++)
      s[4 * j + e] *= dp[4 * j + e] - (KEYS ? sum.v[2 + e % 2] : rows.delta[e / 2]);
  }
  pack(ds, s);
  settle(ds);
  wgmma_begin();
  mix(second, ds, tile, 1);
}

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(128 * (WGS + 1), 1)
attend_long_backward(const __grid_constant__ TensorMap own_map,    // of qkv: k, or q
                     const __grid_constant__ TensorMap other_map,  // v of qkv, or dout
                     const __grid_constant__ TensorMap tile_map,   // of qkv: q, or k
                     const __grid_constant__ TensorMap tile2_map,  // dout, or v of qkv
                     const float* __restrict__ cos, const float* __restrict__ sin,
                     const bf16* __restrict__ out, const bf16* __restrict__ dout,
                     const float* __restrict__ lse, float* __restrict__ sums,
                     bf16* __restrict__ dqkv, u32 heads, u32 items) {
  unsigned char* all_own = aligned_shared();
  unsigned char* stages = all_own + 2 * 2 * OWN_BYTES;
  unsigned char* all_sums = stages + STAGES * 2 * TILE;
  Barriers& bars = *(Barriers*)(all_sums + (KEYS ? STAGES * SUMS_BYTES : 0));
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      barrier_init(&bars.own_full[i], 1);
      barrier_init(&bars.own_empty[i], 4 * WGS);
    }
    for (int i = 0; i < STAGES; i++) {
      barrier_init(&bars.full[i], 1);
      barrier_init(&bars.empty[i], 4 * WGS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  u32 i = 0, step = 0;
  if (threadIdx.x >= 128 * WGS) {  // ---- the loading warpgroup: one thread of it
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x % 128) return;
    for (u32 item = blockIdx.x; item < items; item += gridDim.x, i++) {
      u32 block = item % BLOCKS, head = item / BLOCKS % heads, puzzle = item / BLOCKS / heads;
      u64* bar = &bars.own_full[i % 2];
      unsigned char* own = all_own + i % 2 * 2 * OWN_BYTES;
      barrier_wait(&bars.own_empty[i % 2], (i / 2 & 1) ^ 1);
      barrier_expect(bar, 2 * OWN_BYTES);
      load_tile(own, &own_map, bar, (KEYS ? heads + head : head) * 64, block * ROWS, puzzle);
      load_tile(own + OWN_BYTES, &other_map, bar, (KEYS ? 2 * heads + head : head) * 64,
                block * ROWS, puzzle);
      for (int j = 0; j < TILES; j++, step++) {
        u32 stage = step % STAGES;
        unsigned char* to = stages + stage * 2 * TILE;
        bar = &bars.full[stage];
        barrier_wait(&bars.empty[stage], (step / STAGES & 1) ^ 1);
        barrier_expect(bar, 2 * TILE + (KEYS ? SUMS_BYTES : 0));
        load_tile(to, &tile_map, bar, (KEYS ? head : heads + head) * 64, j * COLS, puzzle);
        load_tile(to + TILE, &tile2_map, bar, (KEYS ? head : 2 * heads + head) * 64, j * COLS,
                  puzzle);
        if (KEYS)
          load_bytes(all_sums + stage * SUMS_BYTES,
                     sums + (u64)(item / BLOCKS) * PADDED * 2 + j * COLS * 2, SUMS_BYTES, bar);
      }
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WGS == 2 ? 240 : 160));
  const int lane = threadIdx.x % 32, wg = threadIdx.x / 128;
  const int first_row = wg * 64 + threadIdx.x / 32 % 4 * 16;  // of the warp in a block
  const u32 width = heads * 64;
  for (u32 item = blockIdx.x; item < items; item += gridDim.x, i++) {
    u32 block = item % BLOCKS, head = item / BLOCKS % heads, puzzle = item / BLOCKS / heads;
    unsigned char* own = all_own + i % 2 * 2 * OWN_BYTES;
    const int start = block * ROWS + first_row, row = start + lane / 4;  // and row + 8
    float* own_sums = sums + (u64)(item / BLOCKS) * PADDED * 2;
    Rows rows;
    if (!KEYS)
      rows = rows_from(out, dout, (u64)puzzle * LENGTH * width + head * 64, width,
                       lse + (u64)(item / BLOCKS) * LENGTH, own_sums, start);
    float first[32], second[32];
#pragma unroll
    for (int j = 0; j < 32; j++) first[j] = second[j] = 0;
    barrier_wait(&bars.own_full[i % 2], i / 2 & 1);
#pragma unroll 1
    for (int j = 0; j < TILES - 1; j++, step++) {
      u32 stage = step % STAGES;
      barrier_wait(&bars.full[stage], step / STAGES & 1);
      add_tile<COLS>(first, second, own + wg * 8192, stages + stage * 2 * TILE,
                     (const float*)(all_sums + stage * SUMS_BYTES), rows,
                     j ? &bars.empty[(step - 1) % STAGES] : nullptr);
    }
    u32 stage = step % STAGES;
    barrier_wait(&bars.full[stage], step / STAGES & 1);
    add_tile<LAST>(first, second, own + wg * 8192, stages + stage * 2 * TILE,
                   (const float*)(all_sums + stage * SUMS_BYTES), rows,
                   TILES > 1 ? &bars.empty[(step - 1) % STAGES] : nullptr);
    step++;

    constexpr float scale = KEYS ? LN2 : SCALE;
    float c[16], sn[16];
#pragma unroll
    for (int j = 0; j < 8; j++) {  // two columns each: tile j / 2, row j % 2
      float2 x = {1, 1}, y = {0, 0};
      if (ROPE) {
        int at = min(row + j % 2 * 8, LENGTH - 1) * 64 + j / 2 * 8 + lane % 4 * 2;
        x = *(const float2*)(cos + at), y = *(const float2*)(sin + at);
      }
      c[2 * j] = x.x * scale, c[2 * j + 1] = x.y * scale;
      sn[2 * j] = y.x * scale, sn[2 * j + 1] = y.y * scale;
    }
    wgmma_wait<0>();
    settle(first);
    settle(second);
    arrive_if(&bars.empty[stage]);
    sync_threads(1 + wg, 128);  // all of the warpgroup's products with its rows are done
    unsigned char* by = own + first_row * 128;
    bf16* to = dqkv + (u64)puzzle * LENGTH * 3 * width + head * 64;
    if (KEYS) store_rows(first, by, start, to + 2 * width, 3 * width);
    rotate_back(second, c, sn);
    store_rows(second, by, start, KEYS ? to + width : to, 3 * width);
    proxy_fence();
    arrive_if(&bars.own_empty[i % 2]);
  }
}
