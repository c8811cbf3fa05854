// What mixer_backward.cu and mixer_weights.cu share: 32 inner features of 64 features of a puzzle.
//
// gate, up and dh are (features, inner), from x and dy in registers (features, tokens) and W_gate,
// W_up and W_downᵀ in shared memory, (inner, tokens) in blocks of 64 tokens.

constexpr int KSTEPS = KT / 16;                   // of a sum over tokens
constexpr int BLOCKS = (KT + 63) / 64;            // of 64 tokens: 128 bytes, a swizzled row
constexpr int GU_BYTES = 64 * 128;                // 32 rows of gate, 32 of up; 64 tokens
constexpr int DOWN_BYTES = 32 * 128;
constexpr int STAGE_BYTES = BLOCKS * (GU_BYTES + DOWN_BYTES);
constexpr int X_BYTES = KT * 128;

// Block 0, 1, … of the 2 · BLOCKS that make up these weights.
template <bool MULTICAST>
__device__ __forceinline__ void load_weights(unsigned char* to, int block, const TensorMap* gu_map,
                                             const TensorMap* down_map, u64* bar, int inner) {
  const bool gu = block < BLOCKS;
  load3<MULTICAST>(
      to + (gu ? block * GU_BYTES : BLOCKS * GU_BYTES + (block - BLOCKS) * DOWN_BYTES),
      gu ? gu_map : down_map, bar, block % BLOCKS * 64, inner, 0, (1 << CLUSTER) - 1);
}

// gu = x [W_gate | W_up]ᵀ, dh = dy W_down
__device__ __forceinline__ void inner_products(float (&gu)[32], float (&dh)[16],
                                               const u32 (&x)[KSTEPS][4],
                                               const u32 (&dy)[KSTEPS][4], u32 at) {
#pragma unroll
  for (int k = 0; k < KSTEPS; k++)
    wgmma_inner(gu, x[k], descriptor(at + k / 4 * GU_BYTES + k % 4 * 32), k != 0);
#pragma unroll
  for (int k = 0; k < KSTEPS; k++)
    wgmma_half(dh, dy[k], descriptor(at + BLOCKS * GU_BYTES + k / 4 * DOWN_BYTES + k % 4 * 32),
               k != 0);
}

// NORMED: scale, of this thread's two features, is the inner norm's factor, by which gate ⊙ up gets
// the gradient slope gate ⊙ up besides.
__device__ __forceinline__ void inner_gradients(const float (&gu)[32], const float (&dh)[16],
                                                const float (&scale)[2], const float (&slope)[2],
                                                u32 (&dgate)[2][4], u32 (&dup)[2][4],
                                                u32 (&h)[2][4]) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int at = i / 2 * 4 + i % 2 * 2;
    float a[2], u[2], v[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float half = 0.5f * gu[at + j], up = gu[16 + at + j], t = tanh_approx(half);
      float silu = fmaf(half, t, half), sigmoid = fmaf(0.5f, t, 0.5f);
      float d = NORMED ? dh[at + j] * scale[i % 2] : dh[at + j];
      v[j] = NORMED ? silu * up * scale[i % 2] : silu * up;
      u[j] = d * silu;
      a[j] = d * up * fmaf(silu, fmaf(-0.5f, t, 0.5f), sigmoid);
      if (NORMED) {
        float gate = gu[at + j], product = slope[i % 2] * gate * up;
        u[j] = fmaf(product, gate, u[j]);
        a[j] = fmaf(product, up, a[j]);
      }
    }
    dgate[i / 4][i % 4] = pack(a[0], a[1]);
    dup[i / 4][i % 4] = pack(u[0], u[1]);
    h[i / 4][i % 4] = pack(v[0], v[1]);
  }
}
