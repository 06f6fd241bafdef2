// What becomes of a tile's sums on sm_80: rounded into shared memory, over the ring's stages but the first,
// then moved row by row in words of 16 bytes. A tile writes the rows and columns that exist, nothing else:
// the rows behind an expert's last are the next expert's.
#pragma once

#include "core/math.h"
#include "core/vec.h"
#include "gemm/tile_product_sm80.cuh"

namespace dsc {

// Stage 0 already takes in the next tile.
template <typename S>
__device__ __forceinline__ typename S::T* staged_sums(typename S::T* ring) {
    static_assert(S::kM * S::kN <= (S::kStages - 1) * S::kStageElements);
    return ring + S::kStageElements;
}

// The sums that a thread holds of one row: pairs of neighbours, eight columns apart.
template <typename S>
using RowSums = float2[S::kFragmentsN];

// use(row, column, sums) for each row that a thread holds sums of, `column` that of the first.
template <typename S, typename Use>
__device__ __forceinline__ void for_each_row(const Accumulators<S>& acc, const Use& use) {
    const int thread = unhoisted(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
    const int first_row = warp / S::kWarpsN * S::kWarpM + lane / 4;
    const int column = warp % S::kWarpsN * S::kWarpN + 2 * (lane % 4);
    DSC_UNROLL
    for (int i = 0; i < S::kFragmentsM; ++i) {
        DSC_UNROLL
        for (int half = 0; half < 2; ++half) {
            RowSums<S> sums;
            DSC_UNROLL
            for (int j = 0; j < S::kFragmentsN; ++j) {
                sums[j] = make_float2(acc[i][j][2 * half], acc[i][j][2 * half + 1]);
            }
            use(first_row + 16 * i + 8 * half, column, sums);
        }
    }
}

// Words of a staged row are swizzled as those of a stage: word w of row r lies at w ^ (r % 8).
template <typename S>
__device__ __forceinline__ typename S::T* staged_word(typename S::T* staged, int row, int word) {
    return staged + row * S::kN + (word ^ (row % 8)) * kChunk;
}

// All threads; a barrier before it (nobody reads the ring any more) and one after it.
template <typename S>
__device__ __forceinline__ void stage_sums(typename S::T* staged, const Accumulators<S>& acc) {
    for_each_row<S>(acc, [&](int row, int first_column, const RowSums<S>& sums) {
        DSC_UNROLL
        for (int j = 0; j < S::kFragmentsN; ++j) {
            const int column = first_column + 8 * j;
            typename S::T* const pair = staged_word<S>(staged, row, column / kChunk) + column % kChunk;
            *reinterpret_cast<uint32_t*>(pair) = rounded_pair<typename S::T>(sums[j].x, sums[j].y);
        }
    });
}

// The words of a staged tile as its threads take them: item i of thread t, each kWords neighbours in a row.
template <typename S, int kWords>
struct StagedWords {
    static constexpr int kRowItems = S::kN / kChunk / kWords;
    static constexpr int kItems = S::kM * kRowItems / S::kNumThreads;
    static_assert(S::kM * kRowItems % S::kNumThreads == 0);

    typename S::T* staged;
    int thread = unhoisted(threadIdx.x);

    __device__ __forceinline__ int row(int item) const {
        return thread / kRowItems + item * (S::kNumThreads / kRowItems);
    }
    // Of the first word, in elements.
    __device__ __forceinline__ int column() const {
        static_assert(S::kNumThreads % kRowItems == 0);
        return thread % kRowItems * kWords * kChunk;
    }
    __device__ __forceinline__ Word word(int item, int idx) const {
        return *reinterpret_cast<const Word*>(staged_word<S>(staged, row(item), column() / kChunk + idx));
    }
};

template <typename T>
__device__ __forceinline__ Word& word_at(void* base, int64_t element) {
    return *reinterpret_cast<Word*>(static_cast<T*>(base) + element);
}
template <typename T>
__device__ __forceinline__ const Word& word_at(const void* base, int64_t element) {
    return *reinterpret_cast<const Word*>(static_cast<const T*>(base) + element);
}

// The tile's rows and columns that exist, to result [.., num_columns] from element `first` on.
template <typename S>
__device__ __forceinline__ void store_words(typename S::T* staged, void* result, int64_t first, int num_rows,
                                            int num_valid_columns, int num_columns) {
    const StagedWords<S, 1> words{staged};
    const int column = words.column();
    if (column >= num_valid_columns) return;
    DSC_UNROLL
    for (int item = 0; item < words.kItems; ++item) {
        const int row = words.row(item);
        if (row >= num_rows) return;
        word_at<typename S::T>(result, first + int64_t{row} * num_columns + column) = words.word(item, 0);
    }
}

}  // namespace dsc
