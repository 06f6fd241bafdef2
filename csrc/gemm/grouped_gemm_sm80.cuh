// The kernel of all grouped products on sm_80: persistent blocks, a ring of asynchronous copies,
// mma.m16n8k16. A job says which tiles there are, where a tile's operands lie (grouped_operands_sm80.cuh) and
// what becomes of the sums (grouped_gemm_epilogue.cuh); the first copies of a block's next tile are under way
// while the tile before it is stored.
#pragma once

#include "core/overlap.h"
#include "gemm/gemm.h"
#include "gemm/grouped_gemm_epilogue.cuh"
#include "gemm/grouped_gemm_schedule.cuh"
#include "gemm/grouped_operands_sm80.cuh"

namespace dsc {

// A job whose tiles are rows in expert order and columns of the result.
template <typename S_, typename Params, int kTileColumns>
struct RowJob {
    using S = S_;
    using T = typename S::T;
    Params p;
    int num_columns;  // of the result

    __device__ __forceinline__ int num_tiles(const GroupTable& table) const {
        return table.first_tile[p.num_experts + 1] * ceil_div(num_columns, kTileColumns);
    }
    __device__ __forceinline__ RowTile find(const GroupTable& table, int idx) const {
        return find_tile<S::kM>(table, p.num_experts, ceil_div(num_columns, kTileColumns), idx);
    }
    __device__ __forceinline__ int depth_of(const RowTile& tile) const {
        return tile.group < p.num_experts ? p.depth : 0;
    }
    static __device__ __forceinline__ int first_column(const RowTile& tile) {
        return tile.column_tile * kTileColumns;
    }
    static __device__ __forceinline__ int num_rows(const RowTile& tile) {
        return min(S::kM, tile.end_row - tile.row);
    }

    static __device__ __forceinline__ void stage(T* staged, const Accumulators<S>& acc, const RowTile&) {
        stage_sums<S>(staged, acc);
    }

    // Rows of x for the rows of a tile: the same ones, or those that row_idx names.
    __device__ __forceinline__ auto rows_of(const RowTile& tile, const void* x, const int32_t* row_idx,
                                            int num_source_rows) const {
        using Map = CopyMap<Major::kK, S::kM, S::kNumThreads>;
        NumberedRows<T, S::kM, S::kNumThreads> rows{
            .source = static_cast<const T*>(x), .number = {}, .depth = p.depth};
        DSC_UNROLL
        for (int i = 0; i < Map::kRounds; ++i) {
            const int row = tile.row + Map::row(threadIdx.x) + i * Map::kRowStep;
            rows.number[i] = row < tile.end_row ? row : -1;
            if (row_idx == nullptr or row >= tile.end_row) continue;
            const int number = row_idx[row];
            rows.number[i] = number < num_source_rows ? number : -1;
        }
        return rows;
    }
};

// y = x @ w.T, or x @ w.
template <typename S>
struct Product : RowJob<S, GroupedGemmParams, S::kN> {
    using T = typename S::T;
    using Base = RowJob<S, GroupedGemmParams, S::kN>;

    __device__ __forceinline__ auto operands(const RowTile& tile) const {
        using Map = CopyMap<S::kMajorB, S::kN, S::kNumThreads>;
        const GroupedGemmParams& p = this->p;
        const int column = this->first_column(tile);
        const T* const w = static_cast<const T*>(p.w) + tile.group * int64_t{p.num_columns} * p.depth;
        const auto rows = this->rows_of(tile, p.x, p.row_idx, p.num_source_rows);
        if constexpr (S::kMajorB == Major::kK) {
            return operands_of<S>(
                rows, strided_rows<T, S::kN, S::kNumThreads>(w, column + Map::row(threadIdx.x), p.num_columns,
                                                             Map::kRowStep, p.depth));
        } else {
            return operands_of<S>(rows,
                                  depth_rows<T, S::kN, S::kNumThreads>(w, column, p.num_columns, p.depth));
        }
    }

    __device__ __forceinline__ void store(T* staged, const RowTile& tile) const {
        const int column = this->first_column(tile), num_columns = this->p.num_columns;
        store_words<S>(staged, this->p.y, int64_t{tile.row} * num_columns + column, this->num_rows(tile),
                       num_columns - column, num_columns);
    }
};

template <typename Job>
__global__ void __launch_bounds__(Job::S::kNumThreads, Job::S::kMinBlocks)
    grouped_gemm_kernel(const Job job) {
    using S = typename Job::S;
    DSC_SHARED(GroupTable, table);
    DSC_SHARED_DYNAMIC(typename S::T, ring);
    wait_for_previous_kernel();
    fill_groups(table, job.p.offsets, job.p.num_experts, job.p.num_rows,
                [](int num_rows) { return ceil_div(num_rows, S::kM); });
    int idx = blockIdx.x;
    bool has_tile = idx < job.num_tiles(table);
    if (not has_tile) return;
    auto tile = job.find(table, idx);
    auto source = job.operands(tile);
    start_tile<S>(ring, ceil_div(job.depth_of(tile), kTileK), source);
    while (has_tile) {
        Accumulators<S> acc;
        multiply_tile<S>(acc, ring, ceil_div(job.depth_of(tile), kTileK), source);
        __syncthreads();  // nobody reads the ring any more, not even leftovers
        const auto done = tile;
        idx += gridDim.x;
        has_tile = idx < job.num_tiles(table);
        if (has_tile) {
            tile = job.find(table, idx);
            source = job.operands(tile);
        } else {
            let_next_kernel_start();
        }
        job.stage(staged_sums<S>(ring), acc, done);
        if (has_tile) start_tile<S>(ring, ceil_div(job.depth_of(tile), kTileK), source);
        __syncthreads();
        job.store(staged_sums<S>(ring), done);
        __syncthreads();
    }
}

}  // namespace dsc
