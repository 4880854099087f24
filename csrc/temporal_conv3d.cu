// (k, 1, 1) convolution of all branches as products over flat rows: a row is one (frame, position) of a clip, a tap is
// an offset of one frame's rows, and rows outside of [0, num_rows) are the padding of time. A block owns BLOCK_M rows
// of one clip and branch times BLOCK_N channels; stages of x and weight are copied while the tensor cores work.

#include "mma.cuh"
#include "registry.h"
#include "tile.cuh"

namespace {

constexpr int BLOCK_M = 128;
constexpr int BLOCK_K = 32;
constexpr int STAGES = 3;
constexpr int WARPS_M = 4;
constexpr int WARPS_N = 2;
constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int PAD = 8;  // elements after each row of a tile: eight rows then start in different banks

template <typename T, int BLOCK_N>
struct Stage {
  alignas(16) T x[BLOCK_M][BLOCK_K + PAD];
  alignas(16) T weight[BLOCK_K][BLOCK_N + PAD];
};

// acc [M / 16][N / 8] += x * weight, of this warp's M rows from row0 and N columns from column0.
template <typename T, int BLOCK_N, int M, int N>
__device__ void multiply(float (&acc)[M / 16][N / 8][4], const Stage<T, BLOCK_N>& stage, int row0, int column0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < BLOCK_K; k += 16) {
    unsigned x[M / 16][4];
#pragma unroll
    for (int m = 0; m < M / 16; ++m) ldmatrix_x4(x[m], &stage.x[row0 + 16 * m + lane % 16][k + lane / 16 * 8]);
#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
      unsigned w[4];
      ldmatrix_x4_trans(w, &stage.weight[k + lane % 16][column0 + 8 * n + lane / 16 * 8]);
#pragma unroll
      for (int m = 0; m < M / 16; ++m) {
        mma_m16n8k16<T>(acc[m][n], x[m], w[0], w[1]);
        mma_m16n8k16<T>(acc[m][n + 1], x[m], w[2], w[3]);
      }
    }
  }
}

