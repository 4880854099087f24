// int64_t for nvcc and for NVRTC, which has no <cstdint>.
#pragma once
#ifdef __CUDACC_RTC__
typedef long long int64_t;
#else
#include <cstdint>
#endif
