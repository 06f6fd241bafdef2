// The grouped products on sm_80: persistent blocks, a ring of asynchronous copies, mma.m16n8k16.
//
// Every kernel here is made of three parts: where a tile's operands lie (the copies of one stage), the
// product (tile_product_sm80.cuh) and what becomes of the sums (grouped_gemm_epilogue.cuh).
#pragma once

#include "core/overlap.h"
#include "core/ptx_sm80.cuh"
#include "gemm/gemm.h"
#include "gemm/grouped_gemm_epilogue.cuh"
#include "gemm/grouped_gemm_schedule.cuh"
#include "gemm/tile_product_sm80.cuh"

namespace dsc {

// ---- operands ----

// Rows with k contiguous, a fixed stride apart. A round of copies takes rows kRowStep apart.
template <typename T, int kRows, int kNumThreads>
struct StridedRows {
    using Map = CopyMap<Major::kK, kRows, kNumThreads>;

    const T* source;       // of this thread's first chunk
    int64_t round_stride;  // elements between its rounds
    int num_valid;         // rounds whose row exists
    int depth;

    __device__ __forceinline__ void load(T* operand, int k_block) const {
        const int row = Map::row(threadIdx.x), chunk = Map::chunk(threadIdx.x);
        const int k = k_block * kTileK;
        const bool is_inside = k + chunk * kChunk < depth;
        DSC_UNROLL
        for (int i = 0; i < Map::kRounds; ++i) {
            copy_async(operand + Map::place(row + i * Map::kRowStep, chunk),
                       source + (is_inside and i < num_valid ? i * round_stride + k : 0),
                       is_inside and i < num_valid);
        }
    }
};

// Rows with k contiguous, each named by an index.
template <typename T, int kRows, int kNumThreads>
struct GatheredRows {
    using Map = CopyMap<Major::kK, kRows, kNumThreads>;

    const T* source;
    int row_idx[Map::kRounds];  // -1: none
    int depth;

