// Where the operands of a tile lie: for each form a record that starts this thread's copies of a part of one
// k block (tile_product_sm80.cuh). Rows, columns and depth that do not exist come in as zeros, and are never
// read.
#pragma once

#include "core/math.h"
#include "gemm/tile_product_sm80.cuh"

namespace dsc {

constexpr int kElementBytes = 2;

// Strides are in bytes, so that an address is one multiply-add of 32 by 32 bits onto 64; what a thread's
// number gives is computed anew in each load, since the accumulators leave no registers to keep it in. A copy
// of what does not exist reads no address, but the caller gives one near the operand's.
template <typename T>
__device__ __forceinline__ const T* advanced(const T* source, int num_rows, int row_bytes) {
    const auto offset = static_cast<uintptr_t>(int64_t{num_rows} * row_bytes);
    return reinterpret_cast<const T*>(reinterpret_cast<uintptr_t>(source) + offset);
}

// Rows with k contiguous, a fixed stride apart. A round of copies takes rows kRowStep apart.
template <typename T, int kRows, int kNumThreads>
struct StridedRows {
    using Map = CopyMap<Major::kK, kRows, kNumThreads>;

    const T* source;  // of this thread's first row
    int round_bytes;  // between its rounds
    int num_valid;    // rounds whose row exists
    int depth;

    __device__ __forceinline__ void load(T* operand, int k_block, int part) const {
        const int thread = unhoisted(threadIdx.x), row = Map::row(thread), chunk = Map::chunk(thread);
        const int k = k_block * kTileK + chunk * kChunk;
        DSC_UNROLL
        for (int i = Map::first_round(part); i < Map::first_round(part + 1); ++i) {
            const bool is_valid = k < depth and i < num_valid;
            copy_async(operand + Map::place(row + i * Map::kRowStep, chunk),
                       advanced(source + k, i, round_bytes), is_valid);
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
        const int thread = unhoisted(threadIdx.x), row = Map::row(thread), chunk = Map::chunk(thread);
        const int k = k_block * kTileK + chunk * kChunk;
        DSC_UNROLL
        for (int i = Map::first_round(part); i < Map::first_round(part + 1); ++i) {
            const bool is_valid = number[i] >= 0 and k < depth;
            copy_async(operand + Map::place(row + i * Map::kRowStep, chunk),
                       advanced(source + k, number[i], depth * kElementBytes), is_valid);
        }
    }
};

// A row per k, with m or n contiguous.
template <typename T, int kColumns, int kNumThreads>
struct DepthRows {
    using Map = CopyMap<Major::kMN, kColumns, kNumThreads>;

    const T* source;  // of this thread's first chunk
    int row_bytes;
    int depth;  // 0 where the thread's columns do not exist

    __device__ __forceinline__ void load(T* operand, int k_block, int part) const {
        const int thread = unhoisted(threadIdx.x), row = Map::row(thread), chunk = Map::chunk(thread);
        DSC_UNROLL
        for (int i = Map::first_round(part); i < Map::first_round(part + 1); ++i) {
            const int k = k_block * kTileK + row + i * Map::kRowStep;
            const bool is_valid = k < depth;
            copy_async(operand + Map::place(row + i * Map::kRowStep, chunk), advanced(source, k, row_bytes),
                       is_valid);
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
    int num_source_rows;  // 0 where the thread's columns do not exist
    int row_bytes, depth;
    int coming;

    __device__ __forceinline__ void fetch(int k_block) {
        const int lane = threadIdx.x % kWarpSize, warp_row = Map::row(threadIdx.x - lane);
        const int row = warp_row + lane % kRoundRows + lane / kRoundRows * Map::kRowStep;
        const int k = k_block * kTileK + row;
        coming = row < kTileK and k < depth ? row_idx[k] : -1;
    }

    __device__ __forceinline__ void load(T* operand, int k_block, int part) {
        const int thread = unhoisted(threadIdx.x), row = Map::row(thread), chunk = Map::chunk(thread);
        DSC_UNROLL
        for (int i = Map::first_round(part); i < Map::first_round(part + 1); ++i) {
            const int own_row = i * kRoundRows + thread % kWarpSize / Map::kRowChunks;
            const int number = __shfl_sync(kAllLanes, coming, own_row);
            const bool is_valid = number >= 0 and number < num_source_rows;
            copy_async(operand + Map::place(row + i * Map::kRowStep, chunk),
                       advanced(source, is_valid ? number : 0, row_bytes), is_valid);
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
    return {.source = num_rounds > 0 ? matrix + int64_t{first} * depth : matrix,
            .round_bytes = step * depth * kElementBytes,
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
            .row_bytes = num_columns * kElementBytes,
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
