// y = epilogue(x Wᵀ) on Hopper (sm_90a): bf16 operands, float32 accumulation, any number of rows M.
// EIGHT: x and W in 8 bits (e4m3), W in units of *unit; what follows is the same.
//
// One warpgroup loads tiles of x and W by TMA, the other two multiply (wgmma) and write the result.
// Thread blocks stay resident and walk over the tiles. Two schedules, chosen at compile time:
//
//   streaming: x and W come through a ring of stages; the warpgroups share a tile of 128 rows. At
//     its end they keep the sums, rounded to bf16, and go on with the next tile; what is left of the
//     epilogue is done in groups of columns beside those products, while the tensor cores are busy.
//   STATIONARY (EIGHT, K up to 512): the block keeps its BN rows of W for the whole of K in shared
//     memory and streams tiles of 64 rows of x past them. Each multiplying warpgroup owns whole
//     tiles in turn, so that one's epilogue hides behind the other's products. Not for NORM.
//
// On a card that draws all the power it may, what counts is energy: bf16 with W at rest (BN = 192)
// moves a third of the bytes out of the L2 and takes longer.
//
// A cluster is CM × CN blocks: those in a row of it share the tile of x, those in a column share
// the tile of W; each loads its part and multicasts it to the others.
//
// The rows of W are laid into shared memory so that a thread's accumulators are 8 neighbouring
// columns of the result (row 8j + 2q + b of each 32 holds column 8q + 2j + b): results, and the
// other operand of the epilogue, move between registers and global memory 16 bytes at a time.
//
// NORMED is SwiGLU with an RMSNorm inside: W_down(sigmoid(gate) ⊙ RMSNorm(gate ⊙ up)). A row's factor
// goes through the product after it, so the first product leaves h = silu(gate) ⊙ up as it is, and
// the sums of (gate up)² of each tile; NORM multiplies its rows by the factors made of these.
//
// Compile-time: EPILOGUE, NORMED, EIGHT, RESULT8 (SwiGLU's h in 8 bits; NORM's result in 8 bits,
// too, as `wide`), K, COLUMNS (of the result: h for SwiGLU), BN (rows of W a tile), STATIONARY,
// STAGES, CM, CN, PERIOD (tokens of a sequence, for ROTARY); and the function wgmma(), written for
// BN by compile.py. What wraps a single instruction is in instructions.cu.

#define PLAIN 0        // out = x Wᵀ
#define SWIGLU 1       // W = [gate | up]: out = silu(gate) ⊙ up
#define SWIGLU_SAVE 2  // and wide = [gate | up]
#define DSWIGLU 3      // x Wᵀ is dh; other = [gate | up]: wide = [d gate | d up], out = h
#define RESIDUAL 4     // out = other + x Wᵀ
#define NORM 5         // the same, then RMSNorm: a cluster spans the row; factors, if given
#define ROTARY 6       // W = [q | k | v]: out = x Wᵀ with q and k rotated by cos = scales and
                       // sin = slopes, and q times eps; see `rotate`

#define ADDS (EPILOGUE == RESIDUAL || EPILOGUE == NORM)  // to another operand
#define GATED (EPILOGUE == SWIGLU || EPILOGUE == SWIGLU_SAVE)
constexpr int WGS = 2;                         // multiplying warpgroups
constexpr int BK = EIGHT ? 128 : 64;           // 128 bytes: the width of a swizzled row
constexpr int KB = K / BK;                     // blocks of K in a tile
constexpr int BM = STATIONARY ? 64 : 64 * WGS; // rows of x in a stage
constexpr int OUT = GATED ? BN / 2 : BN;       // columns of the result in a tile
constexpr int CLUSTER = CM * CN;
constexpr int A_BYTES = BM * 128, B_BYTES = BN * 128;
constexpr int STAGE_BYTES = A_BYTES + (STATIONARY ? 0 : B_BYTES);
constexpr int NGROUPS = COLUMNS / OUT / CN;    // tiles of the result in a row of it, in clusters
constexpr int VALUES = BN / 2;                 // accumulators of a thread
constexpr int PARTS = GATED ? 2 : 1;           // of what is held: gate and up
constexpr int GROUPS = OUT / 32;               // of columns, which the epilogue does one by one
// A deferred epilogue is done beside the next tile's products: from its block FIRST, when the sums
// of the other thread blocks have come, EACH groups a block, to its block LAST.
constexpr bool DEFERRED = !STATIONARY;
constexpr int FIRST = KB > 2 && EPILOGUE != DSWIGLU ? 2 : KB > 1 ? 1 : 0;
constexpr int EVENLY = (GROUPS + KB - FIRST - 1) / (KB - FIRST);
constexpr int EACH = EVENLY < 2 && EPILOGUE != DSWIGLU ? 2 : EVENLY;  // one takes more registers
constexpr int LAST = FIRST + (GROUPS + EACH - 1) / EACH;
// At first the second warpgroup stays this many blocks behind the first, so that they do not both
// come to the end of a tile at once; where that waits for operands it does not pay.
constexpr int SKEW = STATIONARY || EPILOGUE > SWIGLU ? 0 : KB < 2 ? KB : 2;

