// Words of 16 bytes, the widest access of one thread, and the 4 or 8 numbers in one. Sums are taken in
// float32, so numbers leave a word as floats and are rounded once on their way back (to nearest even).
#pragma once

#include "core/check.h"
#include "core/device.h"

namespace dsc {

using Word = uint4;
constexpr int kWordBytes = sizeof(Word);

template <typename T>
constexpr int kPerWord = kWordBytes / static_cast<int>(sizeof(T));

// The two numbers in 4 bytes, the lower address first.
template <typename T>
__device__ __forceinline__ float2 floats_of(uint32_t pair) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of a float
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    } else {
        static_assert(std::is_same_v<T, __half>);
        return __half22float2(reinterpret_cast<const __half2&>(pair));
    }
}

template <typename T>
__device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<const uint32_t&>(pair);
    } else {
        static_assert(std::is_same_v<T, __half>);
        const __half2 pair = __floats2half2_rn(low, high);
        return reinterpret_cast<const uint32_t&>(pair);
    }
}

template <typename T>
__device__ __forceinline__ void unpack(const Word& word, float (&values)[kPerWord<T>]) {
    const uint32_t parts[] = {word.x, word.y, word.z, word.w};
    DSC_UNROLL
    for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<T, float>) {
            values[i] = __uint_as_float(parts[i]);
        } else {
            const float2 pair = floats_of<T>(parts[i]);
            values[2 * i] = pair.x;
            values[2 * i + 1] = pair.y;
        }
    }
}

template <typename T>
__device__ __forceinline__ Word pack(const float (&values)[kPerWord<T>]) {
    uint32_t parts[4];
    DSC_UNROLL
    for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<T, float>) {
            parts[i] = __float_as_uint(values[i]);
        } else {
            parts[i] = rounded_pair<T>(values[2 * i], values[2 * i + 1]);
        }
    }
    return make_uint4(parts[0], parts[1], parts[2], parts[3]);
}

// ---- host ----

inline void check_aligned(const char* op, const char* name, const void* rows) {
    const auto past_boundary = reinterpret_cast<uintptr_t>(rows) % kWordBytes;
    DSC_CHECK(past_boundary == 0, op, ": ", name, " must begin on a boundary of ", kWordBytes,
              " bytes, got one ", past_boundary, " bytes past it");
}

}  // namespace dsc
