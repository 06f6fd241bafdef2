// What prefill attention on sm_80 copies to shared memory, and where it lies there: tiles of rows of one
// head, by asynchronous copies, zeros where the sequence has no more rows.
//
// A row of W elements is W / 64 lines of 128 bytes, in which 16-byte chunk c of row r lies at c ^ (r % 8):
// the eight rows of every ldmatrix are in different banks, transposed or not.
#pragma once

#include "attention/mla_prefill.h"
#include "core/ptx_sm80.cuh"
#include "core/vec.h"
#include "core/warp.h"

namespace dsc::prefill {

constexpr int kChunk = 8;                           // elements of 16 bytes
constexpr int kLineChunks = 8, kLineElements = 64;  // of 128 bytes

// Where chunk `chunk` of line 0 lies in a tile of rows of kWidth; the same chunk of line i is
// i * kLineElements behind, and that of the row 8 rows on 8 * kWidth.
template <int kWidth>
__device__ __forceinline__ int place(int row, int chunk) {
    static_assert(kWidth % kLineElements == 0);
    return row * kWidth + ((chunk ^ row) % kLineChunks) * kChunk;
}

// The first element of a token's head.
template <typename T>
__device__ __forceinline__ const T* row_of(const HeadRows& rows, int64_t token, int head) {
    return static_cast<const T*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}

// Starts copying kRows rows from `first` on into a tile of rows of kWidth; of those only the first num_rows
// exist, which may be none or more than kRows. Called by all kThreads threads of a block.
template <int kRows, int kWidth, int kThreads, typename T>
__device__ __forceinline__ void start_rows(T* tile, const T* first, int64_t token_stride, int num_rows) {
    static_assert(kThreads % kLineChunks == 0 and kRows % (kThreads / kLineChunks) == 0);
    constexpr int kStep = kThreads / kLineChunks;
    static_assert(kStep % 8 == 0, "all rows of a thread have their chunk at one place");
    const int thread = unhoisted(threadIdx.x), own = thread / kLineChunks, chunk = thread % kLineChunks;
    T* const target = tile + place<kWidth>(own, chunk);
    const T* source = first + own * token_stride + chunk * kChunk;
    DSC_UNROLL
    for (int row = 0; row < kRows; row += kStep, source += kStep * token_stride) {
        DSC_UNROLL
        for (int line = 0; line < kWidth / kLineElements; ++line) {
            copy_async(target + row * kWidth + line * kLineElements, source + line * kLineElements,
                       row + own < num_rows);
        }
    }
}

// ---- a plan ----

__device__ __forceinline__ PrefillTile tile_at(const int32_t* plan, int index) {
    const int2 row = reinterpret_cast<const int2*>(plan)[1 + index];
    return {row.x, row.y};
}

}  // namespace dsc::prefill
