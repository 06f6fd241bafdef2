// What becomes of a tile's sums on sm_90: out of the registers, with no shared memory between. A thread holds
// two columns of each block of eight; the four threads of a quad hold all eight of a row. They exchange four
// blocks so that each has one whole, a word of 16 bytes, and a quad stores 64 bytes of a row: full sectors,
// and a predicate for each word, so that rows and columns beyond the tile's own are never touched. The ring
// keeps all of shared memory, and one warpgroup stores while the other multiplies (kSm90SkewBlocks).
#pragma once

#include "core/ptx_sm90.cuh"
#include "core/quad_words.cuh"
#include "gemm/grouped_gemm_epilogue.cuh"
#include "gemm/swiglu.cuh"
#include "gemm/warpgroup_tile_sm90.cuh"

namespace dsc {

template <typename T>
__device__ __forceinline__ T rounded(float value) {
    if constexpr (std::is_same_v<T, __half>)
        return __float2half_rn(value);
    else
        return __float2bfloat16_rn(value);
}

template <typename T>
__device__ __forceinline__ void store_word(void* base, int64_t element, const Word& word) {
    store_whole(static_cast<T*>(base) + element, word);
}

// Where a thread's sums lie in the block's tile: row `row` and row + 8; block j begins at column + 8 * j.
struct SumsPlace {
    int row, column;
};

template <typename S>
__host__ __device__ constexpr SumsPlace sums_place(int thread) {
    const int warpgroup = thread / kWarpgroup - 1;
    const int row = 16 * (thread % kWarpgroup / kWarpSize) + thread % kWarpSize / 4;
    if (S::kWarpgroupsM > 1) return {.row = warpgroup * S::kWarpgroupM + row, .column = 0};
    return {.row = row, .column = warpgroup * S::kWarpgroupN};
}

// store(row, column, word) for every word of eight columns, `row` and `column` in the tile. All threads of
// the quad come along, for the exchange.
template <typename S, typename Store>
__device__ __forceinline__ void for_each_word(const WarpgroupSums<S>& sums, const Store& store) {
    const SumsPlace place = sums_place<S>(unhoisted(threadIdx.x));
    const int quad_column = place.column + 8 * (threadIdx.x % 4);
    DSC_UNROLL
    for (int half = 0; half < 2; ++half) {
        DSC_UNROLL
        for (int block = 0; block < S::kBlocksN; block += 4) {
            const Word word = rounded_word<typename S::T, 1>(sums, block, half);
            store(place.row + 8 * half, quad_column + 8 * block, word);
        }
    }
}

// store(row, f, gate, up) for every word of a tile whose blocks are gate and up in turn.
template <typename S, typename Store>
__device__ __forceinline__ void for_each_gate_up(const WarpgroupSums<S>& sums, const Store& store) {
    using T = typename S::T;
    static_assert(S::kBlocksN % 8 == 0);
    const SumsPlace place = sums_place<S>(unhoisted(threadIdx.x));
    const int quad_column = place.column / 2 + 8 * (threadIdx.x % 4);
    DSC_UNROLL
    for (int half = 0; half < 2; ++half) {
        DSC_UNROLL
        for (int block = 0; block < S::kBlocksN; block += 8) {
            const Word gate = rounded_word<T, 2>(sums, block, half);
            const Word up = rounded_word<T, 2>(sums, block + 1, half);
            store(place.row + 8 * half, quad_column + 4 * block, gate, up);
        }
    }
}

// What is read in the epilogue is read for kBatch items before the first of them is written: the compiler
// cannot know that they do not overlap.
constexpr int kBatch = 4;

// load(row, column) -> Old and store(row, column, word, old) for every word.
template <typename S, typename Old, typename Load, typename Store>
__device__ __forceinline__ void update_each_word(const WarpgroupSums<S>& sums, const Load& load,
                                                 const Store& store) {
    const SumsPlace place = sums_place<S>(unhoisted(threadIdx.x));
    const int quad_column = place.column + 8 * (threadIdx.x % 4);
    DSC_UNROLL
    for (int half = 0; half < 2; ++half) {
        DSC_UNROLL
        for (int first = 0; first < S::kBlocksN; first += 4 * kBatch) {
            Old old[kBatch];
            DSC_UNROLL
            for (int i = 0; i < kBatch; ++i) {
                old[i] = load(place.row + 8 * half, quad_column + 8 * (first + 4 * i));
            }
            DSC_UNROLL
            for (int i = 0; i < kBatch; ++i) {
                const Word word = rounded_word<typename S::T, 1>(sums, first + 4 * i, half);
                store(place.row + 8 * half, quad_column + 8 * (first + 4 * i), word, old[i]);
            }
        }
    }
}

// load(row, column) -> float2 and store(row, column, sum) for every two neighbouring sums, with what was
// loaded added to them. The four threads of a quad take eight columns of a row.
template <typename S, typename Load, typename Store>
__device__ __forceinline__ void update_each_two(const WarpgroupSums<S>& sums, const Load& load,
                                                const Store& store) {
    const SumsPlace place = sums_place<S>(unhoisted(threadIdx.x));
    const int column = place.column + 2 * (threadIdx.x % 4);
    DSC_UNROLL
    for (int half = 0; half < 2; ++half) {
        DSC_UNROLL
        for (int first = 0; first < S::kBlocksN; first += 2 * kBatch) {
            float2 old[2 * kBatch];
            DSC_UNROLL
            for (int i = 0; i < 2 * kBatch; ++i) {
                old[i] = load(place.row + 8 * half, column + 8 * (first + i));
            }
            DSC_UNROLL
            for (int i = 0; i < 2 * kBatch; ++i) {
                const int at = 4 * (first + i) + 2 * half;
                store(place.row + 8 * half, column + 8 * (first + i),
                      make_float2(sums[at] + old[i].x, sums[at + 1] + old[i].y));
            }
        }
    }
}

// store(m, line, low, high) for every two sums of a swapped tile, whose lines are columns of the result: low
// of line `line`, high of line + 8.
template <typename S, typename Store>
__device__ __forceinline__ void for_each_two_lines(const WarpgroupSums<S>& sums, const Store& store) {
    const SumsPlace place = sums_place<S>(unhoisted(threadIdx.x));
    DSC_UNROLL
    for (int block = 0; block < S::kBlocksN; ++block) {
        DSC_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int m = place.column + 8 * block + 2 * static_cast<int>(threadIdx.x % 4) + i;
            store(m, place.row, sums[4 * block + i], sums[4 * block + 2 + i]);
        }
    }
}

}  // namespace dsc
