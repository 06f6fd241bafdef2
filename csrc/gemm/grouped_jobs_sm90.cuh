// The products over rows in expert order, as jobs of the sm_90a kernel: which tiles there are, where their
// operands lie, and what becomes of the sums. A tile's rows may run past its expert: what is read there (rows
// of the next expert, of none, or zeros past the end) makes sums in rows of their own, which nobody stores.
#pragma once

#include "gemm/gemm.h"
#include "gemm/grouped_gemm_epilogue_sm90.cuh"
#include "gemm/grouped_gemm_schedule_sm90.cuh"

namespace dsc {

struct TensorMaps {
    TensorMap a, b;  // whose lines are rows of the tile, and columns
};

struct ProductTile {
    int group, group_row, group_end;  // expert (or E: rows of none), and its rows
    int row, end_row;                 // of the result
    int column, num_k_blocks;
    bool shares_rows;
};

// ---- products over rows in expert order ----

// The tiles of a result whose rows are in expert order, kTileRows x kTileColumns each.
template <typename Job>
__device__ __forceinline__ void fill_pairs(GroupTable& table, const Job& job) {
    const int column_tiles = ceil_div(job.num_columns(), Job::kTileColumns);
    fill_groups(table, job.p.offsets, job.p.num_experts, job.p.num_rows, [&](int64_t rows) {
        return num_pairs<Job::kSwaps>(static_cast<int>(ceil_div<int64_t>(rows, Job::kTileRows)),
                                      column_tiles);
    });
}

template <typename Job>
__device__ __forceinline__ ProductTile row_tile_at(const GroupTable& table, const Job& job, int idx,
                                                   int rank) {
    const int group = find_group(table, job.p.num_experts, 1, idx);
    const auto group_row = static_cast<int>(table.first_row[group]);
    const auto group_end = static_cast<int>(table.first_row[group + 1]);
    const TilePair pair =
        pair_at<Job::kSwaps>(idx - table.first_tile[group], ceil_div(group_end - group_row, Job::kTileRows),
                             ceil_div(job.num_columns(), Job::kTileColumns), rank);
    return {.group = group,
            .group_row = group_row,
            .group_end = group_end,
            .row = group_row + pair.row_tile * Job::kTileRows,
            .end_row = group_end,
            .column = pair.column_tile * Job::kTileColumns,
            .num_k_blocks = group < job.p.num_experts ? ceil_div(job.p.depth, kTileK) : 0,
            .shares_rows = pair.shares_rows};
}

// What the jobs over rows in expert order have in common. kColumnForm: how the weights lie; kSwaps: they are
// the lines of a, for decoding.
template <typename S, typename Params, Form kColumnForm, bool kSwaps_>
struct RowsJob {
    using T = typename S::T;
    static constexpr bool kSwaps = kSwaps_;
    static constexpr int kTileRows = kSwaps ? S::kN : S::kM;
    static constexpr int kColumnLines = kSwaps ? S::kM : S::kN;
    static constexpr int kTileColumns = kColumnForm == Form::kGateUp ? kColumnLines / 2 : kColumnLines;
    using Rows = OperandBoxes<Form::kRows, kTileRows>;
    using Columns = OperandBoxes<kColumnForm, kColumnLines>;
    Params p;

    __host__ __device__ int num_columns() const {
        if constexpr (requires { p.num_columns; })
            return p.num_columns;
        else
            return p.width;
    }
    __device__ __forceinline__ void fill(GroupTable& table) const { fill_pairs(table, *this); }
    __device__ __forceinline__ int num_tile_pairs(const GroupTable& table) const {
        return table.first_tile[p.num_experts + 1];
    }
    __device__ __forceinline__ ProductTile tile_at(const GroupTable& table, int idx, int rank) const {
        return row_tile_at(table, *this, idx, rank);
    }
    __device__ __forceinline__ auto a_of(const TensorMaps& maps, const ProductTile& tile) const {
        if constexpr (kSwaps)
            return columns_of(&maps.a, tile);
        else
            return rows_of(&maps.a, tile);
    }
    __device__ __forceinline__ auto b_of(const TensorMaps& maps, const ProductTile& tile) const {
        if constexpr (kSwaps)
            return rows_of(&maps.b, tile);
        else
            return columns_of(&maps.b, tile);
    }
    __device__ __forceinline__ void prepare(char*, const ProductTile&, int, int) const {}

