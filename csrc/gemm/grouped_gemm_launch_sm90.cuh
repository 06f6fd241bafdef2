// How the launchers of the sm_90a products go from a plan to a kernel: tensor maps and template arguments.
#pragma once

#include "core/launch.h"
#include "core/tensor_map.h"
#include "gemm/gemm_sm90.h"

#ifndef DSC_NO_DEVICE_CODE

#include "gemm/grouped_gemm_sm90.cuh"
#include "gemm/grouped_maps_sm90.h"

namespace dsc {

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
