// SDR_KERNEL(name): behind a kernel, lets sdr_kernels._C launch it by its name. NVRTC finds kernels by itself.
#pragma once
#include "integers.h"
#ifdef __CUDACC_RTC__
#define SDR_KERNEL(name)
#else
#include <type_traits>

// Remembers a kernel: one letter a parameter, p for a pointer, i for int64_t, f for float. Defined in bindings.cpp.
bool add_kernel(const char* name, const void* address, const char* parameters);

template <typename T>
constexpr char parameter_letter() {
  static_assert(std::is_pointer_v<T> || std::is_same_v<T, int64_t> || std::is_same_v<T, float>,
                "a kernel takes pointers, int64_t and float alone: Python packs nothing else");
  return std::is_pointer_v<T> ? 'p' : std::is_same_v<T, float> ? 'f' : 'i';
}

template <typename... Parameters>
bool add_kernel(const char* name, void (*kernel)(Parameters...)) {
  static constexpr char letters[] = {parameter_letter<Parameters>()..., '\0'};
  return add_kernel(name, reinterpret_cast<const void*>(kernel), letters);
}

#define SDR_KERNEL(name) [[maybe_unused]] static const bool name##_added = add_kernel(#name, name)
#endif
