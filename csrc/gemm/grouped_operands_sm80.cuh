// Where the operands of a tile lie: for each form a record that starts this thread's copies of a part of one
// k block (tile_product_sm80.cuh). Rows, columns and depth that do not exist come in as zeros, and are never
// read.
#pragma once

#include "core/math.h"
#include "gemm/tile_product_sm80.cuh"

namespace dsc {

// Rows with k contiguous, a fixed stride apart. A round of copies takes rows kRowStep apart.
template <typename T, int kRows, int kNumThreads>
struct StridedRows {
    using Map = CopyMap<Major::kK, kRows, kNumThreads>;

    const T* source;       // of this thread's first chunk
    int64_t round_stride;  // elements between its rounds
    int num_valid;         // rounds whose row exists
    int depth;

    __device__ __forceinline__ void load(T* operand, int k_block, int part) const {
        const int row = Map::row(threadIdx.x), chunk = Map::chunk(threadIdx.x);
        const int k = k_block * kTileK;
        const bool is_inside = k + chunk * kChunk < depth;
        DSC_UNROLL
        for (int i = Map::first_round(part); i < Map::first_round(part + 1); ++i) {
            const bool is_valid = is_inside and i < num_valid;
            copy_async(operand + Map::place(row + i * Map::kRowStep, chunk),
                       source + (is_valid ? i * round_stride + k : 0), is_valid);
        }
    }
};

// Rows with k contiguous, each by its number.
template <typename T, int kRows, int kNumThreads>
struct NumberedRows {
    using Map = CopyMap<Major::kK, kRows, kNumThreads>;

    const T* source;
    int number[Map::kRounds];  // -1: none
    int depth;

    __device__ __forceinline__ void load(T* operand, int k_block, int part) const {
        const int row = Map::row(threadIdx.x), chunk = Map::chunk(threadIdx.x);
        const int k = k_block * kTileK + chunk * kChunk;
        DSC_UNROLL
        for (int i = Map::first_round(part); i < Map::first_round(part + 1); ++i) {
            const bool is_valid = number[i] >= 0 and k < depth;
            copy_async(operand + Map::place(row + i * Map::kRowStep, chunk),
                       source + (is_valid ? int64_t{number[i]} * depth + k : 0), is_valid);
        }
    }
};

// A row per k, with m or n contiguous.
template <typename T, int kColumns, int kNumThreads>
struct DepthRows {
    using Map = CopyMap<Major::kMN, kColumns, kNumThreads>;

    const T* source;  // of this thread's first chunk
    int64_t row_stride;
    int depth;  // 0 where the thread's columns do not exist

    __device__ __forceinline__ void load(T* operand, int k_block, int part) const {
        const int row = Map::row(threadIdx.x), chunk = Map::chunk(threadIdx.x);
        DSC_UNROLL
        for (int i = Map::first_round(part); i < Map::first_round(part + 1); ++i) {
            const int k = k_block * kTileK + row + i * Map::kRowStep;
            const bool is_valid = k < depth;
            copy_async(operand + Map::place(row + i * Map::kRowStep, chunk),
                       source + (is_valid ? k * row_stride : 0), is_valid);
        }
    }
};

// A row per k, each by its number. A warp copies kWarpRows rows of a k block; its lane r holds the number of
// row r of the k block to come, so that no copy waits for a number to be read.
template <typename T, int kColumns, int kNumThreads>
struct NumberedDepthRows {
    using Map = CopyMap<Major::kMN, kColumns, kNumThreads>;
    static constexpr int kRoundRows = ceil_div(kWarpSize, Map::kRowChunks);  // of a warp
    static constexpr int kWarpRows = kRoundRows * Map::kRounds;
    static_assert(kWarpRows <= kWarpSize);

    const T* source;  // of this thread's first column
    const int32_t* row_idx;
    int num_source_rows, depth;
    int64_t row_stride;
    bool is_inside;  // whether the thread's columns exist
    int coming;      // -1: none

    __device__ __forceinline__ void fetch(int k_block) {
        const int lane = threadIdx.x % kWarpSize;
        const int warp_row = Map::row(threadIdx.x - lane);
        const int row = warp_row + lane % kRoundRows + lane / kRoundRows * Map::kRowStep;
        const int k = k_block * kTileK + row;
        coming = row < kTileK and k < depth ? row_idx[k] : -1;
        if (coming >= num_source_rows) coming = -1;
    }

    __device__ __forceinline__ void load(T* operand, int k_block, int part) {
        const int row = Map::row(threadIdx.x), chunk = Map::chunk(threadIdx.x);
        const int own_row = threadIdx.x % kWarpSize / Map::kRowChunks;
        DSC_UNROLL
        for (int i = Map::first_round(part); i < Map::first_round(part + 1); ++i) {
            const int number = __shfl_sync(kAllLanes, coming, i * kRoundRows + own_row);
            const bool is_valid = is_inside and number >= 0;
            copy_async(operand + Map::place(row + i * Map::kRowStep, chunk),
                       source + (is_valid ? number * row_stride : 0), is_valid);
        }
        if (part == kNumParts - 1) fetch(k_block + 1);
    }
};

// Rows first, first + step, ... below `end` of a matrix [.., depth].
template <typename T, int kRows, int kNumThreads>
__device__ __forceinline__ StridedRows<T, kRows, kNumThreads> strided_rows(const T* matrix, int first,
                                                                           int end, int step, int depth) {
    using Map = CopyMap<Major::kK, kRows, kNumThreads>;
    const int num_rounds = first < end ? ceil_div(end - first, step) : 0;
    return {.source =
                num_rounds > 0 ? matrix + int64_t{first} * depth + Map::chunk(threadIdx.x) * kChunk : matrix,
            .round_stride = int64_t{step} * depth,
            .num_valid = min(num_rounds, Map::kRounds),
            .depth = depth};
}

// Columns from `column` on of a matrix [depth, num_columns].
template <typename T, int kColumns, int kNumThreads>
__device__ __forceinline__ DepthRows<T, kColumns, kNumThreads> depth_rows(const T* matrix, int column,
                                                                          int num_columns, int depth) {
    using Map = CopyMap<Major::kMN, kColumns, kNumThreads>;
    const int first = column + Map::chunk(threadIdx.x) * kChunk;
    const bool is_inside = first < num_columns;
    return {.source = is_inside ? matrix + first : matrix,
            .row_stride = num_columns,
            .depth = is_inside ? depth : 0};
}

// The two operands of a tile, one behind the other in a stage.
template <typename S, typename Rows, typename Columns>
struct Operands {
    Rows rows;
    Columns columns;

    __device__ __forceinline__ void load(typename S::T* stage, int k_block, int part) {
        rows.load(stage, k_block, part);
        columns.load(stage + S::kM * kTileK, k_block, part);
    }
};

template <typename S, typename Rows, typename Columns>
__device__ __forceinline__ Operands<S, Rows, Columns> operands_of(const Rows& rows, const Columns& columns) {
    return {rows, columns};
}

}  // namespace dsc
