// SDR_KERNEL(name): a function that unpacks the arguments of a launch, as cudaLaunchKernel does.
#pragma once

#define SDR_KERNEL(name)                                                                     \
  extern "C" void emulate_##name(void** arguments) {                                         \
    [&]<typename... P>(void (*kernel)(P...)) {                                               \
      call_kernel(kernel, arguments, std::index_sequence_for<P...>());                       \
    }(name);                                                                                 \
  }                                                                                          \
  static_assert(true)
