// The weight gradient on sm_80: for every expert, grad^T x over its rows. The rows are the depth of the
// product here, and both operands lie with it outermost, so ldmatrix transposes both; every expert has the
// same tiles, of unequal depth.
#pragma once

#include "gemm/grouped_gemm_sm80.cuh"

namespace dsc {

// A row per k that an index names, with n contiguous.
template <typename T, int kColumns, int kNumThreads>
struct GatheredDepthRows {
    using Map = CopyMap<Major::kMN, kColumns, kNumThreads>;

    const T* source;  // of this thread's column
    const int32_t* row_idx;
    int64_t row_stride;
    int depth;

    __device__ __forceinline__ void load(T* operand, int k_block) const {
        const int row = Map::row(threadIdx.x), chunk = Map::chunk(threadIdx.x);
        int idx[Map::kRounds];
        DSC_UNROLL
        for (int i = 0; i < Map::kRounds; ++i) {
            const int k = k_block * kTileK + row + i * Map::kRowStep;
            idx[i] = k < depth ? row_idx[k] : -1;
        }
        DSC_UNROLL
        for (int i = 0; i < Map::kRounds; ++i) {
            copy_async(operand + Map::place(row + i * Map::kRowStep, chunk),
                       source + (idx[i] >= 0 ? idx[i] * row_stride : 0), idx[i] >= 0);
        }
    }
};

// The tile's columns of x, over the rows of one expert.
template <typename S, bool kGathers>
__device__ __forceinline__ auto expert_columns(const GroupedWeightGradientParams& p, int64_t first_row,
                                               int num_rows, int column) {
    using T = typename S::T;
    const T* const x = static_cast<const T*>(p.x);
    if constexpr (kGathers) {
        const auto rows = depth_rows<T, S::kN, S::kNumThreads>(x, column, p.depth, num_rows);
        return GatheredDepthRows<T, S::kN, S::kNumThreads>{.source = rows.source,
                                                           .row_idx = p.row_idx + first_row,
                                                           .row_stride = rows.row_stride,
                                                           .depth = rows.depth};
    } else {
        return depth_rows<T, S::kN, S::kNumThreads>(x + first_row * p.depth, column, p.depth, num_rows);
    }
}

// The tile as it stands, `Staged` being the elements' type.
template <typename S, typename T>
__device__ __forceinline__ void store_gradient(const GroupedWeightGradientParams& p, T* staged, int64_t first,
                                               int num_rows, int column) {
    for_each_word<S, T, 1>(staged, num_rows, [&](int row, int place, const Word(&words)[1]) {
        if (column + place >= p.depth) return;
        word_at<T>(p.grad_w, first + int64_t{row} * p.depth + column + place) = words[0];
    });
}

// The tile in float32: stored so, or added to what is there before it is rounded.
template <typename S, typename T>
__device__ __forceinline__ void add_gradient(const GroupedWeightGradientParams& p, float* staged,
                                             int64_t first, int num_rows, int column) {
    for_each_word<S, float, 2>(staged, num_rows, [&](int row, int place, const Word(&words)[2]) {
        if (column + place >= p.depth) return;
        const int64_t at = first + int64_t{row} * p.depth + column + place;
        float sum[kChunk], old[kChunk] = {};
        unpack<float>(words[0], reinterpret_cast<float (&)[4]>(sum[0]));
        unpack<float>(words[1], reinterpret_cast<float (&)[4]>(sum[4]));
        if (p.is_float32) {
            Word* const target = &word_at<float>(p.grad_w, at);
            if (p.accumulates) {
                unpack<float>(target[0], reinterpret_cast<float (&)[4]>(old[0]));
                unpack<float>(target[1], reinterpret_cast<float (&)[4]>(old[4]));
            }
            DSC_UNROLL
            for (int i = 0; i < kChunk; ++i) sum[i] += old[i];
            target[0] = pack<float>(reinterpret_cast<float (&)[4]>(sum[0]));
            target[1] = pack<float>(reinterpret_cast<float (&)[4]>(sum[4]));
        } else {
            unpack<T>(word_at<T>(static_cast<const void*>(p.grad_w), at), old);
            DSC_UNROLL
            for (int i = 0; i < kChunk; ++i) sum[i] += old[i];
            word_at<T>(p.grad_w, at) = pack<T>(sum);
        }
    });
}

// kStaged: T for a gradient of the elements' type that is not accumulated, else float.
template <typename S, bool kGathers, typename Staged>
__global__ void __launch_bounds__(S::kNumThreads)
    grouped_weight_gradient_kernel(const GroupedWeightGradientParams p) {
    using T = typename S::T;
    static_assert(S::kM * S::kN * sizeof(Staged) <= S::kRingBytes);
    DSC_SHARED(GroupTable, table);
    DSC_SHARED_DYNAMIC(T, ring);
    wait_for_previous_kernel();
    fill_groups<S::kM>(table, p.offsets, p.num_experts, p.num_rows);
    const int num_row_tiles = ceil_div(p.num_columns, S::kM), num_column_tiles = ceil_div(p.depth, S::kN);
    const int64_t num_tiles = int64_t{p.num_experts} * num_row_tiles * num_column_tiles;
    for (int64_t idx = blockIdx.x; idx < num_tiles; idx += gridDim.x) {
        const int expert = static_cast<int>(idx / (num_row_tiles * num_column_tiles));
        const int place = static_cast<int>(idx % (num_row_tiles * num_column_tiles));
        const int row = place % num_row_tiles * S::kM, column = place / num_row_tiles * S::kN;
        const int64_t first_row = table.first_row[expert];
        const auto depth = static_cast<int>(table.first_row[expert + 1] - first_row);
        const T* const grad = static_cast<const T*>(p.grad) + first_row * p.num_columns;
        const auto rows = depth_rows<T, S::kM, S::kNumThreads>(grad, row, p.num_columns, depth);
        const auto columns = expert_columns<S, kGathers>(p, first_row, depth, column);
        Accumulators<S> acc;
        multiply_tile<S>(
            acc, ring, ceil_div(depth, kTileK),
            Operands<S, std::remove_const_t<decltype(rows)>, std::remove_const_t<decltype(columns)>>{
                rows, columns});
        __syncthreads();
        Staged* const staged = reinterpret_cast<Staged*>(ring);
        stage_sums<S>(staged, acc);
        __syncthreads();
        const int num_rows = min(S::kM, p.num_columns - row);
        const int64_t first = (int64_t{expert} * p.num_columns + row) * p.depth;
        if constexpr (std::is_same_v<Staged, T>) {
            store_gradient<S>(p, staged, first, num_rows, column);
        } else {
            add_gradient<S, T>(p, staged, first, num_rows, column);
        }
        __syncthreads();
    }
}

}  // namespace dsc