// x: [B, V, num_rows, C_in]; weight: [V, kernel, C_in, C_out]; scale, shift: [V, C_out] or null; residual: like out, or
// null; out: [B, V, num_rows, C_out]; tap_rows: rows of one frame.
template <typename T, int BLOCK_N>
__device__ void temporal_conv3d(
    const T* x, const T* weight, const float* scale, const float* shift, const T* residual, T* out,
    int64_t V, int64_t num_rows, int64_t tap_rows, int64_t C_in, int64_t C_out, int64_t kernel, int64_t relu) {
  auto* stages = reinterpret_cast<Stage<T, BLOCK_N>*>(shared_memory);
  const int64_t column_tiles = ceil_div(C_out, BLOCK_N);
  const int64_t row_tiles = ceil_div(num_rows, BLOCK_M);
  const int64_t column0 = blockIdx.x % column_tiles * BLOCK_N;
  const int64_t row0 = blockIdx.x / column_tiles % row_tiles * BLOCK_M;
  const int64_t clip = blockIdx.x / (column_tiles * row_tiles);  // of B * V
  const int64_t branch = clip % V;
  x += clip * num_rows * C_in;
  weight += branch * kernel * C_in * C_out;
  const bool whole_x = has_whole_chunks(x, C_in);
  const bool whole_weight = has_whole_chunks(weight, C_out);
  const int k_steps = static_cast<int>(ceil_div(C_in, BLOCK_K));
  const int steps = static_cast<int>(kernel) * k_steps;

  auto load = [&](int step) {
    if (step < steps) {
      Stage<T, BLOCK_N>& stage = stages[step % STAGES];
      const int64_t tap = step / k_steps;
      const int64_t k0 = step % k_steps * BLOCK_K;
      const int64_t tap_row0 = row0 + (tap - kernel / 2) * tap_rows;
      for (int i = threadIdx.x; i < BLOCK_M * BLOCK_K / 8; i += THREADS) {
        const int m = i / (BLOCK_K / 8), k = i % (BLOCK_K / 8) * 8;
        const int64_t row = tap_row0 + m;
        const int64_t count = row >= 0 && row < num_rows ? C_in - (k0 + k) : 0;
        copy_chunk(&stage.x[m][k], x + row * C_in + k0 + k, count, whole_x);
      }
      for (int i = threadIdx.x; i < BLOCK_K * BLOCK_N / 8; i += THREADS) {
        const int k = i / (BLOCK_N / 8), n = i % (BLOCK_N / 8) * 8;
        const int64_t count = k0 + k < C_in ? C_out - (column0 + n) : 0;
        copy_chunk(&stage.weight[k][n], weight + (tap * C_in + k0 + k) * C_out + column0 + n, count, whole_weight);
      }
    }
    cp_async_commit();  // an empty group too: the wait below counts groups
  };

  constexpr int M = BLOCK_M / WARPS_M, N = BLOCK_N / WARPS_N;  // of a warp
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / WARPS_N * M, warp_column = warp % WARPS_N * N;
  float acc[M / 16][N / 8][4] = {};
  for (int step = 0; step < STAGES - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // this stage has come for all, and the one before it, which the next load overwrites, was read
    load(step + STAGES - 1);
    multiply<T, BLOCK_N, M, N>(acc, stages[step % STAGES], warp_row, warp_column);
  }

  __syncthreads();  // the stages were read: their memory holds the sums, so that rows leave in chunks
  auto* sums = reinterpret_cast<float(*)[BLOCK_N + PAD]>(shared_memory);
#pragma unroll
  for (int m = 0; m < M / 16; ++m) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      float* sum = &sums[warp_row + 16 * m + lane / 4][warp_column + 8 * n + lane % 4 * 2];
      sum[0] = acc[m][n][0];
      sum[1] = acc[m][n][1];
      sum[8 * (BLOCK_N + PAD)] = acc[m][n][2];
      sum[8 * (BLOCK_N + PAD) + 1] = acc[m][n][3];
    }
  }
  __syncthreads();
  const bool whole_out = has_whole_chunks(out, C_out);
  const bool whole_residual = has_whole_chunks(residual, C_out);
  constexpr int ROW_CHUNKS = BLOCK_N / 8;  // divides THREADS: a thread keeps its channels
  const int n = threadIdx.x % ROW_CHUNKS * 8;
  const int64_t column = column0 + n, count = C_out - column;
  if (count <= 0) return;
  float scales[8], shifts[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    scales[j] = scale && j < count ? scale[branch * C_out + column + j] : 1;
    shifts[j] = shift && j < count ? shift[branch * C_out + column + j] : 0;
  }
  for (int m = threadIdx.x / ROW_CHUNKS; m < BLOCK_M && row0 + m < num_rows; m += THREADS / ROW_CHUNKS) {
    const int64_t offset = (clip * num_rows + row0 + m) * C_out + column;
    Chunk<T> values;
    if (residual) values = load_chunk(residual + offset, count, whole_residual);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float value = sums[m][n + j] * scales[j] + shifts[j];
      if (residual) value += to_float(values.values[j]);
      if (relu && value < 0) value = 0;  // a comparison keeps NaN, fmaxf would drop it
      from_float(values.values[j], value);
    }
    store_chunk(out + offset, values, count, whole_out);
  }
}

}  // namespace

#define TEMPORAL_CONV3D(name, T, BLOCK_N)                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) name(                                                       \
      const T* x, const T* weight, const float* scale, const float* shift, const T* residual, T* out, int64_t V,       \
      int64_t num_rows, int64_t tap_rows, int64_t C_in, int64_t C_out, int64_t kernel, int64_t relu) {                 \
    temporal_conv3d<T, BLOCK_N>(                                                                                       \
        x, weight, scale, shift, residual, out, V, num_rows, tap_rows, C_in, C_out, kernel, relu);                     \
  }                                                                                                                    \
  SDR_KERNEL(name);

TEMPORAL_CONV3D(temporal_conv3d_float16_n64, __half, 64)
TEMPORAL_CONV3D(temporal_conv3d_float16_n128, __half, 128)
TEMPORAL_CONV3D(temporal_conv3d_bfloat16_n64, __nv_bfloat16, 64)
TEMPORAL_CONV3D(temporal_conv3d_bfloat16_n128, __nv_bfloat16, 128)
