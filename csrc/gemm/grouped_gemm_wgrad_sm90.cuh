// The weight gradient on sm_90a: for every expert, grad^T x over its rows. The rows are the depth, and both
// operands lie with it outermost, which wgmma reads as they are.
//
// The last block of an expert's rows may reach into the next expert's, or into rows of none, which may hold
// anything; and 0 * NaN is NaN, so neither operand may keep them. The warpgroups blank those lines in shared
// memory, between the copy engine's writing and the tensor cores' reading:
//   - the wait on `full` comes before, so the copy's bytes are there and nothing overwrites the zeros;
//   - each thread orders its zeros before later reads by the tensor cores (fence.proxy.async), then all
//     threads of the warpgroup meet, and only then is the product issued;
//   - the stage is released after the product, so the next copy comes after the zeros too.
// A line is one row. Each warpgroup blanks its own half of `a` and all
// of `b`; where the other one has begun to read `b`, it reads a zero before and after. The build contract
// looks for this order in the machine code.
#pragma once

#include "gemm/grouped_jobs_sm90.cuh"

namespace dsc {

// Out: what grad_w holds, the elements' type or float.
template <typename S, typename Out>
struct WeightGradientSm90 {
    using T = typename S::T;
    static constexpr bool kSwaps = false;
    static_assert(S::kMajorA == Major::kMN and S::kMajorB == Major::kMN and S::kWarpgroupsM == 2);
    using A = OperandBoxes<Form::kRowDepth, S::kM>;
    using B = OperandBoxes<Form::kRowDepth, S::kN>;
    GroupedWeightGradientParams p;

    __device__ __forceinline__ void fill(GroupTable& table) const {
        fill_groups(table, p.offsets, p.num_experts, p.num_rows, [](int) { return 0; });
    }
    __device__ __forceinline__ int pairs_of_expert() const {
        return num_pairs<kSwaps>(ceil_div(p.num_columns, S::kM), ceil_div(p.depth, S::kN));
    }
    __device__ __forceinline__ int num_tile_pairs(const GroupTable&) const {
        return p.num_experts * pairs_of_expert();
    }
    __device__ __forceinline__ ProductTile tile_at(const GroupTable& table, int idx, int rank) const {
        const int expert = idx / pairs_of_expert();
        const int first_row = table.first_row[expert], end_row = table.first_row[expert + 1];
        const TilePair pair = pair_at<kSwaps>(idx - expert * pairs_of_expert(),
                                              ceil_div(p.num_columns, S::kM), ceil_div(p.depth, S::kN), rank);
        return {.group = expert,
                .group_row = first_row,
                .group_end = end_row,
                .row = pair.row_tile * S::kM,
                .end_row = p.num_columns,
                .column = pair.column_tile * S::kN,
                .num_k_blocks = ceil_div(end_row - first_row, kTileK),
                .shares_rows = pair.shares_rows};
    }
    __device__ __forceinline__ A a_of(const TensorMaps& maps, const ProductTile& tile) const {
        return {.map = &maps.a, .first = tile.row, .group = tile.group_row, .hint = kNormalHint};
    }
    __device__ __forceinline__ B b_of(const TensorMaps& maps, const ProductTile& tile) const {
        return {.map = &maps.b, .first = tile.column, .group = tile.group_row, .hint = kNormalHint};
    }

    __device__ __forceinline__ void prepare(char* ring, const ProductTile& tile, int stage,
                                            int k_block) const {
        const int num_lines = tile.group_end - tile.group_row - k_block * kTileK;
        if (num_lines >= kTileK) return;
        const int warpgroup = threadIdx.x / kWarpgroup - 1;
        char* const a = ring + stage * S::kBytesA + warpgroup * (S::kBytesA / kNumConsumers);
        char* const b = ring + S::kStages * S::kBytesA + stage * S::kBytesB;
        keep_order();
        blank_lines<S::kWarpgroupM / kTileK, kTileK>(a, num_lines);
        blank_lines<S::kN / kTileK, kTileK>(b, num_lines);
        order_before_async_reads();
        meet(kNumCutlassBarriers + kBlankBarrier + warpgroup, kWarpgroup);
    }

    __device__ __forceinline__ void store(const WarpgroupSums<S>& sums, const ProductTile& tile) const {
        const auto is_inside = [&](int row, int column) {
            return tile.row + row < tile.end_row and tile.column + column < p.depth;
        };
        Out* const tile_grad = static_cast<Out*>(p.grad_w) +
                               (int64_t{tile.group} * p.num_columns + tile.row) * p.depth + tile.column;
        if (std::is_same_v<Out, T> and not p.accumulates) {
            for_each_word<S>(sums, [&](int row, int column, const Word& word) {
                if (is_inside(row, column)) store_word<T>(tile_grad, int64_t{row} * p.depth + column, word);
            });
            return;
        }
        if (p.accumulates and tile.num_k_blocks == 0) return;
        update_each_two<S>(
            sums,
            [&](int row, int column) {
                if (not p.accumulates or not is_inside(row, column)) return make_float2(0.0f, 0.0f);
                return load_two(tile_grad + int64_t{row} * p.depth + column);
            },
            [&](int row, int column, const float2& sum) {
                if (is_inside(row, column)) store_two(tile_grad + int64_t{row} * p.depth + column, sum);
            });
    }

  private:
    static __device__ __forceinline__ float2 load_two(const Out* at) {
        if constexpr (std::is_same_v<Out, float>) {
            return *reinterpret_cast<const float2*>(at);
        } else {
            return floats_of<T>(*reinterpret_cast<const uint32_t*>(at));
        }
    }
    static __device__ __forceinline__ void store_two(Out* at, const float2& sum) {
        if constexpr (std::is_same_v<Out, float>) {
            *reinterpret_cast<float2*>(at) = sum;
        } else {
            *reinterpret_cast<uint32_t*>(at) = rounded_pair<T>(sum.x, sum.y);
        }
    }
};

}  // namespace dsc
