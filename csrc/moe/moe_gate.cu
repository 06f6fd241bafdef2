// Top-k expert gating in one launch: softmax over all experts, the best groups, the best experts of those
// (DeepSeek-V2, arXiv 2405.04434, eqs 20-22 and section 2.2.2). A block takes as many tokens as it has rows
// of lanes (moe_gate.cuh): the 8192 tokens of a step are then 512 blocks, all on the SMs at once, and the
// launch overlaps the tail of the product that makes the logits.
#include "moe/moe_gate.cuh"

namespace dsc {
namespace gate {
namespace {

template <typename L>
__global__ void __launch_bounds__(kNumThreads) moe_gate_kernel(const MoeGateParams p) {
    const int lane = threadIdx.x % L::kLanes;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * L::kTokensPerBlock + threadIdx.x / L::kLanes;
    // A row past the end repeats the last token and stores nothing.
    const bool is_token = row < p.num_tokens;
    const int64_t token = is_token ? row : p.num_tokens - 1;

    wait_for_previous_kernel();
    float logit[L::kPerLane];
    load_logits<L>(p.logits + token * p.num_experts, p.num_experts, lane, logit);
    let_next_kernel_start();
    const Routed<L> routed = route<L>(p, logit, lane);
    store_choices<L>(p, routed, token, is_token, lane);
}

}  // namespace
}  // namespace gate

void launch_moe_gate(const MoeGateParams& p, cudaStream_t stream) {
    gate::check_limits("moe_gate", p);
    if (p.num_tokens == 0 or p.num_topk == 0) return;
    gate::with_layout(p, [&]<typename L>() {
        const int64_t num_blocks = ceil_div<int64_t>(p.num_tokens, L::kTokensPerBlock);
        launch_overlapped(gate::moe_gate_kernel<L>, dim3(static_cast<unsigned>(num_blocks)),
                          dim3(gate::kNumThreads), 0, stream, p);
    });
}

}  // namespace dsc
