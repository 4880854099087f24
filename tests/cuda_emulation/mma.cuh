// csrc/mma.cuh in C++, after the tables of the PTX ISA and not after the kernels: "Matrix Fragments for mma.m16n8k16
// with floating point type", "Warp-level matrix load instruction: ldmatrix", "cp.async". There, groupID = lane / 4 and
// threadID_in_group = lane % 4; element i of a lane is the half i % 2 of its register i / 2.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

struct MmaOperands {
  unsigned a[4], b[2];
};

template <typename T>
float element(const unsigned* registers, int i) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(registers) + 2 * i, 2);
  if constexpr (std::is_same_v<T, __half>) return __half2float(value);
  else return __bfloat162float(value);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const MmaOperands operands{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  meet_warp(&operands, d, [](auto& operands, auto& results, int) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, thread = lane % 4;
      const auto& mine = *static_cast<const MmaOperands*>(operands[lane]);
      for (int i = 0; i < 8; ++i) {
        const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
        const int column = i < 4 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8;
        A[row][column] = element<T>(mine.a, i);
      }
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8;
        B[row][group] = element<T>(mine.b, i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, thread = lane % 4;
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? group : group + 8, column = thread * 2 + (i & 1);
        float& sum = static_cast<float*>(results[lane])[i];
        for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
      }
    }
  });
}

inline void load_matrices(unsigned (&matrices)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix reads a row that does not start on 16 bytes");
  meet_warp(row, matrices, [](auto& rows, auto& results, int transposed) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 2; ++i) {
          int row = lane / 4, column = lane % 4 * 2 + i;
          if (transposed) std::swap(row, column);
          const char* from = static_cast<const char*>(rows[8 * matrix + row]) + 2 * column;
          std::memcpy(static_cast<char*>(results[lane]) + 4 * matrix + 2 * i, from, 2);
        }
      }
    }
  }, transposed);
}
inline void ldmatrix_x4(unsigned (&matrices)[4], const void* row) { load_matrices(matrices, row, false); }
inline void ldmatrix_x4_trans(unsigned (&matrices)[4], const void* row) { load_matrices(matrices, row, true); }

inline void store_16(void* to, uint4 words) {
  if (reinterpret_cast<uintptr_t>(to) % 16) fail("a store of 16 bytes to an address that is not a multiple of 16");
  std::memcpy(to, &words, 16);
}

// done no sooner than the thread waits for it
void cp_async_16(void* to, const void* from, int bytes);
void cp_async_commit();
void wait_for_copies(int pending);
template <int pending>
void cp_async_wait() { wait_for_copies(pending); }
