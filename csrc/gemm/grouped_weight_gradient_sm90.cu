// The weight gradient on sm_90a: the elements' type or float32, written or accumulated.
#include "gemm/grouped_gemm_launch_sm90.cuh"

#ifndef DSC_NO_DEVICE_CODE
#include "gemm/grouped_gemm_wgrad_sm90.cuh"
#endif

namespace dsc {

#ifdef DSC_NO_DEVICE_CODE

void launch_grouped_weight_gradient_sm90(const GroupedWeightGradientParams& p, const GemmPlan&,
                                         cudaStream_t) {
    launch_without_sm90(p);
}

#else

void launch_grouped_weight_gradient_sm90(const GroupedWeightGradientParams& p, const GemmPlan& plan,
                                         cudaStream_t stream) {
    with_warpgroup_tile<GemmStep::kWeightGradient, Major::kMN, Major::kMN>(
        plan, p.type, [&]<typename S, bool kSwaps>() {
            static_assert(not kSwaps);
            using Job = WeightGradientSm90<S, typename S::T>;
            const TensorMapSpec grad =
                rows_map<typename Job::A>("grad", p.grad, p.type, p.num_rows, p.num_columns);
            const TensorMapSpec x = rows_map<typename Job::B>("x", p.x, p.type, p.num_rows, p.depth);
            if (p.is_float32) return launch_pairs<S>(plan, grad, x, WeightGradientSm90<S, float>{p}, stream);
            launch_pairs<S>(plan, grad, x, Job{p}, stream);
        });
}

#endif

}  // namespace dsc
