// dqkv from dout and what the forward pass saved; see attention_short.cu.
//
// All scores are transposed, (keys, queries), so that they feed dk and dv from registers; only dS
// passes through shared memory, for dq. Each warpgroup owns 64 keys, then 64 queries.

constexpr int STAGE_BYTES = 5 * TILE;  // q, k, v, dout, out
constexpr int DS_TILE = MB * 8192;     // dSᵀ, (keys, 64 queries), with the rows past the end
constexpr int DS_BYTES = MB * DS_TILE; // of a team: one for each 64 queries
constexpr int PAIRS = LP / 2;          // of queries: lse, lse, delta, delta

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(TEAM * TEAMS + 128, 1)
attend_backward(const __grid_constant__ TensorMap qkv_map,
                const __grid_constant__ TensorMap dout_map,
                const __grid_constant__ TensorMap out_map, const float* __restrict__ cos,
                const float* __restrict__ sin, const float* __restrict__ lse,
                bf16* __restrict__ dqkv, u32 heads, u32 items) {
  unsigned char* stages = aligned_shared();
  unsigned char* all_ds = stages + STAGES * STAGE_BYTES;
  unsigned char* after = all_ds + TEAMS * DS_BYTES;
  Table table = {after, after + TABLE / 2};
  float* all_sums = (float*)(after + TABLE + SLACK);
  Barriers& bars = *(Barriers*)(all_sums + TEAMS * PAIRS * 4);
  init(bars);
  __syncthreads();

  if (threadIdx.x >= TEAM * TEAMS) {  // ---- the loading warpgroup: one thread of it
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x % 128) return;
    int i = 0;
    for (u32 item = blockIdx.x; item < items; item += gridDim.x, i++) {
      int stage = i % STAGES, head = item % heads, puzzle = item / heads;
      unsigned char* to = stages + stage * STAGE_BYTES;
      barrier_wait(&bars.empty[stage], (i / STAGES & 1) ^ 1);
      barrier_expect(&bars.full[stage], STAGE_BYTES);
      for (int p = 0; p < 3; p++)
        load_tile(to + p * TILE, &qkv_map, &bars.full[stage], (p * heads + head) * 64, 0, puzzle);
      load_tile(to + 3 * TILE, &dout_map, &bars.full[stage], head * 64, 0, puzzle);
      load_tile(to + 4 * TILE, &out_map, &bars.full[stage], head * 64, 0, puzzle);
    }
    return;
  }

  // ---- a team: its items are every TEAMS-th of the block's, so its stages are its own
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  const int team = threadIdx.x / TEAM, rank = threadIdx.x % TEAM, block = rank / 128;
  const int lane = threadIdx.x % 32, first = block * 64 + rank / 32 % 4 * 16;  // row of the warp
  const int row = first + lane / 4;                                           // and row + 8
  unsigned char* ds = all_ds + team * DS_BYTES;
  float* sums = all_sums + team * PAIRS * 4;
  if (ROPE) table.fill(cos, sin);
  float my_lse = 0;  // of query `rank` of the next item, on its way
  u32 item = blockIdx.x + team * gridDim.x;
  if (item < items && rank < LENGTH) my_lse = lse[(u64)item * LENGTH + rank];
  for (int i = team; item < items; i += TEAMS) {
    const int stage = i % STAGES;
    unsigned char* q = stages + stage * STAGE_BYTES;
    unsigned char *k = q + TILE, *v = k + TILE, *dout = v + TILE, *o = dout + TILE;
    if (rank < LP)  // queries past the end get probability 0
      sums[rank / 2 * 4 + rank % 2] = rank < LENGTH ? my_lse * LOG2E : __uint_as_float(0x7F800000u);
    u32 next = item + TEAMS * gridDim.x;
    if (next < items && rank < LENGTH) my_lse = lse[(u64)next * LENGTH + rank];

    barrier_wait(&bars.full[stage], i / STAGES & 1);
    for (int j = rank; j < 4 * LP; j += TEAM) {
      int r = row_of(j), c = j % 4;
      float delta = 0;  // Σ out ⊙ dout of a row: four lanes share it
#pragma unroll
      for (int h = 0; h < 2; h++) {
        Eight x = *(const Eight*)chunk_of(o, r, c + 4 * h);
        Eight y = *(const Eight*)chunk_of(dout, r, c + 4 * h);
#pragma unroll
        for (int e = 0; e < 4; e++)
          delta += low(x.pair[e]) * low(y.pair[e]) + high(x.pair[e]) * high(y.pair[e]);
      }
      delta += __shfl_xor_sync(~0u, delta, 1);
      delta += __shfl_xor_sync(~0u, delta, 2);
      if (c == 0) sums[r / 2 * 4 + 2 + r % 2] = delta;
      if (ROPE && r < LENGTH) rotate_both(q, k, table, r, c);
    }
    proxy_fence();
    sync_threads(1 + team, TEAM);

    float s[N / 2], dp[N / 2];
    wgmma_begin();
    scores(s, k + block * 8192, q);
    scores(dp, v + block * 8192, dout);
    wgmma_wait<1>();
    settle(s);
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      Four sum = *(const Four*)(sums + (4 * j + lane % 4) * 4);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[4 * j + e] = power2(s[4 * j + e] * (SCALE * LOG2E) - sum.v[e % 2]);
        if (CAUSAL && row + e / 2 * 8 > 8 * j + lane % 4 * 2 + e % 2) s[4 * j + e] = 0;
      }
    }
    u32 p[4 * STEPS], dsp[4 * STEPS];
    float dv[32], dk[32], dq[32];
    pack(p, s);
    settle(p);
    wgmma_begin();
    mix(dv, p, dout);
    wgmma_wait<1>();
    settle(dp);
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      Four sum = *(const Four*)(sums + (4 * j + lane % 4) * 4);
#pragma unroll
      for (int e = 0; e < 4; e++)
        s[4 * j + e] *= dp[4 * j + e] - sum.v[2 + e % 2];
    }
    pack(dsp, s);