struct Shared {
  u64 full[STAGES], empty[STAGES];             // a stage's bytes have come; it may be overwritten
  u64 weights_full[KB], weights_empty;         // the same for the stationary rows of W
  u64 turn[WGS];                               // this warpgroup may go on to its tile
  u64 squares_full[2][WGS];                    // the other blocks' sums of squares have come
  float squares[2][CN][BM];                    // of the parts of a row, for even and odd tiles
};

// ---- the walk over the tiles -------------------------------------------------------------------

struct Walk {
  u32 first, count, step, rows;
  // Tile i of this cluster: row tile m (in clusters of CM) and column tile n (in clusters of CN).
  __device__ __forceinline__ void place(u32 i, int& m, int& n) const {
    u32 at = first + i * step;
    if (STATIONARY) { n = at / rows; m = at % rows; }   // down the rows: W changes rarely
    else { m = at / NGROUPS; n = at % NGROUPS; }        // along the columns: x stays in the L2
  }
};

__device__ __forceinline__ Walk walk(u32 M) {
  u32 clusters = gridDim.x / CLUSTER, c = blockIdx.x / CLUSTER;
  u32 rows = (M + BM * CM - 1) / (BM * CM), total = rows * NGROUPS;
  u32 each = total / clusters, rest = total % clusters;   // the first `rest` clusters do one more
  if (!STATIONARY) return {c, each + (c < rest), clusters, rows};
  u32 sharing = clusters / NGROUPS;     // clusters of each column tile; these are at the same rows
  if (sharing == 0) return {c * each + min(c, rest), each + (c < rest), 1, rows};
  u32 n = c / sharing, at = c % sharing;
  each = rows / sharing, rest = rows % sharing;
  return {n * rows + at * each + min(at, rest), n < NGROUPS ? each + (at < rest) : 0, 1, rows};
}

// ---- epilogue ----------------------------------------------------------------------------------

// 8 columns × 2 rows × GROUPS a thread: what the epilogue reads, and, deferred, what it works on.
struct Held {
  Eight v[PARTS][2][GROUPS];
};

struct GateUp { Eight v[2][2]; };  // of both rows, 8 columns each

// Group g of `other`. row: of this thread's first accumulators (the others are 8 below); column: of
// its first eight.
__device__ __forceinline__ void fetch(Held& o, const bf16* other, int g, u32 row, u32 column,
                                      u32 M) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    u64 r = min(row + 8 * half, M - 1);  // rows past the end are read but not written
    o.v[0][half][g] = load8(other + r * COLUMNS + column + 32 * g);
  }
}

__device__ __forceinline__ void fetch(GateUp& o, const bf16* other, int g, u32 row, u32 column,
                                      u32 M) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    u64 r = min(row + 8 * half, M - 1);
#pragma unroll
    for (int p = 0; p < 2; p++)
      o.v[p][half] = load8(other + r * (2 * COLUMNS) + p * COLUMNS + column + 32 * g);
  }
}

__device__ __forceinline__ int index(int half, int g, int i) {  // of column 32g + i: see the top
  return 16 * g + 4 * (i / 2) + 2 * half + i % 2;
}

struct Angles { Four cos[2][2], sin[2][2]; };  // of this thread's two rows: 8 features each

