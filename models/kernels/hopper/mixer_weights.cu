// The gradients of the token mixer's weights, without the inner activations ever in global memory:
//
//     d W_gate = Σ d gateᵀ xᵀ      d W_up = Σ d upᵀ xᵀ      d W_downᵀ = Σ hᵀ dyᵀ
//
// over features and puzzles, (inner, tokens) each, one below the other. A thread block owns a slice of 64 inner features,
// whose weights stay in shared memory, and a share of the tiles, which pass by in pairs. Each of
// two warpgroups forms d gate, d up and h of its tile of 64 features (as mixer_backward.cu does)
// and lays them into shared memory; then, from both tiles, one sums up d W_gate, the other d W_up,
// and each the half of d W_downᵀ that belongs to its half of the tokens. The blocks of a cluster own
// neighbouring slices and share what they read. Sums over the shares are left to the caller.
//
// Compile-time: J, NT and KT (tokens padded to 8 and 16), STAGES, CLUSTER, SLICES = J / 64, NORMED;
// from compile.py wgmma_inner (64 columns), wgmma_half (32), and with both operands in shared memory,
// the first transposed, wgmma_tokens (NT columns) and wgmma_part (PART).

constexpr int WEIGHTS_BYTES = 2 * STAGE_BYTES;    // 64 inner features, 32 at a time
constexpr int PAIR_BYTES = 4 * X_BYTES;           // x and dy of the first tile, of the second
constexpr int INNER_BYTES = 128 * 128;            // 128 features, 64 inner features

