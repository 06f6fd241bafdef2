// The grouped product y = x @ w.T on sm_90a.
#include "gemm/grouped_gemm_launch_sm90.cuh"

namespace dsc {

#ifdef DSC_NO_DEVICE_CODE

bool has_gemm_sm90() {
    return false;
}

void launch_grouped_gemm_sm90(const GroupedGemmParams& p, const GemmPlan&, cudaStream_t) {
    launch_without_sm90(p);
}

#else

bool has_gemm_sm90() {
    return true;
}

void launch_grouped_gemm_sm90(const GroupedGemmParams& p, const GemmPlan& plan, cudaStream_t stream) {
    if (p.is_w_transposed) return launch_grouped_gemm_transposed_sm90(p, plan, stream);
    with_warpgroup_tile<GemmStep::kForward, Major::kK, Major::kK>(
        plan, p.type, [&]<typename S, bool kSwaps>() {
            using Job = ProductSm90<S, kSwaps>;
            launch_pairs<S>(
                plan, rows_map<typename Job::Rows>("x", p.x, p.type, p.num_rows, p.depth),
                weights_map<typename Job::Columns>(p.w, p.type, p.num_experts, p.num_columns, p.depth),
                Job{{.p = p}}, stream);
        });
}

#endif

}  // namespace dsc
