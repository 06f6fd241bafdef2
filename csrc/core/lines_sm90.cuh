// Shared memory as the copy engine (TMA) writes it and wgmma reads it on sm_90: lines of 128 bytes, their
// 16-byte chunks swizzled. Nothing here needs a GPU or CuTe, so the host executor can play it.
#pragma once

#include "core/ptx_sm90.cuh"

namespace dsc {

constexpr int kLineBytes = 128;  // of the swizzle
constexpr int kLineElements = kLineBytes / 2;
constexpr int kRingAlignment = 8 * kLineBytes;  // the swizzle repeats
constexpr int kWarpgroup = 128;                 // threads
constexpr int kNumCutlassBarriers = 8;          // named barriers that CUTLASS keeps for itself
// What L2 is told of a copy: nothing, that it is read once, that it is read again.
constexpr uint64_t kNormalHint = 0x1000000000000000, kOnceHint = 0x12F0000000000000,
                   kAgainHint = 0x14F0000000000000;

// Where a box begins, dimensions in the order of its map's.
struct BoxPlace {
    int at[5];
};

// Where byte `byte` of unswizzled lines lies, counted from a multiple of kRingAlignment.
__host__ __device__ constexpr int swizzled(int byte) {
    return byte ^ (byte / kLineBytes % 8 * kWordBytes);
}

// Zeros in the lines from `first` on of each of kNumBlocks blocks of kBlockLines lines, by a warpgroup. A
// line is the same line whatever the swizzle does within it.
template <int kNumBlocks, int kBlockLines>
__device__ __forceinline__ void blank_lines(char* blocks, int first) {
    const int num_words = (kBlockLines - first) * (kLineBytes / kWordBytes);
    for (int i = threadIdx.x % kWarpgroup; i < num_words; i += kWarpgroup) {
        DSC_UNROLL
        for (int block = 0; block < kNumBlocks; ++block) {
            char* const line = blocks + (block * kBlockLines + first) * kLineBytes;
            reinterpret_cast<Word*>(line)[i] = Word{};
        }
    }
}

}  // namespace dsc