// Row `row` is token row % PERIOD. cos, sin (PERIOD, 64), equal halves; null: no rotation.
__device__ __forceinline__ void fetch(Angles& a, const float* cos, const float* sin, u32 row,
                                      u32 M) {
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int part = 0; part < 2; part++) {
      u32 at = min(row + 8 * half, M - 1) % PERIOD * 64 + threadIdx.x % 4 * 8 + 4 * part;
      a.cos[half][part] = cos ? *(const Four*)(cos + at) : Four{{1, 1, 1, 1}};
      a.sin[half][part] = cos ? *(const Four*)(sin + at) : Four{{0, 0, 0, 0}};
    }
}

// Heads are 64 columns: features i and i + 32 are in neighbouring groups of a thread's columns.
__device__ __forceinline__ void rotate(float (&d)[VALUES], const Angles& a, u32 left, float scale) {
#pragma unroll
  for (int head = 0; head < OUT / 64; head++) {
    u32 column = left + 64 * head;
    if (column >= COLUMNS / 3 * 2) return;
    float factor = column < COLUMNS / 3 ? scale : 1;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float& x = d[index(half, 2 * head, i)];
        float& y = d[index(half, 2 * head + 1, i)];
        float c = a.cos[half][i / 4].v[i % 4] * factor, s = a.sin[half][i / 4].v[i % 4] * factor;
        float turned = x * c - y * s;
        y = y * c + x * s;
        x = turned;
      }
  }
}

// The accumulators in bf16.
__device__ __forceinline__ void hold(Held& o, const float (&d)[VALUES]) {
#pragma unroll
  for (int p = 0; p < PARTS; p++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = d[p * (VALUES / 2) + index(half, g, i)];
        o.v[p][half][g] = round8(v);
      }
}

// held = scale d + held, and its sums of squares over this tile's columns.
__device__ __forceinline__ void residual(Held& o, const float (&d)[VALUES],
                                         const float (&scale)[2], float (&squares)[2]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    squares[half] = 0;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float x = d[index(half, g, i)];
        v[i] = (NORMED || EIGHT ? x * scale[half] : x) + get(o.v[0][half][g], i);
        squares[half] += v[i] * v[i];
      }
      o.v[0][half][g] = round8(v);
    }
  }
}

__device__ __forceinline__ float sum_lanes(float x) {  // over the four lanes of a row
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// parts (M,): the sums of (gate up)² over the columns of a tile, of both rows.
__device__ __forceinline__ void write_squares(const float (&inner)[2], float* parts, u32 row,
                                              u32 M) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = sum_lanes(inner[half]);
    if (threadIdx.x % 4 == 0 && row + 8 * half < M) parts[row + 8 * half] = sum;
  }
}

// The sums of this block's columns go to the others of the cluster. `tile` counts the tiles; row: in
// the tile, of this thread.
__device__ __forceinline__ void send(float (&squares)[2], Shared& s, int group, u32 tile, u32 row) {
  const u32 rank = cluster_rank(), cn = rank % CN;
  u64* bar = &s.squares_full[tile & 1][group];
  if (CN > 1 && threadIdx.x % 128 == 0) barrier_expect(bar, 64 * 4 * (CN - 1));
#pragma unroll
  for (int half = 0; half < 2; half++) {
    squares[half] = sum_lanes(squares[half]);
    if (threadIdx.x % 4 == 0)
      for (u32 block = 0; block < CN; block++)
        if (block != cn)
          store_remote(&s.squares[tile & 1][cn][row + 8 * half], squares[half], bar,
                       rank - cn + block);
  }
}

// factor: of RMSNorm, for both rows, from what was sent.
__device__ __forceinline__ void receive(float (&factor)[2], const float (&squares)[2], Shared& s,
                                        int group, u32 tile, u32 row, float eps) {
  const u32 cn = cluster_rank() % CN;
  if (CN > 1) barrier_wait(&s.squares_full[tile & 1][group], tile / 2 & 1);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = 0;
    for (u32 block = 0; block < CN; block++)  // in one order, so that all blocks agree
      sum += block == cn ? squares[half] : s.squares[tile & 1][block][row + 8 * half];
    factor[half] = rsqrtf(sum / COLUMNS + eps);
  }
}

