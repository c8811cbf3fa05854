// The token mixer of TRM-MLP on Hopper: out = norm(x + W_down(silu(W_gate x) ⊙ W_up x)), along the
// tokens of each feature.
//
// A multiplying warpgroup owns a tile: 64 features of one puzzle, all tokens. Everything it holds
// is (features, tokens) or (features, inner), so that what one product leaves in the accumulators
// is, rounded, the next one's operand in registers; x, too, is in registers for the whole tile
// (loaded transposed). Only weights are read from shared memory: one warpgroup streams them past
// the others in stages of 64 inner features, each stage shared by all warpgroups of a cluster.
//
// Compile-time: J (inner), NT and KT (tokens padded to 8 and 16), CH (inner features at a time),
// STAGES, WGS, CLUSTER, TURNS (warpgroups issue products in turn), SAVE, NORMED; from compile.py
// wgmma_inner (2 CH columns) and wgmma_tokens (NT columns).
//
// NORMED: out = norm(x + W_down(sigmoid(gate) ⊙ RMSNorm(gate ⊙ up))). The inner norm's factor of a
// feature goes through W_down, so the products are the same, and it multiplies what they add up to.

constexpr int KSTEPS = KT / 16;                   // of a sum over tokens
constexpr int BLOCKS = (KT + 63) / 64;            // of 64 tokens: 128 bytes, a swizzled row
constexpr int PARTS = 64 / CH;                    // of a stage
constexpr int GU_BYTES = 2 * CH * 128;            // CH rows of gate, CH of up; 64 tokens
constexpr int DOWN_BYTES = NT * 128;              // NT tokens, 64 inner features
constexpr int STAGE_BYTES = PARTS * BLOCKS * GU_BYTES + DOWN_BYTES;
constexpr int X_BYTES = KT * 128, OUT_BYTES = NT * 128;
constexpr int STEPS = J / 64;                     // stages of a tile

