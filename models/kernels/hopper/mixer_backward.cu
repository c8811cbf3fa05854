// The backward of mixer.cu. With y = x + W_down h, h = silu(gate) ⊙ up and out = inv y:
//
//     dy = inv (dout - out mean(dout out))         dh = W_downᵀ dy
//     d up = dh silu(gate)                         d gate = dh up silu'(gate)
//     dx = dy + W_gateᵀ d gate + W_upᵀ d up        d W_gate = Σ d gate xᵀ, …: another kernel's
//
// gate and up are formed anew. Tiles and registers are as in the forward; a stage is 32 inner
// features. W_gate and W_up serve twice: as (inner, tokens), and transposed for dx. With INNER,
// what the weights' gradients need (d gate, d up, h) leaves through shared memory by tensor copies,
// each warp its 16 features, so that these stores, which bound this kernel, run beside the products.
// Without, mixer_weights.cu forms it once more.
//
// NORMED, as in mixer.cu: h is times the inner norm's factor f, and gate ⊙ up, by way of f, gets the
// gradient slope gate ⊙ up besides, slope = -f² Σ dy (y - x) / J: y - x is what f multiplies.
//
// Compile-time: J, NT and KT (tokens padded to 8 and 16), STAGES, WGS, CLUSTER, INNER, NORMED; from
// compile.py wgmma_inner (64 columns), wgmma_half (32) and wgmma_tokens (NT, transposed).

constexpr int SLOT_BYTES = 4 * 3 * 1024;          // 4 warps; d gate, d up, h of 16 × 32
constexpr int OUT_BYTES = INNER ? 2 * SLOT_BYTES : NT * 128;  // for dy and dx, too
constexpr int STEPS = J / 32;                     // stages of a tile

