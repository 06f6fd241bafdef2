// Sums over the threads of a block.
#pragma once

#include "core/warp.h"

namespace dsc {

struct BlockSum {
    int64_t before, all;  // of the threads before this one, and of the block
};

// Of `value`, by all kNumWarps warps of the block; `warp_sums` is shared memory for as many numbers.
template <int kNumWarps>
__device__ __forceinline__ BlockSum sum_over_block(int64_t value, int64_t (&warp_sums)[kNumWarps]) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    int64_t sum = value;
    DSC_UNROLL
    for (int step = 1; step < kWarpSize; step *= 2) {
        const int64_t below = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += below;
    }
    if (lane == kWarpSize - 1) warp_sums[warp] = sum;
    __syncthreads();
    BlockSum found{sum - value, 0};
    DSC_UNROLL
    for (int i = 0; i < kNumWarps; ++i) {
        if (i < warp) found.before += warp_sums[i];
        found.all += warp_sums[i];
    }
    __syncthreads();  // warp_sums may be written again
    return found;
}

}  // namespace dsc
