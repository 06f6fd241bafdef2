// The grouped product y = x @ w on sm_90a, the gradient of x: wgmma reads the weights with their depth
// outermost, as they lie.
#include "gemm/grouped_gemm_launch_sm90.cuh"

#ifndef DSC_NO_DEVICE_CODE

namespace dsc {

void launch_grouped_gemm_transposed_sm90(const GroupedGemmParams& p, const GemmPlan& plan,
                                         cudaStream_t stream) {
    with_warpgroup_tile<GemmStep::kInputGradient, Major::kK, Major::kMN>(
        plan, p.type, [&]<typename S, bool kSwaps>() {
            using Job = ProductSm90<S, kSwaps>;
            launch_pairs<S>(
                plan, rows_map<typename Job::Rows>("x", p.x, p.type, p.num_rows, p.depth),
                weights_map<typename Job::Columns>(p.w, p.type, p.num_experts, p.depth, p.num_columns),
                Job{{.p = p}}, stream);
        });
}

}  // namespace dsc

#endif
