// Words out of the sums of wgmma and mma: a thread holds two columns of each block of eight, the four threads
// of a quad all eight of a row. They exchange four blocks so that each has one whole, 16 bytes.
#pragma once

#include "core/vec.h"
#include "core/warp.h"

namespace dsc {

// Thread q of a quad brings piece q of four blocks, and gets the four pieces of block q in order.
__device__ __forceinline__ Word transposed_in_quad(uint32_t p0, uint32_t p1, uint32_t p2, uint32_t p3) {
    const bool is_odd = threadIdx.x & 1, is_high = threadIdx.x & 2;
    // With the neighbour: even threads keep blocks 0 and 2, odd ones 1 and 3.
    const uint32_t low = __shfl_xor_sync(kAllLanes, is_odd ? p0 : p1, 1);
    const uint32_t high = __shfl_xor_sync(kAllLanes, is_odd ? p2 : p3, 1);
    p0 = is_odd ? low : p0;
    p1 = is_odd ? p1 : low;
    p2 = is_odd ? high : p2;
    p3 = is_odd ? p3 : high;
    // With the other pair: its two pieces of the block that this thread keeps.
    const uint32_t first = __shfl_xor_sync(kAllLanes, is_high ? p0 : p2, 2);
    const uint32_t second = __shfl_xor_sync(kAllLanes, is_high ? p1 : p3, 2);
    return is_high ? make_uint4(first, second, p2, p3) : make_uint4(p0, p1, first, second);
}

// Four blocks of a thread's sums, kStride blocks apart, rounded and exchanged: block (first + q * kStride) of
// row `half` for thread q of the quad.
template <typename T, int kStride, int kNumSums>
__device__ __forceinline__ Word rounded_word(const float (&sums)[kNumSums], int first_block, int half) {
    uint32_t pieces[4];
    DSC_UNROLL
    for (int i = 0; i < 4; ++i) {
        const int at = 4 * (first_block + i * kStride) + 2 * half;
        pieces[i] = rounded_pair<T>(sums[at], sums[at + 1]);
    }
    return transposed_in_quad(pieces[0], pieces[1], pieces[2], pieces[3]);
}

}  // namespace dsc
