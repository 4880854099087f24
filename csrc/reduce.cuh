// Sums and maxima over a warp or a block, in an order that never changes.
#pragma once

__device__ __forceinline__ float warp_sum(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffff, value, lanes);
  return value;
}

// Drops NaN.
__device__ __forceinline__ float warp_max(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, lanes));
  return value;
}

// The sum in every thread of a block of WARPS warps; scratch is shared memory.
template <int WARPS>
__device__ float block_sum(float value, float (&scratch)[WARPS]) {
  value = warp_sum(value);
  __syncthreads();  // the last sum was read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < WARPS; ++warp) sum += scratch[warp];
  return sum;
}