  private:
    static __device__ __forceinline__ Rows rows_of(const TensorMap* map, const ProductTile& tile) {
        return {.map = map, .first = tile.row, .group = 0, .hint = kSwaps ? kAgainHint : kNormalHint};
    }
    static __device__ __forceinline__ Columns columns_of(const TensorMap* map, const ProductTile& tile) {
        return {
            .map = map, .first = tile.column, .group = tile.group, .hint = kSwaps ? kOnceHint : kNormalHint};
    }
};

// y = x @ w.T, or x @ w.
template <typename S, bool kSwaps = false>
struct ProductSm90
    : RowsJob<S, GroupedGemmParams, S::kMajorB == Major::kK ? Form::kWeights : Form::kWeightDepth, kSwaps> {
    using T = typename S::T;

    __device__ __forceinline__ void store(const WarpgroupSums<S>& sums, const ProductTile& tile) const {
        const int num_columns = this->p.num_columns;
        if constexpr (kSwaps) {
            for_each_two_lines<S>(sums, [&](int row, int line, float low, float high) {
                if (tile.row + row >= tile.end_row) return;
                T* const y = static_cast<T*>(this->p.y) + int64_t{tile.row + row} * num_columns;
                const int column = tile.column + line;
                if (column < num_columns) y[column] = rounded<T>(low);
                if (column + 8 < num_columns) y[column + 8] = rounded<T>(high);
            });
        } else {
            for_each_word<S>(sums, [&](int row, int column, const Word& word) {
                const int m = tile.row + row, n = tile.column + column;
                if (m >= tile.end_row or n >= num_columns) return;
                store_word<T>(this->p.y, int64_t{m} * num_columns + n, word);
            });
        }
    }
};

// hidden = silu(gate) * up. Lines of w come as eight of gate and eight of up in turn, so that a thread holds
// both of the same column.
template <typename S, bool kSwaps = false>
struct SwigluSm90 : RowsJob<S, GroupedSwigluParams, Form::kGateUp, kSwaps> {
    using T = typename S::T;

    __device__ __forceinline__ void store(const WarpgroupSums<S>& sums, const ProductTile& tile) const {
        if constexpr (kSwaps) {
            for_each_two_lines<S>(sums, [&](int row, int line, float gate, float up) {
                store_one(tile.row + row, tile.end_row, tile.column + line / 16 * 8 + line % 16, gate, up);
            });
        } else {
            for_each_gate_up<S>(sums, [&](int row, int column, const Word& gate, const Word& up) {
                store_words(tile.row + row, tile.end_row, tile.column + column, gate, up);
            });
        }
    }

  private:
    __device__ __forceinline__ void store_words(int m, int end_row, int f, const Word& gate,
                                                const Word& up) const {
        const auto& p = this->p;
        if (m >= end_row or f >= p.width) return;
        store_word<T>(p.hidden, int64_t{m} * p.width + f, swiglu<T>(gate, up));
        if (p.gate_up == nullptr) return;
        store_word<T>(p.gate_up, int64_t{2} * m * p.width + f, gate);
        store_word<T>(p.gate_up, (int64_t{2} * m + 1) * p.width + f, up);
    }

    __device__ __forceinline__ void store_one(int m, int end_row, int f, float gate, float up) const {
        const auto& p = this->p;
        if (m >= end_row or f >= p.width) return;
        const T gate_T = rounded<T>(gate), up_T = rounded<T>(up);
        const float kept_gate = static_cast<float>(gate_T);
        static_cast<T*>(p.hidden)[int64_t{m} * p.width + f] =
            rounded<T>(static_cast<float>(up_T) * (kept_gate * sigmoid(kept_gate)));
        if (p.gate_up == nullptr) return;
        T* const kept = static_cast<T*>(p.gate_up) + int64_t{2} * m * p.width + f;
        kept[0] = gate_T;
        kept[p.width] = up_T;
    }
};

// From grad_hidden = grad @ w, the gradients of gate and up.
template <typename S>
struct SwigluBackwardSm90 : RowsJob<S, GroupedSwigluBackwardParams, Form::kWeightDepth, false> {
    using T = typename S::T;
    struct GateUp {
        Word gate, up;
    };

    __device__ __forceinline__ void store(const WarpgroupSums<S>& sums, const ProductTile& tile) const {
        const auto& p = this->p;
        // Rows of no expert have no gate and up to read: zeros give zeros.
        const bool is_used = tile.group < p.num_experts;
        const auto is_inside = [&](int row, int column) {
            return tile.row + row < tile.end_row and tile.column + column < p.width;
        };
        const auto gate_at = [&](int row, int column) {
            return int64_t{2} * (tile.row + row) * p.width + tile.column + column;
        };
        update_each_word<S, GateUp>(
            sums,
            [&](int row, int column) {
                GateUp old{};
                if (not is_used or not is_inside(row, column)) return old;
                const int64_t at = gate_at(row, column);
                old.gate = word_at<T>(p.gate_up, at);
                old.up = word_at<T>(p.gate_up, at + p.width);
                return old;
            },
            [&](int row, int column, const Word& grad, GateUp& old) {
                swiglu_backward<T>(grad, old.gate, old.up);
                if (not is_inside(row, column)) return;
                const int64_t at = gate_at(row, column);
                store_word<T>(p.grad_gate_up, at, old.gate);
                store_word<T>(p.grad_gate_up, at + p.width, old.up);
            });
    }
};

}  // namespace dsc