struct Shared {
  u64 full[STAGES], empty[STAGES];                // a stage's bytes have come; may be overwritten
  u64 x_full[WGS], x_empty[WGS];
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(128 * (WGS + 1), 1)
mixer(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap gu_map,
      const __grid_constant__ TensorMap down_map, const __grid_constant__ TensorMap out_map,
      float* __restrict__ inv_out, u32 B, u32 D, float mean, float eps, float inner_mean) {
  extern __shared__ unsigned char dynamic[];
  unsigned char* stages = dynamic + (-address(dynamic) & 1023);
  unsigned char* xs = stages + STAGES * STAGE_BYTES;
  unsigned char* outs = xs + WGS * X_BYTES;
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
        for (int w = 0; w < WGS; w++) {
          u32 tile = (round * CLUSTER + rank) * WGS + w;
          barrier_wait(&s.x_empty[w], x_phase);
          barrier_expect(&s.x_full[w], X_BYTES);
          load3<false>(xs + w * X_BYTES, &x_map, &s.x_full[w], tile % across * 64, 0,
                       tile / across, 0);
        }
        x_phase ^= 1;
#pragma unroll 1
        for (int step = 0; step < STEPS; step++) {
          unsigned char* to = stages + stage * STAGE_BYTES;
          barrier_wait(&s.empty[stage], phase);
          barrier_expect(&s.full[stage], STAGE_BYTES);
          for (int i = 0; i < PARTS * BLOCKS; i++)  // the blocks of a cluster take turns
            if (i % CLUSTER == rank)
              load3<(CLUSTER > 1)>(to + i * GU_BYTES, &gu_map, &s.full[stage], i % BLOCKS * 64,
                                   step * 64 + i / BLOCKS * CH, 0, (1 << CLUSTER) - 1);
          if (step % CLUSTER == rank)
            load3<(CLUSTER > 1)>(to + PARTS * BLOCKS * GU_BYTES, &down_map, &s.full[stage],
                                 step * 64, 0, 0, (1 << CLUSTER) - 1);
          if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
      }
    }
  } else {  // ---- a multiplying warpgroup
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WGS == 2 ? 240 : 160));
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    // Of four 8 × 8 matrices, lane / 8 is the one whose row lane % 8 this lane addresses: tokens
    // 0-7 or 8-15, features 0-7 or 8-15 of this warp's 16.
    const u32 row = (lane / 16 * 8 + lane % 8) * 128;
    const u32 chunk = ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;
    const u32 x_at = address(xs + group * X_BYTES) + row + chunk;
    const u32 out_at = address(outs + group * OUT_BYTES) + lane % 8 * 128 + chunk;
    const u32 first = address(stages);
    u32 stage = 0, phase = 0, x_phase = 0;
    if (TURNS && group == WGS - 1) named_arrive(1, 256);

    float acc[NT / 2], gu[CH];
    u32 x[KSTEPS][4], h[CH / 16][4];
    auto products = [&](int part) {  // gu = x [W_gate | W_up]ᵀ
      u32 at = first + stage * STAGE_BYTES + part * BLOCKS * GU_BYTES;
#pragma unroll
      for (int k = 0; k < KSTEPS; k++)
        wgmma_inner(gu, x[k], descriptor(at + k / 4 * GU_BYTES + k % 4 * 32), k != 0);
    };

    for (u32 round = blockIdx.x / CLUSTER; round < rounds; round += clusters) {
      barrier_wait(&s.x_full[group], x_phase);
      x_phase ^= 1;
#pragma unroll
      for (int k = 0; k < KSTEPS; k++) matrices_load_t(x[k], x_at + k * 2048);
      __syncwarp();
      if (lane == 0) barrier_arrive(&s.x_empty[group]);
#pragma unroll
      for (int i = 0; i < NT / 2; i++) {  // the residual
        u32 pair = x[i / 8][i / 4 % 2 * 2 + i / 2 % 2];
        acc[i] = NORMED ? 0 : i % 2 ? high(pair) : low(pair);
      }
      float squares[2] = {0, 0};  // of gate up, of features lane / 4 and lane / 4 + 8
      barrier_wait(&s.full[stage], phase);
      if (TURNS) named_sync(1 + group, 256);
      wgmma_fence();
      products(0);
      wgmma_commit();
      if (TURNS) named_arrive(1 + (group + 1) % WGS, 256);
      wgmma_wait();
      settle(gu);
#pragma unroll 1
      for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
#pragma unroll
          for (int i = 0; i < CH / 4; i++) {  // pairs of h = silu(gate) up
            int at = i / 2 * 4 + i % 2 * 2;
            float v[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
              float half = 0.5f * gu[at + j];  // silu(g) = g / 2 + g / 2 tanh(g / 2)
              v[j] = fmaf(half, tanh_approx(half), half) * gu[CH / 2 + at + j];
              float product = gu[at + j] * gu[CH / 2 + at + j];
              if (NORMED) squares[i % 2] = fmaf(product, product, squares[i % 2]);
            }
            h[i / 4][i % 4] = pack(v[0], v[1]);
          }
          u32 down = first + stage * STAGE_BYTES + PARTS * BLOCKS * GU_BYTES + part * CH * 2;
          bool more = part + 1 < PARTS || step + 1 < STEPS;
          if (part + 1 == PARTS) {
            if (++stage == STAGES) { stage = 0; phase ^= 1; }
            if (more) barrier_wait(&s.full[stage], phase);
          }
          if (TURNS) named_sync(1 + group, 256);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < CH / 16; k++) wgmma_tokens(acc, h[k], descriptor(down + k * 32), 1);
          if (more) {
            products((part + 1) % PARTS);
            wgmma_commit();
          } else {
            wgmma_commit();
          }
          if (TURNS) named_arrive(1 + (group + 1) % WGS, 256);
          wgmma_wait();
          settle(acc);
          settle(gu);
          if (part + 1 == PARTS && lane < CLUSTER)
            barrier_arrive(&s.empty[stage ? stage - 1 : STAGES - 1], lane);
        }
      }

      float inv[2] = {0, 0}, inner[2] = {1, 1};  // of features lane / 4 and lane / 4 + 8
      if (NORMED) {
        inner[0] = rsqrtf(sum4(squares[0]) * inner_mean + eps);
        inner[1] = rsqrtf(sum4(squares[1]) * inner_mean + eps);
#pragma unroll
        for (int i = 0; i < NT / 2; i++) {
          u32 pair = x[i / 8][i / 4 % 2 * 2 + i / 2 % 2];
          acc[i] = fmaf(acc[i], inner[i / 2 % 2], i % 2 ? high(pair) : low(pair));
        }
      }
#pragma unroll
      for (int i = 0; i < NT / 2; i++) inv[i / 2 % 2] += acc[i] * acc[i];
      inv[0] = rsqrtf(sum4(inv[0]) * mean + eps);
      inv[1] = rsqrtf(sum4(inv[1]) * mean + eps);
      u32 tile = (round * CLUSTER + rank) * WGS + group;
      if (SAVE && lane % 4 == 0 && tile < tiles) {
        float* to = inv_out + (u64)tile * 64 + warp * 16 + lane / 4;  // tiles lie as (B, D) does
        to[0] = inv[0];
        to[8] = inv[1];
        if (NORMED) {
          to += (u64)B * D;
          to[0] = inner[0];
          to[8] = inner[1];
        }
      }
      if (threadIdx.x % 128 == 0) stores_wait_read<0>();
      named_sync(8 + group, 128);
#pragma unroll
      for (int n = 0; n < NT / 8; n++)
        matrices_store_t(out_at + n * 1024,
                         pack(acc[4 * n] * inv[0], acc[4 * n + 1] * inv[0]),
                         pack(acc[4 * n + 2] * inv[1], acc[4 * n + 3] * inv[1]));
      fence_async();
      named_sync(8 + group, 128);
      if (threadIdx.x % 128 == 0) {
        store3(&out_map, outs + group * OUT_BYTES, tile % across * 64, 0, tile / across);
        stores_commit();
      }
    }
    if (threadIdx.x % 128 == 0) stores_wait();
  }
  cluster_sync();  // no block leaves while another may still signal its barriers
}
