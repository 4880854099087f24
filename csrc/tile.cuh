// Elements between global memory and tiles, 16 bytes at a time where their addresses allow it.
#pragma once

#include "mma.cuh"
#include "integers.h"

extern __shared__ uint4 shared_memory[];  // as many bytes as the launch asks for

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void from_float(float& to, float x) { to = x; }
__device__ __forceinline__ void from_float(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void from_float(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
struct alignas(16) Chunk {
  static constexpr int SIZE = 16 / sizeof(T);
  T values[SIZE];
};

// Every row of C elements starts on 16 bytes and ends with a whole chunk.
template <typename T>
__device__ bool has_whole_chunks(const T* rows, int64_t C) {
  return C % Chunk<T>::SIZE == 0 && reinterpret_cast<unsigned long long>(rows) % 16 == 0;
}

// A chunk of which `count` elements exist, at most; the others are 0.
template <typename T>
__device__ Chunk<T> load_chunk(const T* from, int64_t count, bool whole) {
  Chunk<T> chunk;
  if (whole && count > 0) {
    reinterpret_cast<uint4&>(chunk) = *reinterpret_cast<const uint4*>(from);  // in one instruction
    return chunk;
  }
  for (int i = 0; i < Chunk<T>::SIZE; ++i) {
    if (i < count) chunk.values[i] = from[i];
    else from_float(chunk.values[i], 0.0f);
  }
  return chunk;
}

template <typename T>
__device__ void store_chunk(T* to, const Chunk<T>& chunk, int64_t count, bool whole) {
  if (whole && count > 0) {
    store_16(to, reinterpret_cast<const uint4&>(chunk));
    return;
  }
  for (int i = 0; i < Chunk<T>::SIZE; ++i) {
    if (i < count) to[i] = chunk.values[i];
  }
}

// load_chunk to shared memory; done after cp_async_wait and a barrier.
template <typename T>
__device__ void copy_chunk(T* to, const T* from, int64_t count, bool whole) {
  if (whole) cp_async_16(to, from, count > 0 ? 16 : 0);
  else *reinterpret_cast<Chunk<T>*>(to) = load_chunk(from, count, false);
}