struct Shared {
  u64 full[STAGES], empty[STAGES];                // a stage's bytes have come; may be overwritten
  u64 x_full[WGS], x_empty[WGS];                  // of x, out and dout
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(128 * (WGS + 1), 1)
mixer_backward(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap out_map,
               const __grid_constant__ TensorMap dout_map,
               const __grid_constant__ TensorMap gu_map, const __grid_constant__ TensorMap down_map,
               const __grid_constant__ TensorMap dx_map, const __grid_constant__ TensorMap dy_map,
               const __grid_constant__ TensorMap dgu_map, const __grid_constant__ TensorMap h_map,
               const float* __restrict__ inv_in, u32 B, u32 D, float mean,
               float* __restrict__ slopes, float inner_mean) {
  extern __shared__ unsigned char dynamic[];
  unsigned char* stages = dynamic + (-address(dynamic) & 1023);
  unsigned char* xs = stages + STAGES * STAGE_BYTES;
  unsigned char* outs = xs + WGS * 3 * X_BYTES;
  Shared& s = *(Shared*)(outs + WGS * OUT_BYTES);

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], CLUSTER * 4 * WGS);
    }
    for (int i = 0; i < WGS; i++) {
      barrier_init(&s.x_full[i], 1);
      barrier_init(&s.x_empty[i], 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();

  const u32 rank = cluster_rank(), across = D / 64, tiles = B * across;
  const u32 clusters = gridDim.x / CLUSTER, rounds = (tiles + CLUSTER * WGS - 1) / (CLUSTER * WGS);
  const int group = threadIdx.x / 128 - 1;
  // A tile past the last one is a puzzle past the last: read as zero, not written.

  if (group < 0) {  // ---- the loading warpgroup: one thread of it
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WGS == 2 ? 24 : 32));
    if (threadIdx.x == 0) {
      u32 stage = 0, phase = 1, x_phase = 1;
      for (u32 round = blockIdx.x / CLUSTER; round < rounds; round += clusters) {
#pragma unroll 1
        for (int w = 0; w < WGS; w++) {
          u32 tile = (round * CLUSTER + rank) * WGS + w;
          int d = tile % across * 64, b = tile / across;
          unsigned char* to = xs + w * 3 * X_BYTES;
          barrier_wait(&s.x_empty[w], x_phase);
          barrier_expect(&s.x_full[w], 3 * X_BYTES);
          load3<false>(to, &out_map, &s.x_full[w], d, 0, b, 0);
          load3<false>(to + X_BYTES, &dout_map, &s.x_full[w], d, 0, b, 0);
          load3<false>(to + 2 * X_BYTES, &x_map, &s.x_full[w], d, 0, b, 0);
        }
        x_phase ^= 1;
#pragma unroll 1
        for (int step = 0; step < STEPS; step++) {
          unsigned char* to = stages + stage * STAGE_BYTES;
          barrier_wait(&s.empty[stage], phase);
          barrier_expect(&s.full[stage], STAGE_BYTES);
          for (int i = 0; i < 2 * BLOCKS; i++)  // the blocks of a cluster take turns
            if (i % CLUSTER == rank)
              load_weights<(CLUSTER > 1)>(to, i, &gu_map, &down_map, &s.full[stage], step * 32);
          if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
      }
    }
  } else {  // ---- a multiplying warpgroup
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WGS == 2 ? 240 : 160));
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const bool leader = threadIdx.x % 128 == 0;
    // Of four 8 × 8 matrices, lane / 8 is the one whose row lane % 8 this lane addresses.
    const u32 chunk = ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;  // of a row of 64 features
    const u32 x_at = address(xs + group * 3 * X_BYTES) + (lane / 16 * 8 + lane % 8) * 128 + chunk;
    const u32 out_at = address(outs + group * OUT_BYTES) + lane % 8 * 128 + chunk;
    const u32 inner_at = address(outs + group * OUT_BYTES) + warp * 3072 + lane % 16 * 64 +
                         ((lane / 16) ^ (lane % 8 / 2)) * 16;         // rows of 32 inner features
    const u32 first = address(stages);
    u32 stage = 0, phase = 0, x_phase = 0;

    float acc[NT / 2], gu[32], dh[16];
    u32 x[KSTEPS][4], dy[KSTEPS][4], dgate[2][4], dup[2][4], h[2][4];

    for (u32 round = blockIdx.x / CLUSTER; round < rounds; round += clusters) {
      const u32 tile = (round * CLUSTER + rank) * WGS + group;
      const u32 row = tile * 64 + warp * 16;  // tiles lie as (B, D) does
      const int d = tile % across * 64, b = tile / across;
      // dy: rounded, as an operand, and in full as what the products for dx are added to
      float inv[2] = {0, 0}, dot[2] = {0, 0};  // of features lane / 4 and lane / 4 + 8
      if (tile < tiles) {
        inv[0] = inv_in[row + lane / 4];
        inv[1] = inv_in[row + lane / 4 + 8];
      }
      float scale[2] = {0, 0}, slope[2] = {0, 0}, root[2] = {0, 0};
      if (NORMED && tile < tiles) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          scale[r] = inv_in[(u64)B * D + row + lane / 4 + 8 * r];
          root[r] = 1 / inv[r];
        }
      }
      barrier_wait(&s.x_full[group], x_phase);
      x_phase ^= 1;
#pragma unroll
      for (int k = 0; k < KSTEPS; k++) {
        u32 o[4], g[4];
        matrices_load_t(o, x_at + k * 2048);
        matrices_load_t(g, x_at + X_BYTES + k * 2048);
#pragma unroll
        for (int r = 0; r < 4; r++)
          dot[r % 2] += low(o[r]) * low(g[r]) + high(o[r]) * high(g[r]);
      }
      dot[0] = sum4(dot[0]) * mean;
      dot[1] = sum4(dot[1]) * mean;
