// The grouped product y = x @ w, the gradient of x: the weights lie as they do for x @ w.T, their depth
// outermost.
#include "gemm/grouped_gemm_launch.cuh"

namespace dsc {

void launch_grouped_gemm_transposed(const GroupedGemmParams& p, const GemmPlan& plan, cudaStream_t stream) {
    with_shape<GemmStep::kInputGradient, Major::kK, Major::kMN>(plan, p.type, [&]<typename S>() {
        launch_job(plan, Product<S>{{.p = p, .num_columns = p.num_columns}}, stream);
    });
}

}  // namespace dsc
