#pragma once
#include "device.h"

using __half = _Float16;  // rounds to nearest even, as the GPU
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return static_cast<__half>(x); }
