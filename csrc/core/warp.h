// Reductions over a row of kLanes neighbouring lanes (a power of two, at most a warp): a warp works on
// kWarpSize / kLanes rows at once, and every lane of the warp must arrive.
#pragma once

#include "core/device.h"

namespace dsc {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// The largest value of the row, in every lane of it.
template <int kLanes, typename T>
__device__ __forceinline__ T row_max(T value) {
    if constexpr (kLanes == kWarpSize and std::is_same_v<T, uint32_t>) {
        return __reduce_max_sync(kAllLanes, value);  // one instruction, for integers alone
    } else {
        DSC_UNROLL
        for (int offset = kLanes / 2; offset > 0; offset /= 2) {
            value = max(value, __shfl_xor_sync(kAllLanes, value, offset));
        }
        return value;
    }
}

// The sum over the row, the same bits in every lane of it.
template <int kLanes>
__device__ __forceinline__ float row_sum(float value) {
    DSC_UNROLL
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(kAllLanes, value, offset);
    }
    return value;
}

// One bit per lane of the row, lane 0 lowest.
template <int kLanes>
__device__ __forceinline__ uint32_t row_ballot(bool vote) {
    const uint32_t votes = __ballot_sync(kAllLanes, vote);
    const int first_lane = threadIdx.x % kWarpSize / kLanes * kLanes;
    return (votes >> first_lane) & (kAllLanes >> (kWarpSize - kLanes));
}

// What lane `source` of the row holds.
template <int kLanes, typename T>
__device__ __forceinline__ T row_broadcast(T value, int source) {
    return __shfl_sync(kAllLanes, value, source, kLanes);
}

}  // namespace dsc
