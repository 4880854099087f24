// What CUDA C++ is to kernels that g++ compiles: names, and the operations in which threads meet; see runtime.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__  // kernels use dynamic shared memory alone, which runtime.cpp defines

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

extern uint3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

// Leave `operands` and `result` of this lane; once all 32 lanes have, the last one calls compute(operands, results).
using Collective = void (*)(const void* const (&operands)[32], void* const (&results)[32], int parameter);
void meet_warp(const void* operands, void* result, Collective compute, int parameter = 0);
void __syncthreads();
[[noreturn]] void fail(const char* what);  // ends the launch

inline void __syncwarp() { meet_warp(nullptr, nullptr, [](auto&, auto&, int) {}); }

inline float __shfl_xor_sync(unsigned, float value, int lane_mask) {
  float result;
  meet_warp(&value, &result, [](auto& operands, auto& results, int mask) {
    for (int lane = 0; lane < 32; ++lane) {
      *static_cast<float*>(results[lane]) = *static_cast<const float*>(operands[lane ^ mask]);
    }
  }, lane_mask);
  return result;
}

template <typename... P, std::size_t... I>
void call_kernel(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<P*>(arguments[I])...);
}