#pragma unroll
      for (int k = 0; k < KSTEPS; k++) {
        u32 o[4], g[4];
        matrices_load_t(o, x_at + k * 2048);
        matrices_load_t(g, x_at + X_BYTES + k * 2048);
        matrices_load_t(x[k], x_at + 2 * X_BYTES + k * 2048);
#pragma unroll
        for (int r = 0; r < 4; r++) {
          float v0 = (low(g[r]) - low(o[r]) * dot[r % 2]) * inv[r % 2];
          float v1 = (high(g[r]) - high(o[r]) * dot[r % 2]) * inv[r % 2];
          dy[k][r] = pack(v0, v1);
          if (NORMED) {
            slope[r % 2] = fmaf(v0, low(o[r]) * root[r % 2] - low(x[k][r]), slope[r % 2]);
            slope[r % 2] = fmaf(v1, high(o[r]) * root[r % 2] - high(x[k][r]), slope[r % 2]);
          }
          int at = 8 * k + r / 2 * 4 + r % 2 * 2;
          if (at < NT / 2) {
            acc[at] = v0;
            acc[at + 1] = v1;
          }
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(&s.x_empty[group]);
      if (NORMED) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          slope[r] = -scale[r] * scale[r] * inner_mean * sum4(slope[r]);
          if (lane % 4 == 0 && tile < tiles) slopes[row + lane / 4 + 8 * r] = slope[r];
        }
      }

      if (leader) stores_wait_read<0>();  // dx of the tile before
      named_sync(8 + group, 128);
#pragma unroll
      for (int n = 0; n < NT / 8; n++)
        matrices_store_t(out_at + n * 1024, dy[n / 2][n % 2 * 2], dy[n / 2][n % 2 * 2 + 1]);
      fence_async();
      named_sync(8 + group, 128);
      if (leader) {
        store3(&dy_map, outs + group * OUT_BYTES, d, 0, b);
        stores_commit();
      }

      barrier_wait(&s.full[stage], phase);
      wgmma_fence();
      inner_products(gu, dh, x, dy, first + stage * STAGE_BYTES);
      wgmma_commit();
      wgmma_wait();
      settle(gu);
      settle(dh);
      if (leader) stores_wait_read<0>();  // dy
      named_sync(8 + group, 128);
#pragma unroll 1
      for (int step = 0; step < STEPS; step++) {
        inner_gradients(gu, dh, scale, slope, dgate, dup, h);
        const u32 slot = step % 2 * SLOT_BYTES;
        if (INNER) {
          if (lane == 0) stores_wait_read<1>();  // of the step before the last
          __syncwarp();
#pragma unroll
          for (int k = 0; k < 2; k++) {
            matrices_store((inner_at + slot) ^ (k * 32), dgate[k]);
            matrices_store((inner_at + slot + 1024) ^ (k * 32), dup[k]);
            matrices_store((inner_at + slot + 2048) ^ (k * 32), h[k]);
          }
        }
        const u32 at = first + stage * STAGE_BYTES;
        const u32 before = stage;
        const bool more = step + 1 < STEPS;
        if (++stage == STAGES) { stage = 0; phase ^= 1; }
        if (more) barrier_wait(&s.full[stage], phase);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 2; k++) {
          wgmma_tokens(acc, dgate[k], descriptor(at + k * 2048, GU_BYTES), 1);
          wgmma_tokens(acc, dup[k], descriptor(at + 4096 + k * 2048, GU_BYTES), 1);
        }
        if (more) {
          inner_products(gu, dh, x, dy, first + stage * STAGE_BYTES);
          wgmma_commit();
        } else {
          wgmma_commit();
        }
        if (INNER) {
          fence_async();
          __syncwarp();
          if (lane == 0) {
            unsigned char* from = outs + group * OUT_BYTES + slot + warp * 3072;
            store2(&dgu_map, from, step * 32, row);
            store2(&dgu_map, from + 1024, J + step * 32, row);
            store2(&h_map, from + 2048, step * 32, row);
            stores_commit();
          }
        }
        wgmma_wait();
        settle(acc);
        settle(gu);
        settle(dh);
        if (lane < CLUSTER) barrier_arrive(&s.empty[before], lane);
      }

      if (lane == 0) stores_wait_read<0>();
      named_sync(8 + group, 128);
#pragma unroll
      for (int n = 0; n < NT / 8; n++)
        matrices_store_t(out_at + n * 1024, pack(acc[4 * n], acc[4 * n + 1]),
                         pack(acc[4 * n + 2], acc[4 * n + 3]));
      fence_async();
      named_sync(8 + group, 128);
      if (leader) {
        store3(&dx_map, outs + group * OUT_BYTES, d, 0, b);
        stores_commit();
      }
    }
    if (lane == 0) stores_wait();
  }
  cluster_sync();  // no block leaves while another may still signal its barriers
}
