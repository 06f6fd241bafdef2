// How the launchers of the sm_90a products go from a plan to a kernel: tensor maps and template arguments.
#pragma once

#include "core/launch.h"
#include "core/tensor_map.h"
#include "gemm/gemm_sm90.h"

#ifdef DSC_NO_DEVICE_CODE

namespace dsc {

template <typename Params>
void launch_without_sm90(const Params&) {
    throw std::runtime_error("grouped_gemm: this build has no kernels of arch sm90");
}

}  // namespace dsc

#else

#include "gemm/grouped_gemm_sm90.cuh"

namespace dsc {

// A tensor of `type`, dimensions from the innermost; strides and boxes in elements.
template <size_t kRank>
TensorMapSpec map_spec(const char* name, const void* base, FloatType type,
                       const std::array<int64_t, kRank>& sizes, const std::array<int64_t, kRank - 1>& strides,
                       const std::array<int, kRank>& box) {
    TensorMapSpec spec{.op = "grouped_gemm",
                       .name = name,
                       .base = base,
                       .is_bfloat16 = type == FloatType::kBfloat16,
                       .rank = static_cast<int>(kRank),
                       .sizes = {},
                       .strides = {},
                       .box = {}};
    for (size_t i = 0; i < kRank; ++i) {
        spec.sizes[i] = static_cast<uint64_t>(sizes[i]);
        spec.box[i] = static_cast<uint32_t>(box[i]);
        if (i + 1 < kRank) spec.strides[i] = static_cast<uint64_t>(strides[i]) * 2;
    }
    return spec;
}

// x [num_rows, width], by rows or by depth.
template <typename Boxes>
TensorMapSpec rows_map(const char* name, const void* x, FloatType type, int64_t num_rows, int64_t width) {
    return map_spec<2>(name, x, type, {width, num_rows}, {width}, {kTileK, Boxes::kBoxLines});
}

// w [E, num_lines, width], a line per n and k contiguous, or a line per k.
template <typename Boxes>
TensorMapSpec weights_map(const void* w, FloatType type, int64_t num_experts, int64_t num_lines,
                          int64_t width) {
    return map_spec<3>("w", w, type, {width, num_lines, num_experts}, {width, num_lines * width},
                       {kTileK, Boxes::kBoxLines, 1});
}

// w [E, 2, F, K], eight rows of gate and eight of up in turn.
template <typename Boxes>
TensorMapSpec gate_up_map(const void* w, FloatType type, int64_t num_experts, int64_t width, int64_t depth) {
    return map_spec<5>("w", w, type, {depth, 8, 2, width / 8, num_experts},
                       {depth, width * depth, 8 * depth, 2 * width * depth},
                       {kTileK, 8, 2, Boxes::kBoxLines / 16, 1});
}

// Which of the operands are wgmma's rows, the job says.
template <typename S, typename Job>
void launch_pairs(const GemmPlan& plan, const TensorMapSpec& rows, const TensorMapSpec& columns,
                  const Job& job, cudaStream_t stream) {
    const ProductOptions options{
        .num_stages = plan.num_stages, .multicasts = plan.multicasts, .skew_blocks = plan.skew_blocks};
    const TensorMaps maps{.a = encode_tensor_map(Job::kSwaps ? columns : rows),
                          .b = encode_tensor_map(Job::kSwaps ? rows : columns)};
    launch_overlapped(grouped_product_kernel<S, Job>, dim3(static_cast<unsigned>(plan.num_blocks)),
                      dim3(kNumThreadsSm90), S::kRingBytes, stream, maps, job, options);
}

// Calls function.operator()<WarpgroupTile<...>, kSwaps>() with the planned tile and the elements' type.
template <GemmStep kStep, Major kMajorA, Major kMajorB, int kTileIdx = first_sm90_tile(kStep),
          typename Function>
void with_warpgroup_tile(const GemmPlan& plan, FloatType type, const Function& function) {
    if (plan.tile_idx != kTileIdx) {
        if constexpr (kTileIdx + 1 < static_cast<int>(kSm90Tiles.size())) {
            with_warpgroup_tile<kStep, kMajorA, kMajorB, kTileIdx + 1>(plan, type, function);
        }
        return;
    }
    constexpr Sm90Tile kTile = kSm90Tiles[kTileIdx];
    constexpr int kM = kTile.swaps ? kTile.columns : kTile.rows;
    constexpr int kN = kTile.swaps ? kTile.rows : kTile.columns;
    if (type == FloatType::kBfloat16) {
        using S = WarpgroupTile<__nv_bfloat16, kM, kN, kTile.num_stages, kMajorA, kMajorB>;
        function.template operator()<S, kTile.swaps>();
    } else {
        using S = WarpgroupTile<__half, kM, kN, kTile.num_stages, kMajorA, kMajorB>;
        function.template operator()<S, kTile.swaps>();
    }
}

// x @ w without a transpose: a file of its own.
void launch_grouped_gemm_transposed_sm90(const GroupedGemmParams& p, const GemmPlan& plan,
                                         cudaStream_t stream);

}  // namespace dsc

#endif
