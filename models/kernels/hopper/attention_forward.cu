// out = softmax(q kᵀ / 8) v of rotated q and k; see attention_short.cu.

constexpr int STAGE_BYTES = 3 * TILE;  // q, k, v

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(TEAM * TEAMS + 128, 1)
attend(const __grid_constant__ TensorMap qkv_map, const float* __restrict__ cos,
       const float* __restrict__ sin, bf16* __restrict__ out, float* __restrict__ lse, u32 heads,
       u32 items) {
  unsigned char* stages = aligned_shared();
  unsigned char* after = stages + STAGES * STAGE_BYTES;
  Table table = {after, after + TABLE / 2};
  Barriers& bars = *(Barriers*)(after + TABLE + SLACK);
  init(bars);
  __syncthreads();

  if (threadIdx.x >= TEAM * TEAMS) {  // ---- the loading warpgroup: one thread of it
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x % 128) return;
    int i = 0;
    for (u32 item = blockIdx.x; item < items; item += gridDim.x, i++) {
      int stage = i % STAGES, head = item % heads, puzzle = item / heads;
      barrier_wait(&bars.empty[stage], (i / STAGES & 1) ^ 1);
      barrier_expect(&bars.full[stage], STAGE_BYTES);
      for (int p = 0; p < 3; p++)
        load_tile(stages + stage * STAGE_BYTES + p * TILE, &qkv_map, &bars.full[stage],
                  (p * heads + head) * 64, 0, puzzle);
    }
    return;
  }

  // ---- a team: its items are every TEAMS-th of the block's, so its stages are its own
  // The block starts with 96 registers a thread, or 168; the loading warpgroup lends 16, or 72.
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(TEAM * TEAMS > 256 ? 112 : 240));
  const int team = threadIdx.x / TEAM, rank = threadIdx.x % TEAM, block = rank / 128;
  const int lane = threadIdx.x % 32, first = block * 64 + rank / 32 % 4 * 16;  // row of the warp
  const int row = first + lane / 4;                                           // and row + 8
  if (ROPE) table.fill(cos, sin);
  int i = team;
  for (u32 item = blockIdx.x + team * gridDim.x; item < items;
       item += TEAMS * gridDim.x, i += TEAMS) {
    const int stage = i % STAGES;
    unsigned char* q = stages + stage * STAGE_BYTES;
    unsigned char *k = q + TILE, *v = k + TILE;
    barrier_wait(&bars.full[stage], i / STAGES & 1);
    if (ROPE) {
      for (int j = rank; j < 4 * N; j += TEAM)
        if (row_of(j) < LENGTH) rotate_both(q, k, table, row_of(j), j % 4);
      proxy_fence();
      sync_threads(1 + team, TEAM);
    }

    float s[N / 2];
    wgmma_begin();
    scores(s, q + block * 8192, k);
    wgmma_wait<0>();
    settle(s);
    sync_threads(8 + threadIdx.x / 128, 128);  // q's rows of this block are free for the result

    u32 p[4 * STEPS];
    float top[2] = {0, 0}, total[2] = {0, 0};
    if (first < LENGTH) {  // else the whole warp is past the end
#pragma unroll
      for (int j = 0; j < N / 2; j++) {
        int column = j / 4 * 8 + lane % 4 * 2 + j % 2;
        if ((j / 4 * 8 + 8 > LENGTH && column >= LENGTH) ||
            (CAUSAL && column > row + j / 2 % 2 * 8))
          s[j] = __uint_as_float(0xFF800000u);
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float most = s[2 * h];
#pragma unroll
        for (int j = 2 * h; j < N / 2; j += 4) most = fmaxf(most, fmaxf(s[j], s[j + 1]));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        top[h] = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        float offset = top[h] * (SCALE * LOG2E);
#pragma unroll
        for (int j = 2 * h; j < N / 2; j += 4)
#pragma unroll
          for (int b = 0; b < 2; b++) {
            s[j + b] = power2(s[j + b] * (SCALE * LOG2E) - offset);
            total[h] += s[j + b];
          }
      }
    }
    pack(p, s);

    float o[32];
    settle(p);
    wgmma_begin();
    mix(o, p, v);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      total[h] += __shfl_xor_sync(~0u, total[h], 1);
      total[h] += __shfl_xor_sync(~0u, total[h], 2);
      if (SAVE && lane % 4 == 0 && row + 8 * h < LENGTH)
        lse[(u64)item * LENGTH + row + 8 * h] = top[h] * SCALE + __logf(total[h]);
    }
    wgmma_wait<0>();
    settle(o);
    if (first < LENGTH) {
      float factor[2] = {1 / total[0], 1 / total[1]};
#pragma unroll
      for (int j = 0; j < 32; j++) o[j] *= factor[j / 2 % 2];
      u32 width = heads * 64;
      bf16* to = out + (u64)(item / heads) * LENGTH * width + item % heads * 64;
      store_rows(o, q + first * 128, first, to, width);
    }
    release(bars, stage);
  }
}
