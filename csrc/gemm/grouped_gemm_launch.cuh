// How the launchers of the grouped products go from a call to a kernel: the device, the plan, the template
// arguments.
#pragma once

#include "core/launch.h"
#include "gemm/gemm_sm90.h"
#include "gemm/grouped_gemm_sm80.cuh"

namespace dsc {

// The current device, as plans see it. The host executor is an A100 with so few SMs that blocks take turns.
inline GemmDevice current_gemm_device() {
#ifdef DSC_HOST_EXECUTOR
    return gemm_device(8, 0, 3);
#else
    const int device = current_device();
    GemmDevice found = gemm_device(device_attribute<cudaDevAttrComputeCapabilityMajor>(device),
                                   device_attribute<cudaDevAttrComputeCapabilityMinor>(device),
                                   device_attribute<cudaDevAttrMultiProcessorCount>(device));
    found.is_sm90 = found.is_sm90 and has_gemm_sm90();
    return found;
#endif
}

// Calls function.operator()<TileShape<...>>() with the planned tile and the elements' type.
template <GemmStep kStep, Major kMajorA, Major kMajorB, int kTileIdx = first_sm80_tile(kStep),
          typename Function>
void with_shape(const GemmPlan& plan, FloatType type, const Function& function) {
    if (plan.tile_idx != kTileIdx) {
        if constexpr (kTileIdx + 1 < static_cast<int>(kSm80Tiles.size())) {
            with_shape<kStep, kMajorA, kMajorB, kTileIdx + 1>(plan, type, function);
        }
        return;
    }
    if (type == FloatType::kBfloat16) {
        function.template operator()<TileShape<__nv_bfloat16, kTileIdx, kMajorA, kMajorB>>();
    } else {
        function.template operator()<TileShape<__half, kTileIdx, kMajorA, kMajorB>>();
    }
}

template <typename Job>
void launch_job(const GemmPlan& plan, const Job& job, cudaStream_t stream) {
    if (plan.num_blocks == 0) return;
    launch_overlapped(grouped_gemm_kernel<Job>, dim3(static_cast<unsigned>(plan.num_blocks)),
                      dim3(static_cast<unsigned>(plan.num_threads)), static_cast<size_t>(plan.shared_bytes),
                      stream, job);
}

// x @ w without a transpose, planned already: a file of its own.
void launch_grouped_gemm_transposed(const GroupedGemmParams& p, const GemmPlan& plan, cudaStream_t stream);

}  // namespace dsc