    __device__ __forceinline__ void load(T* operand, int k_block) const {
        const int row = Map::row(threadIdx.x), chunk = Map::chunk(threadIdx.x);
        const int k = k_block * kTileK + chunk * kChunk;
        DSC_UNROLL
        for (int i = 0; i < Map::kRounds; ++i) {
            const bool is_valid = row_idx[i] >= 0 and k < depth;
            copy_async(operand + Map::place(row + i * Map::kRowStep, chunk),
                       source + (is_valid ? int64_t{row_idx[i]} * depth + k : 0), is_valid);
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

    __device__ __forceinline__ void load(T* operand, int k_block) const {
        const int row = Map::row(threadIdx.x), chunk = Map::chunk(threadIdx.x);
        DSC_UNROLL
        for (int i = 0; i < Map::kRounds; ++i) {
            const int k = k_block * kTileK + row + i * Map::kRowStep;
            const bool is_valid = k < depth;
            copy_async(operand + Map::place(row + i * Map::kRowStep, chunk),
                       source + (is_valid ? k * row_stride : 0), is_valid);
        }
    }
};

// Rows first, first + step, ... below `end` of a matrix [.., depth].
template <typename T, int kRows, int kNumThreads>
__device__ __forceinline__ StridedRows<T, kRows, kNumThreads> strided_rows(const T* matrix, int64_t first,
                                                                           int64_t end, int step, int depth) {
    using Map = CopyMap<Major::kK, kRows, kNumThreads>;
    const int64_t num_rounds = first < end ? ceil_div<int64_t>(end - first, step) : 0;
    return {.source = num_rounds > 0 ? matrix + first * depth + Map::chunk(threadIdx.x) * kChunk : matrix,
            .round_stride = int64_t{step} * depth,
            .num_valid = static_cast<int>(min(num_rounds, int64_t{Map::kRounds})),
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

// Rows of x for the rows of a tile: the same ones, or those that row_idx names.
template <typename T, int kRows, int kNumThreads, bool kGathers>
__device__ __forceinline__ auto rows_of(const void* x, const int32_t* row_idx, const RowTile& tile,
                                        int depth) {
    using Map = CopyMap<Major::kK, kRows, kNumThreads>;
    const int64_t first = tile.row + Map::row(threadIdx.x);
    if constexpr (kGathers) {
        GatheredRows<T, kRows, kNumThreads> rows{
            .source = static_cast<const T*>(x), .row_idx = {}, .depth = depth};
        DSC_UNROLL
        for (int i = 0; i < Map::kRounds; ++i) {
            const int64_t row = first + i * Map::kRowStep;
            rows.row_idx[i] = row < tile.end_row ? row_idx[row] : -1;
        }
        return rows;
    } else {
        return strided_rows<T, kRows, kNumThreads>(static_cast<const T*>(x), first, tile.end_row,
                                                   Map::kRowStep, depth);
    }
}

// The column tile of w [N, K], or of its transpose [K, N], that belongs to an expert.
template <typename S, typename T>
__device__ __forceinline__ auto columns_of(const T* w, int column, int num_columns, int depth) {
    using Map = CopyMap<S::kMajorB, S::kN, S::kNumThreads>;
    if constexpr (S::kMajorB == Major::kK) {
        return strided_rows<T, S::kN, S::kNumThreads>(w, column + Map::row(threadIdx.x), num_columns,
                                                      Map::kRowStep, depth);
    } else {
        return depth_rows<T, S::kN, S::kNumThreads>(w, column, num_columns, depth);
    }
}

// The column tile of w [2 F, K] whose word 2 p is gate and word 2 p + 1 is up, of the same eight columns.
template <typename S, typename T>
__device__ __forceinline__ auto gate_up_columns_of(const T* w, int column, int width, int depth) {
    using Map = CopyMap<Major::kK, S::kN, S::kNumThreads>;
    static_assert(S::kMajorB == Major::kK and Map::kRowStep % (2 * kChunk) == 0);
    const int row = Map::row(threadIdx.x), word = row / kChunk;
    return strided_rows<T, S::kN, S::kNumThreads>(w + word % 2 * int64_t{width} * depth,
                                                  column + word / 2 * kChunk + row % kChunk, width,
                                                  Map::kRowStep / 2, depth);
}

// ---- the kernels over rows in expert order ----

template <typename S, typename Rows, typename Columns>
struct Operands {
    Rows rows;
    Columns columns;

    __device__ __forceinline__ void load(typename S::T* stage, int k_block) const {
        rows.load(stage, k_block);
        columns.load(stage + S::kM * kTileK, k_block);
    }
};

// y = x @ w.T, or x @ w.
template <typename S, bool kGathers>
struct Product {
    using T = typename S::T;
    static constexpr int kTileColumns = S::kN;  // of the result
    GroupedGemmParams p;

    __device__ __forceinline__ int num_columns() const { return p.num_columns; }

    __device__ __forceinline__ auto operands(const RowTile& tile, int column) const {
        const T* const w = static_cast<const T*>(p.w) + tile.group * int64_t{p.num_columns} * p.depth;
        const auto rows = rows_of<T, S::kM, S::kNumThreads, kGathers>(p.x, p.row_idx, tile, p.depth);
        const auto columns = columns_of<S>(w, column, p.num_columns, p.depth);
        return Operands<S, decltype(rows), decltype(columns)>{rows, columns};
    }

    __device__ __forceinline__ void store(T* staged, const RowTile& tile, int num_rows, int column) const {
        for_each_word<S, T, 1>(staged, num_rows, [&](int row, int place, const Word(&words)[1]) {
            if (column + place >= p.num_columns) return;
            word_at<T>(p.y, (tile.row + row) * p.num_columns + column + place) = words[0];
        });
    }
};

// hidden = silu(gate) * up. The tile's columns are gate and up, eight by eight.
template <typename S, bool kGathers>
struct Swiglu {
    using T = typename S::T;
    static constexpr int kTileColumns = S::kN / 2;
    GroupedSwigluParams p;

    __device__ __forceinline__ int num_columns() const { return p.width; }

    __device__ __forceinline__ auto operands(const RowTile& tile, int column) const {
        const T* const w = static_cast<const T*>(p.w) + tile.group * int64_t{2} * p.width * p.depth;
        const auto rows = rows_of<T, S::kM, S::kNumThreads, kGathers>(p.x, p.row_idx, tile, p.depth);
        const auto columns = gate_up_columns_of<S>(w, column, p.width, p.depth);
        return Operands<S, decltype(rows), decltype(columns)>{rows, columns};
    }

    __device__ __forceinline__ void store(T* staged, const RowTile& tile, int num_rows, int column) const {
        for_each_word<S, T, 2>(staged, num_rows, [&](int row, int place, const Word(&words)[2]) {
            const int f = column + place / 2;
            if (f >= p.width) return;
            const int64_t m = tile.row + row;
            word_at<T>(p.hidden, m * p.width + f) = swiglu<T>(words[0], words[1]);
            if (p.gate_up == nullptr) return;
            word_at<T>(p.gate_up, m * 2 * p.width + f) = words[0];
            word_at<T>(p.gate_up, (m * 2 + 1) * p.width + f) = words[1];
        });
    }
};

// From grad_hidden = grad @ w, the gradients of gate and up.
template <typename S>
struct SwigluBackward {
    using T = typename S::T;
    static constexpr int kTileColumns = S::kN;
    GroupedSwigluBackwardParams p;

    __device__ __forceinline__ int num_columns() const { return p.width; }

    __device__ __forceinline__ auto operands(const RowTile& tile, int column) const {
        const T* const w = static_cast<const T*>(p.w) + tile.group * int64_t{p.width} * p.depth;
        const auto rows = rows_of<T, S::kM, S::kNumThreads, false>(p.grad, nullptr, tile, p.depth);
        const auto columns = columns_of<S>(w, column, p.width, p.depth);
        return Operands<S, decltype(rows), decltype(columns)>{rows, columns};
    }

    __device__ __forceinline__ void store(T* staged, const RowTile& tile, int num_rows, int column) const {
        const bool is_used = tile.group < p.num_experts;  // rows of no expert have no gate and up to read
        for_each_word<S, T, 1>(staged, num_rows, [&](int row, int place, const Word(&words)[1]) {
            const int f = column + place;
            if (f >= p.width) return;
            const int64_t gate_at = (tile.row + row) * 2 * p.width + f, up_at = gate_at + p.width;
            Word gate{}, up{};
            if (is_used) {
                gate = word_at<T>(p.gate_up, gate_at);
                up = word_at<T>(p.gate_up, up_at);
                swiglu_backward<T>(words[0], gate, up);
            }
            word_at<T>(p.grad_gate_up, gate_at) = gate;
            word_at<T>(p.grad_gate_up, up_at) = up;
        });
    }
};

template <typename S, typename Job>
__global__ void __launch_bounds__(S::kNumThreads) grouped_rows_kernel(const Job job) {
    using T = typename S::T;
    DSC_SHARED(GroupTable, table);
    DSC_SHARED_DYNAMIC(T, ring);
    wait_for_previous_kernel();
    const int num_experts = job.p.num_experts;
    fill_groups<S::kM>(table, job.p.offsets, num_experts, job.p.num_rows);
    const int num_column_tiles = ceil_div(job.num_columns(), Job::kTileColumns);
    const int64_t num_tiles = int64_t{table.first_tile[num_experts + 1]} * num_column_tiles;
    for (int64_t idx = blockIdx.x; idx < num_tiles; idx += gridDim.x) {
        const RowTile tile = find_tile<S::kM>(table, num_experts, num_column_tiles, idx);
        const int column = tile.column_tile * Job::kTileColumns;
        const int num_k_blocks = tile.group < num_experts ? ceil_div(job.p.depth, kTileK) : 0;
        Accumulators<S> acc;
        multiply_tile<S>(acc, ring, num_k_blocks, job.operands(tile, column));
        __syncthreads();
        stage_sums<S>(ring, acc);
        __syncthreads();
        const auto num_rows = static_cast<int>(min(int64_t{S::kM}, tile.end_row - tile.row));
        job.store(ring, tile, num_rows, column);
        __syncthreads();
    }
}

}  // namespace dsc