#pragma unroll
    for (int j = 0; j < 4 * STEPS; j++)  // keys past the end: whatever was there
      if (row + j % 2 * 8 >= LENGTH) dsp[j] = 0;
    settle(dsp);
    wgmma_begin();
    mix(dk, dsp, q);
#pragma unroll
    for (int t = 0; t < STEPS; t++)
      store_matrices(chunk_of(ds + t / 4 * DS_TILE, first + (lane / 8 & 1) * 8 + lane % 8,
                              2 * t % 8 + lane / 16),
                     dsp[4 * t], dsp[4 * t + 1], dsp[4 * t + 2], dsp[4 * t + 3]);
    proxy_fence();
    sync_threads(1 + team, TEAM);

    wgmma_begin();
    u64 a = descriptor(ds + block * DS_TILE), b = descriptor(k);
#pragma unroll
    for (int t = 0; t < STEPS; t++) wgmma_across(dq, a + 128 * t, b + 128 * t, t);
    wgmma_commit();

    const u32 width = heads * 64;
    bf16* to = dqkv + (u64)(item / heads) * LENGTH * 3 * width + item % heads * 64;
    // v and out are no longer needed: rows of out's tile take this warp's results on their way,
    // rows of v's those of the warps past the end, which nobody sees.
    unsigned char* by = first < LENGTH ? o + first * 128 : v;
    wgmma_wait<2>();
    settle(dv);
    store_rows(dv, by, first, to + 2 * width, 3 * width);
    float c[16], sn[16];
#pragma unroll
    for (int j = 0; j < 8; j++) {  // two columns each: tile j / 2, row j % 2
      float2 x = {1, 1}, y = {0, 0};
      if (ROPE) {
        int r = min(row + j % 2 * 8, LENGTH - 1);
        int at = (int)(chunk_of(table.cos, r, lane % 4 / 2 * 4 + j / 2) - table.cos) + lane % 2 * 8;
        x = *(const float2*)(table.cos + at), y = *(const float2*)(table.sin + at);
      }
      c[2 * j] = x.x * SCALE, c[2 * j + 1] = x.y * SCALE;
      sn[2 * j] = y.x * SCALE, sn[2 * j + 1] = y.y * SCALE;
    }
    wgmma_wait<1>();
    settle(dk);
    rotate_back(dk, c, sn);
    store_rows(dk, by, first, to + width, 3 * width);
    wgmma_wait<0>();
    settle(dq);
    rotate_back(dq, c, sn);
    store_rows(dq, by, first, to, 3 * width);
    release(bars, stage);
    item = next;
  }
}
