// All inner products of up to ROWS rows by one block, staged through shared memory.
#pragma once

#include "tile.cuh"

namespace {

constexpr int WARPS_M = 4;
constexpr int WARPS_N = 2;
constexpr int WARPS = WARPS_M * WARPS_N;
constexpr int THREADS = 32 * WARPS;
constexpr int STAGES = 4;
constexpr int CHUNKS = 8;  // of 16 bytes in a row of a stage; one more, so that eight rows start in different banks

template <typename T>
constexpr int BLOCK_D = CHUNKS * Chunk<T>::SIZE;

template <typename T, int ROWS>
using Stage = T[ROWS][(CHUNKS + 1) * Chunk<T>::SIZE];

// sums += products of all pairs over a stage, by tensor cores. A stage is summed up on its own: tensor cores truncate
// where they add, so their sums stay short.
template <int ROWS>
struct HalfProducts {
  static constexpr int M = ROWS / WARPS_M, N = ROWS / WARPS_N;  // of a warp
  float sums[M / 16][N / 8][4] = {};

  template <typename T>
  __device__ void add(const Stage<T, ROWS>& stage) {
    constexpr int STEPS = BLOCK_D<T> / 16;
    const int lane = threadIdx.x % 32, row0 = warp_row(), column0 = warp_column();
    unsigned a[M / 16][STEPS][4];
#pragma unroll
    for (int m = 0; m < M / 16; ++m) {
#pragma unroll
      for (int k = 0; k < STEPS; ++k) {
        ldmatrix_x4(a[m][k], &stage[row0 + 16 * m + lane % 16][16 * k + lane / 16 * 8]);
      }
    }
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      float part[M / 16][4] = {};
#pragma unroll
      for (int k = 0; k < STEPS; k += 2) {
        unsigned b[4];  // not transposed: a row of x is a column of its transpose
        ldmatrix_x4(b, &stage[column0 + 8 * n + lane % 8][16 * k + lane / 8 * 8]);
#pragma unroll
        for (int m = 0; m < M / 16; ++m) {
          mma_m16n8k16<T>(part[m], a[m][k], b[0], b[1]);
          mma_m16n8k16<T>(part[m], a[m][k + 1], b[2], b[3]);
        }
      }
#pragma unroll
      for (int m = 0; m < M / 16; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] += part[m][i];
      }
    }
  }

  __device__ void store(float (&products)[ROWS][ROWS + 4]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M / 16; ++m) {
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        const int row = warp_row() + 16 * m + lane / 4, column = warp_column() + 8 * n + lane % 4 * 2;
        products[row][column] = sums[m][n][0];
        products[row][column + 1] = sums[m][n][1];
        products[row + 8][column] = sums[m][n][2];
        products[row + 8][column + 1] = sums[m][n][3];
      }
    }
  }

  __device__ static int warp_row() { return threadIdx.x / 32 / WARPS_N * M; }
  __device__ static int warp_column() { return threadIdx.x / 32 % WARPS_N * N; }
};

// The same in float32, which tensor cores would round; a thread has every 16th row and column.
template <int ROWS>
struct FloatProducts {
  static constexpr int EACH = ROWS / 16;
  float sums[EACH][EACH] = {};

  __device__ void add(const Stage<float, ROWS>& stage) {
    float parts[EACH][EACH] = {};
    for (int d = 0; d < BLOCK_D<float>; d += 4) {
      float4 x[EACH];
#pragma unroll
      for (int m = 0; m < EACH; ++m) x[m] = *reinterpret_cast<const float4*>(&stage[threadIdx.x / 16 + 16 * m][d]);
#pragma unroll
      for (int n = 0; n < EACH; ++n) {
        const float4 y = *reinterpret_cast<const float4*>(&stage[threadIdx.x % 16 + 16 * n][d]);
#pragma unroll
        for (int m = 0; m < EACH; ++m) {
          parts[m][n] += x[m].x * y.x;
          parts[m][n] += x[m].y * y.y;
          parts[m][n] += x[m].z * y.z;
          parts[m][n] += x[m].w * y.w;
        }
      }
    }
#pragma unroll
    for (int m = 0; m < EACH; ++m) {
#pragma unroll
      for (int n = 0; n < EACH; ++n) sums[m][n] += parts[m][n];
    }
  }

  __device__ void store(float (&products)[ROWS][ROWS + 4]) const {
#pragma unroll
    for (int m = 0; m < EACH; ++m) {
#pragma unroll
      for (int n = 0; n < EACH; ++n) products[threadIdx.x / 16 + 16 * m][threadIdx.x % 16 + 16 * n] = sums[m][n];
    }
  }
};

template <typename T, int ROWS>
struct Products : HalfProducts<ROWS> {};
template <int ROWS>
struct Products<float, ROWS> : FloatProducts<ROWS> {};

// All x_i . x_j of the N rows of features, 0 where i or j is N or more. products may lie where the stages are.
template <typename T, int ROWS>
__device__ void multiply(
    const T* features, int64_t N, int64_t D, Stage<T, ROWS> (&stages)[STAGES], float (&products)[ROWS][ROWS + 4]) {
  const bool whole = has_whole_chunks(features, D);
  const int steps = static_cast<int>(ceil_div(D, BLOCK_D<T>));
  auto load = [&](int step) {
    if (step < steps) {
      Stage<T, ROWS>& stage = stages[step % STAGES];
      for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, d = i % CHUNKS * Chunk<T>::SIZE;
        const int64_t column = int64_t{step} * BLOCK_D<T> + d;
        copy_chunk(&stage[row][d], features + row * D + column, row < N ? D - column : 0, whole);
      }
    }
    cp_async_commit();  // an empty group too: the wait below counts groups
  };
  Products<T, ROWS> sums;
  for (int step = 0; step < STAGES - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // this stage has come for all, and the one before it, which the next load overwrites, was read
    load(step + STAGES - 1);
    sums.add(stages[step % STAGES]);
  }
  __syncthreads();  // the stages were read
  sums.store(products);
}

}  // namespace
