// The deterministic gradient of prefill attention to its queries: the plan of their tiles, and its kernel.
#include "attention/mla_prefill_backward_launch.cuh"
#include "attention/mla_prefill_backward_query_sm80.cuh"

namespace dsc::prefill_backward {

void launch_grad_query(const MlaPrefillBackwardParams& p, cudaStream_t stream) {
    with_tile(p, [&]<typename S>() {
        const PrefillTiling tiling{PrefillSide::kQueries, S::kQueries, S::kKeys, p.causal};
        launch_tiles(p, tiling, p.num_heads, mla_prefill_grad_query_sm80_kernel<S>, S::kSharedBytes, stream);
    });
}

}  // namespace dsc::prefill_backward