struct Shared {
  u64 weights;                                    // have come
  u64 full[STAGES], empty[STAGES];                // a pair of tiles has come; may be overwritten
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
mixer_weights(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap dy_map,
              const __grid_constant__ TensorMap gu_map, const __grid_constant__ TensorMap down_map,
              float* __restrict__ parts, u32 B, u32 D, const float* __restrict__ scales,
              const float* __restrict__ slopes) {
  extern __shared__ unsigned char dynamic[];
  unsigned char* weights = dynamic + (-address(dynamic) & 1023);
  unsigned char* pairs = weights + WEIGHTS_BYTES;
  unsigned char* inner = pairs + STAGES * PAIR_BYTES;  // d gate, d up, h
  Shared& s = *(Shared*)(inner + 3 * INNER_BYTES);

  if (threadIdx.x == 0) {
    barrier_init(&s.weights, 1);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], CLUSTER * 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();

  const u32 rank = cluster_rank(), across = D / 64;
  const u32 count = (B * across + 1) / 2;              // pairs of tiles
  const u32 shares = gridDim.x / SLICES, share = blockIdx.x / SLICES;
  const int slice = blockIdx.x % SLICES * 64;
  const int group = threadIdx.x / 128 - 1;

  if (group < 0) {  // ---- the loading warpgroup: one thread of it
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      barrier_expect(&s.weights, WEIGHTS_BYTES);
      for (int i = 0; i < 2; i++)
        for (int block = 0; block < 2 * BLOCKS; block++)
          load_weights<false>(weights + i * STAGE_BYTES, block, &gu_map, &down_map, &s.weights,
                              slice + i * 32);
      u32 stage = 0, phase = 1;
      for (u32 pair = share; pair < count; pair += shares) {
        barrier_wait(&s.empty[stage], phase);
        barrier_expect(&s.full[stage], PAIR_BYTES);
#pragma unroll 1
        for (u32 i = 0; i < 2; i++) {
          if (i % CLUSTER != rank && CLUSTER > 1) continue;
          u32 tile = pair * 2 + i;  // one past the last tile is read as zero
          unsigned char* to = pairs + stage * PAIR_BYTES + i * 2 * X_BYTES;
          load3<(CLUSTER > 1)>(to, &x_map, &s.full[stage], tile % across * 64, 0, tile / across,
                               (1 << CLUSTER) - 1);
          load3<(CLUSTER > 1)>(to + X_BYTES, &dy_map, &s.full[stage], tile % across * 64, 0,
                               tile / across, (1 << CLUSTER) - 1);
        }
        if (++stage == STAGES) { stage = 0; phase ^= 1; }
      }
    }
  } else {  // ---- a multiplying warpgroup
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    // Of four 8 × 8 matrices, lane / 8 is the one whose row lane % 8 this lane addresses.
    const u32 x_at = address(pairs) + group * 2 * X_BYTES + (lane / 16 * 8 + lane % 8) * 128 +
                     ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;
    const u32 inner_at = address(inner) + (group * 64 + warp * 16 + lane % 16) * 128 +
                         ((lane / 16) ^ (lane % 8)) * 16;
    const u32 weights_at = address(weights);
    const u32 a_at = address(inner) + group * INNER_BYTES;      // d gate or d up
    const u32 h_at = address(inner) + 2 * INNER_BYTES;
    const u32 skip = group * (NT - PART);                       // tokens, of d W_downᵀ
    u32 stage = 0, phase = 0;

    float acc[NT / 2], part[PART / 2], gu[32], dh[16];
    float scale[2] = {0, 0}, slope[2] = {0, 0};                 // of the tile in x and dy
    u32 x[KSTEPS][4], dy[KSTEPS][4], dgate[2][4], dup[2][4], h[2][4];
#pragma unroll
    for (int i = 0; i < NT / 2; i++) acc[i] = 0;
#pragma unroll
    for (int i = 0; i < PART / 2; i++) part[i] = 0;

    auto load = [&](u32 pair) {
      const u32 tile = pair * 2 + group, row = tile * 64 + warp * 16 + lane / 4;
      if (NORMED && tile < B * across) {
        scale[0] = scales[row], scale[1] = scales[row + 8];
        slope[0] = slopes[row], slope[1] = slopes[row + 8];
      }
      barrier_wait(&s.full[stage], phase);
#pragma unroll
      for (int k = 0; k < KSTEPS; k++) {
        matrices_load_t(x[k], x_at + stage * PAIR_BYTES + k * 2048);
        matrices_load_t(dy[k], x_at + stage * PAIR_BYTES + X_BYTES + k * 2048);
      }
    };
    auto put = [&](int i) {  // 32 inner features into shared memory
#pragma unroll
      for (int k = 0; k < 2; k++) {
        matrices_store(inner_at ^ (i * 64 + k * 32), dgate[k]);
        matrices_store((inner_at + INNER_BYTES) ^ (i * 64 + k * 32), dup[k]);
        matrices_store((inner_at + 2 * INNER_BYTES) ^ (i * 64 + k * 32), h[k]);
      }
    };
    auto sums = [&](u32 tiles_at) {  // over the 128 features of both tiles
#pragma unroll
      for (int k = 0; k < 8; k++) {
        u32 b = tiles_at + k / 4 * 2 * X_BYTES + k % 4 * 32;
        wgmma_tokens(acc, descriptor(a_at + k * 2048), descriptor(b), 1);
        wgmma_part(part, descriptor(h_at + k * 2048), descriptor(b + X_BYTES + skip * 128), 1);
      }
    };

    barrier_wait(&s.weights, 0);
    if (share < count) {
      load(share);
      wgmma_fence();
      inner_products(gu, dh, x, dy, weights_at);
      wgmma_commit();
      wgmma_wait();
      settle(gu);
      settle(dh);
    }
#pragma unroll 1
    for (u32 pair = share; pair < count; pair += shares) {
      inner_gradients(gu, dh, scale, slope, dgate, dup, h);
      wgmma_fence();
      inner_products(gu, dh, x, dy, weights_at + STAGE_BYTES);
      wgmma_commit();
      named_sync(1, 256);  // both have summed up the pair before
      put(0);
      wgmma_wait();
      settle(gu);
      settle(dh);
      inner_gradients(gu, dh, scale, slope, dgate, dup, h);
      put(1);
      fence_async();
      named_sync(2, 256);  // both tiles' inner gradients are there
      const u32 before = stage, tiles_at = address(pairs) + stage * PAIR_BYTES;
      if (++stage == STAGES) { stage = 0; phase ^= 1; }
      if (pair + shares < count) {
        load(pair + shares);
        wgmma_fence();
        sums(tiles_at);
        inner_products(gu, dh, x, dy, weights_at);
        wgmma_commit();
      } else {
        wgmma_fence();
        sums(tiles_at);
        wgmma_commit();
      }
      wgmma_wait();
      settle(acc);
      settle(part);
      settle(gu);
      settle(dh);
      if (lane < CLUSTER) barrier_arrive(&s.empty[before], lane);
    }

    const u32 row = slice + warp * 16 + lane / 4, token = lane % 4 * 2;
    float* to = parts + ((u64)share * 3 * J + group * J + row) * NT + token;
#pragma unroll
    for (int i = 0; i < NT / 4; i++)  // pairs of tokens, of rows 8 apart
      *(float2*)(to + i % 2 * 8 * NT + i / 2 * 8) = make_float2(acc[2 * i], acc[2 * i + 1]);
    to = parts + ((u64)share * 3 * J + 2 * J + row) * NT + token;
#pragma unroll
    for (int i = 0; i < PART / 4; i++) {
      u32 n = skip + i / 2 * 8;
      if (group == 0 || n >= PART)  // the halves may overlap
        *(float2*)(to + i % 2 * 8 * NT + n) = make_float2(part[2 * i], part[2 * i + 1]);
    }
  }
  cluster_sync();  // no block leaves while another may still signal its barriers
}