// Group g of a tile's columns, of one of both rows, is written. inner: the sums of (gate up)² so far.
__device__ __forceinline__ void epilogue(int g, int half, const float (&d)[VALUES], const Held& o,
                                         const GateUp& saved,
                                         const float (&factor)[2], const float (&scale)[2],
                                         const float (&slope)[2], float (&inner)[2], bf16* out,
                                         bf16* wide, u32 row, u32 column, u32 M) {
  u32 r = row + 8 * half;
  bool inside = r < M;
  u64 at = (u64)r * COLUMNS + column + 32 * g;
  e4m3* small = (e4m3*)(EPILOGUE == NORM ? wide : out) + at;
  bf16* wide_to = wide + at + (u64)r * COLUMNS;
  float v[8], a[8], b[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float x = DEFERRED ? get(o.v[0][half][g], i) : d[index(half, g, i)];
    if (GATED) {
      a[i] = x;
      b[i] = DEFERRED ? get(o.v[PARTS - 1][half][g], i)
                      : d[(VALUES / 2 + index(half, g, i)) % VALUES];
      v[i] = a[i] * (RESULT8 ? sigmoid_fast(a[i]) : sigmoid(a[i])) * b[i];
      if (NORMED) inner[half] += a[i] * b[i] * (a[i] * b[i]);
    } else if (EPILOGUE == DSWIGLU) {
      float gate = get(saved.v[0][half], i), up = get(saved.v[1][half], i);
      float s = sigmoid(gate), silu = gate * s;
      if (NORMED) x *= scale[half];
      v[i] = silu * up * (NORMED ? scale[half] : 1);
      a[i] = x * up * (s + silu * (1 - s));  // d silu / d gate = s (1 + gate (1 - s))
      b[i] = x * silu;
      if (NORMED) {  // through the factor
        a[i] += slope[half] * gate * up * up;
        b[i] += slope[half] * gate * gate * up;
      }
    } else {
      v[i] = EPILOGUE == NORM ? x * factor[half] : x;
    }
  }
  if (!inside) return;
  if (RESULT8) store8(small, round8_e4m3(v));
  if (DEFERRED && (EPILOGUE == PLAIN || EPILOGUE == RESIDUAL || EPILOGUE == ROTARY))
    store8(out + at, o.v[0][half][g]);
  else if (!RESULT8 || EPILOGUE == NORM) store8(out + at, round8(v));
  if (EPILOGUE == SWIGLU_SAVE || EPILOGUE == DSWIGLU) {
    const bool held = EPILOGUE == SWIGLU_SAVE && DEFERRED;
    store8(wide_to, held ? o.v[0][half][g] : round8(a));
    store8(wide_to + COLUMNS, held ? o.v[PARTS - 1][half][g] : round8(b));
  }
}

