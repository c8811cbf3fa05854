// What forward and backward of short attention share. One item of work is one head of one puzzle.
//
// One thread loads the items' tiles by TMA, two ahead for every team; a team of MB warpgroups,
// 64 tokens each, computes an item from tiles that lie in shared memory once.
//
// Compile-time: LENGTH (≤ 128), TEAMS, ROPE, CAUSAL, SAVE.

constexpr int N = (LENGTH + 7) / 8 * 8;          // columns of the scores
constexpr int LP = (LENGTH + 15) / 16 * 16;      // rows of a tile
constexpr int MB = (LENGTH + 63) / 64;           // warpgroups of a team, blocks of 64 rows
constexpr int STEPS = LP / 16;                   // of a sum over tokens
constexpr int TILE = LP * 128;
constexpr int STAGES = 2 * TEAMS;
constexpr int TEAM = 128 * MB;                   // threads
constexpr int TABLE = ROPE ? LENGTH * 256 : 0;   // bytes of cos and sin
constexpr int SLACK = LP < 64 ? 8192 : 0;        // wgmma reads 64 rows whatever a tile has

// cos and sin (L, 32) of a (L, 64) table with equal halves, in rows of 128 bytes swizzled like a
// tile; four floats of columns 8 c + 4 h … are chunk 4 h + c.
struct Table {
  unsigned char* cos;
  unsigned char* sin;

  // By the teams' threads together.
  __device__ __forceinline__ void fill(const float* cos_from, const float* sin_from) const {
    for (int i = threadIdx.x; i < LENGTH * 8; i += TEAM * TEAMS) {
      int row = i / 8, four = i % 8, at = four % 2 * 4 + four / 2;
      *(Four*)chunk_of(cos, row, at) = *(const Four*)(cos_from + row * 64 + 4 * four);
      *(Four*)chunk_of(sin, row, at) = *(const Four*)(sin_from + row * 64 + 4 * four);
    }
    sync_threads(15, TEAM * TEAMS);
  }
};

// q and k of the row turned by the angles of its position, in place.
__device__ __forceinline__ void rotate_both(unsigned char* q, unsigned char* k, const Table& table,
                                            int row, int c) {
  Four cos[2], sin[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    cos[h] = *(const Four*)chunk_of(table.cos, row, 4 * h + c);
    sin[h] = *(const Four*)chunk_of(table.sin, row, 4 * h + c);
  }
  rotate(q, row, c, cos, sin);
  rotate(k, row, c, cos, sin);
}

struct Barriers { u64 full[STAGES], empty[STAGES]; };  // a stage has come; it may be overwritten

__device__ __forceinline__ void init(Barriers& bars) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(&bars.full[i], 1);
      barrier_init(&bars.empty[i], 4 * MB);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
}

// A warp is done with the stage: what it wrote there comes before TMA's next bytes.
__device__ __forceinline__ void release(Barriers& bars, int stage) {
  proxy_fence();
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(&bars.empty[stage]);
}
