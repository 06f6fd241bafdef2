// The grouped product y = x @ w.T, rows of x gathered on load or not.
#include "gemm/grouped_gemm_launch.cuh"

namespace dsc {

void launch_grouped_gemm(const GroupedGemmParams& p, const GemmChoice& choice, cudaStream_t stream) {
    constexpr GemmStep kStep = GemmStep::kForward;
    const GemmPlan plan = plan_gemm({.step = p.is_w_transposed ? GemmStep::kInputGradient : kStep,
                                     .num_rows = p.num_rows,
                                     .num_experts = p.num_experts,
                                     .num_columns = p.num_columns,
                                     .depth = p.depth,
                                     .gathers = p.row_idx != nullptr},
                                    current_gemm_device(), choice);
    if (plan.arch == GemmArch::kSm90) return launch_grouped_gemm_sm90(p, plan, stream);
    if (p.is_w_transposed) return launch_grouped_gemm_transposed(p, plan, stream);
    with_shape<kStep, Major::kK, Major::kK>(plan, p.type, [&]<typename S>() {
        launch_job(plan, Product<S>{{.p = p, .num_columns = p.num_columns}}, stream);
    });
}

}  // namespace dsc