// ---- kernel ------------------------------------------------------------------------------------

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(128 * (WGS + 1), 1)
gemm(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
     const bf16* __restrict__ other, bf16* __restrict__ out, bf16* __restrict__ wide,
     float* __restrict__ factors, u32 M, float eps, const float* __restrict__ scales,
     const float* __restrict__ slopes, const float* __restrict__ unit) {
  extern __shared__ unsigned char dynamic[];
  unsigned char* base = dynamic + (-address(dynamic) & 1023);
  unsigned char* stages = base + (STATIONARY ? KB * B_BYTES : 0);
  Shared& s = *(Shared*)(stages + STAGES * STAGE_BYTES);

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], CLUSTER * 4 * (STATIONARY ? 1 : WGS));
    }
    for (int i = 0; i < KB; i++) barrier_init(&s.weights_full[i], 1);
    barrier_init(&s.weights_empty, 4 * WGS);
    for (int i = 0; i < WGS; i++) {
      barrier_init(&s.turn[i], 1);
      barrier_init(&s.squares_full[0][i], 1);
      barrier_init(&s.squares_full[1][i], 1);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();

  const Walk tiles = walk(M);
  const u32 rank = cluster_rank(), cm = rank / CN, cn = rank % CN;
  const int group = threadIdx.x / 128 - 1;

  if (group < 0) {  // ---- the loading warpgroup: one thread of it
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(EPILOGUE == ROTARY ? 24 : 40));
    if (threadIdx.x == 0) {
      u32 x_mask = ((1u << CN) - 1) << (cm * CN), w_mask = 0;
      for (int i = 0; i < CM; i++) w_mask |= 1u << (i * CN + cn);
      u32 stage = 0, phase = 1, changes = 0;
      int before = -1;
      for (u32 i = 0; i < tiles.count; i++) {
        int m, n;
        tiles.place(i, m, n);
        bool load_weights = STATIONARY && n != before;
        before = n;
        if (load_weights) {
          if (changes) barrier_wait(&s.weights_empty, (changes - 1) & 1);
          changes++;
        }
        // The tile's two halves of W: gate and up, or its left and right columns.
        int row = (m * CM + cm) * BM + cn * (BM / CN);
        int half = (n * CN + cn) * OUT, other_half = GATED ? COLUMNS : BN / 2;
#pragma unroll 1
        for (int kb = 0; kb < KB; kb++) {
          if (load_weights) {
            barrier_expect(&s.weights_full[kb], B_BYTES);
            for (int p = 0; p < 2; p++)
              load_w<false>(base + kb * B_BYTES + p * (B_BYTES / 2), &w_map, &s.weights_full[kb],
                            kb * BK, half + p * other_half, 0);
          }
          unsigned char* to = stages + stage * STAGE_BYTES;
          barrier_wait(&s.empty[stage], phase);
          barrier_expect(&s.full[stage], STAGE_BYTES);
          load_x<(CN > 1)>(to + cn * (A_BYTES / CN), &x_map, &s.full[stage], kb * BK, row, x_mask);
          if (!STATIONARY)
            for (int p = 0; p < 2; p++)
              if (CM == 1 || p == cm)
                load_w<(CM > 1)>(to + A_BYTES + p * (B_BYTES / 2), &w_map, &s.full[stage], kb * BK,
                                 half + p * other_half, w_mask);
          if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
      }
    }
  } else {  // ---- a multiplying warpgroup
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(EPILOGUE == ROTARY ? 240 : 232));
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    int weights = -1;   // the n whose weights this warpgroup uses
    u32 changes = 0;    // how many it has used
    // The walk moves on by one n at a time. Weights that are used by another warpgroup's tiles only
    // are waited for too, before they are let go.
    auto move_to = [&](int n) {
      int m, from = weights;
      if (changes == 0) { tiles.place(0, m, from); from--; }
#pragma unroll 1
      for (; from < n; from++, changes++)
        if (changes) {
          barrier_wait(&s.weights_full[0], (changes - 1) & 1);
          if (lane == 0) barrier_arrive(&s.weights_empty, rank);
        }
      weights = n;
    };
    Held held;
    GateUp saved[2];  // of the groups that come next
    float d[VALUES], squares[2], factor[2], inner[2], scale[2] = {1, 1}, slope[2] = {0, 0};
    const u32 within = (STATIONARY ? 0 : 64 * group) + warp * 16 + lane / 4;  // row in a tile
    u32 due = 0, due_row = 0, due_column = 0;  // the tile whose epilogue comes next
    auto place = [&](u32 i, int& n, u32& row, u32& column) {  // of this thread in tile i
      int m;
      tiles.place(i, m, n);
      row = (m * CM + cm) * BM + within;
      column = (n * CN + cn) * OUT + lane % 4 * 8;
    };
    auto begin = [&] {  // that tile's epilogue
      inner[0] = inner[1] = 0;
      if (NORMED && EPILOGUE == DSWIGLU)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          scale[half] = scales[min(due_row + 8 * half, M - 1)];
          slope[half] = slopes[min(due_row + 8 * half, M - 1)];
        }
      if (EPILOGUE != NORM) return;
      receive(factor, squares, s, group, due, within, eps);
      if (factors && due_column == 0)
        for (int half = 0; half < 2; half++)
          if (due_row + 8 * half < M) factors[due_row + 8 * half] = factor[half];
    };
    auto write = [&](int g, int half) {
      epilogue(g, half, d, held, saved[g % 2], factor, scale, slope, inner, out, wide, due_row,
               due_column, M);
    };
    auto end = [&] {
      if (NORMED && GATED)
        write_squares(inner, factors + (u64)(due_column / OUT) * M, due_row, M);
    };
    auto prepare = [&](int g) {
      if (EPILOGUE == DSWIGLU && g < GROUPS)
        fetch(saved[g % 2], other, g, due_row, due_column, M);
    };
    auto finish = [&](int g) {  // group g of it, put off
      if (g == 0) begin();
      write(g, 0);
      write(g, 1);
      prepare(g + 2);
      if (g == GROUPS - 1) end();
    };
    if (ADDS && tiles.count) {
      int n;
      u32 row, column;
      place(0, n, row, column);
#pragma unroll
      for (int g = 0; g < GROUPS; g++) fetch(held, other, g, row, column, M);
    }
    for (u32 i = STATIONARY ? group : 0; i < tiles.count; i += STATIONARY ? WGS : 1) {
      int n;
      u32 row, column;
      place(i, n, row, column);
      bool new_weights = STATIONARY && n != weights;
      if (new_weights) move_to(n);
      if (NORMED && ADDS)
#pragma unroll
        for (int half = 0; half < 2; half++) scale[half] = scales[min(row + 8 * half, M - 1)];

      u32 stage = i * KB % STAGES, phase = i * KB / STAGES & 1, last = 0;
      // Only a parity tells the uses of a stage apart: those of the tile before must have come
      // full before this warpgroup may wait for its own.
      if (STATIONARY) barrier_wait(&s.turn[group], (i / WGS & 1) ^ (group == 0));
      if (SKEW && i == 0 && group > 0) barrier_wait(&s.turn[group], 0);
      auto multiply = [&](int kb) {  // block kb of the products
        if (new_weights) barrier_wait(&s.weights_full[kb], (changes - 1) & 1);
        barrier_wait(&s.full[stage], phase);
        unsigned char* at = stages + stage * STAGE_BYTES;
        u64 a = descriptor(at + (STATIONARY ? 0 : group * 8192));
        u64 b = descriptor(STATIONARY ? base + kb * B_BYTES : at + A_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma(d, a + 2 * k, b + 2 * k, kb | k);  // 32 bytes of a row
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      };
      auto release = [&](int kb) {  // the block before it, which is done
        if (kb > 0) {
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
          if (lane < CLUSTER) barrier_arrive(&s.empty[last], lane);
        }
        if (STATIONARY ? kb == KB - 1 : i == 0 && kb == SKEW - 1)
          if (threadIdx.x % 128 == 0) barrier_arrive(&s.turn[(group + 1) % WGS], rank);
        last = stage;
        if (++stage == STAGES) { stage = 0; phase ^= 1; }
      };
      int kb = 0;
      if (DEFERRED) {
#pragma unroll
        for (; kb < FIRST; kb++) { multiply(kb); release(kb); }
#pragma unroll
        for (; kb < LAST; kb++) {
          multiply(kb);
          if (i > 0)
#pragma unroll
            for (int g = (kb - FIRST) * EACH; g < min(GROUPS, (kb - FIRST + 1) * EACH); g++) {
              finish(g);
              if (ADDS) fetch(held, other, g, row, column, M);
            }
          release(kb);
        }
      }
      Angles angles;
      const u32 left = (n * CN + cn) * OUT;  // the tile's first column
      if (EPILOGUE == ROTARY && left < COLUMNS / 3 * 2) fetch(angles, scales, slopes, row, M);
#pragma unroll 1
      for (; kb < KB; kb++) { multiply(kb); release(kb); }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      if (lane < CLUSTER) barrier_arrive(&s.empty[last], lane);
      __syncwarp();  // and the compiler moves none of the epilogue before this
#pragma unroll
      for (int j = 0; j < VALUES; j++) asm volatile("" : "+f"(d[j])::"memory");
      if (EIGHT) {
        const float by = *unit;
        if (ADDS) {
          scale[0] = NORMED ? scale[0] * by : by;
          scale[1] = NORMED ? scale[1] * by : by;
        } else {
#pragma unroll
          for (int j = 0; j < VALUES; j++) d[j] *= by;
        }
      }
      if (EPILOGUE == ROTARY) rotate(d, angles, left, eps);
      due = i;
      due_row = row;
      due_column = column;
      prepare(0);
      prepare(1);
      if (ADDS) residual(held, d, scale, squares);
      else if (DEFERRED) hold(held, d);
      if (EPILOGUE == NORM) send(squares, s, group, i, within);
      if (!DEFERRED) {
        begin();
#pragma unroll
        for (int j = 0; j < 2 * GROUPS; j++) write(j % GROUPS, j / GROUPS);
        end();
      }
    }
    if (DEFERRED && tiles.count)
#pragma unroll
      for (int g = 0; g < GROUPS; g++) finish(g);
    if (STATIONARY && tiles.count) {
      int m, n;
      tiles.place(tiles.count - 1, m, n);
      move_to(n);
    }
  }
  cluster_sync();  // no block leaves while another may still signal its barriers
}
