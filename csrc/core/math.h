// Arithmetic that launches and kernels share.
#pragma once

#include "core/device.h"

namespace dsc {

template <typename Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
    return (a + b - 1) / b;
}

// 2^x: relative error about 2^-22, results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef DSC_HOST_EXECUTOR
    return exp2f(x);
#else
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}

// exp(x) in three instructions, for x <= 0: relative error about 2^-22 (1 + |x| / 4), results below 2^-126
// are 0.
__device__ __forceinline__ float exp_fast(float x) {
    constexpr float kLog2E = 1.4426950408889634f;
    return exp2_fast(x * kLog2E);
}

}  // namespace dsc
