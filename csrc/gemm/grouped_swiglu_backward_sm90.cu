// The gradients of gate and up on sm_90a, in the epilogue of the product that makes the gradient of `hidden`.
#include "gemm/grouped_gemm_launch_sm90.cuh"

namespace dsc {

#ifdef DSC_NO_DEVICE_CODE

void launch_grouped_swiglu_backward_sm90(const GroupedSwigluBackwardParams& p, const GemmPlan&,
                                         cudaStream_t) {
    launch_without_sm90(p);
}

#else

void launch_grouped_swiglu_backward_sm90(const GroupedSwigluBackwardParams& p, const GemmPlan& plan,
                                         cudaStream_t stream) {
    with_warpgroup_tile<GemmStep::kSwigluBackward, Major::kK, Major::kMN>(
        plan, p.type, [&]<typename S, bool kSwaps>() {
            static_assert(not kSwaps);
            using Job = SwigluBackwardSm90<S>;
            launch_pairs<S>(plan, rows_map<typename Job::Rows>("grad", p.grad, p.type, p.num_rows, p.depth),
                            weights_map<typename Job::Columns>(p.w, p.type, p.num_experts, p.depth, p.width),
                            Job{{.p = p}}, stream);
        });
}

#endif

}  // namespace dsc
