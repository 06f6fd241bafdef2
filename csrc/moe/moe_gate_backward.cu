// The gradient of moe_gate, and of moe_gate and moe_balance_loss together, in one launch each.
//
// With w = scale * softmax(logits)[idx] and g the gradient of the weights times the scale, spread over the
// experts (0 where not chosen):
//     grad_logit = p * (g - sum(p * g)).
// Weights divided by their sum are a softmax over the chosen experts alone: the same formula, with p = 0
// elsewhere. The balance terms are linear in p: their gradient d, one number for each expert of a sequence,
// goes through the same formula with the p of all experts. The probabilities are computed again from the
// logits. Rows of lanes as in moe_gate.cuh; a row past the end repeats the last token and stores nothing.
#include "moe/moe_balance.cuh"
#include "moe/moe_gate.cuh"

namespace dsc {
namespace gate {
namespace {

constexpr uint32_t kAllExperts = ~0u;
constexpr int kNumTerms = 3;  // the balance terms come unweighted

template <typename L>
struct Token {
    float logit[L::kPerLane];
    int expert[L::kSlots];         // lane l: the choices l, l + kLanes, ...; -1 past the last
    float grad_weight[L::kSlots];  // times the scale
};

template <typename L>
__device__ __forceinline__ Token<L> load_token(const MoeGateBackwardParams& p, int64_t token, int lane) {
    Token<L> loaded;
    load_logits<L>(p.logits + token * p.num_experts, p.num_experts, lane, loaded.logit);
    DSC_UNROLL
    for (int i = 0; i < L::kSlots; ++i) {
        const int k = lane + i * L::kLanes;
        const bool is_choice = k < p.num_topk;
        loaded.expert[i] = is_choice ? p.idx[token * p.num_topk + k] : -1;
        loaded.grad_weight[i] = is_choice ? p.grad_weight[token * p.num_topk + k] * p.scale : 0.0f;
    }
    return loaded;
}

// The K gradients at their experts' places. Returns one bit per expert of the lane: whether it was chosen.
template <typename L>
__device__ __forceinline__ uint32_t spread(const Token<L>& token, int num_topk, int lane,
                                           float (&grad)[L::kPerLane]) {
    uint32_t chosen = 0;
    DSC_UNROLL
    for (int i = 0; i < L::kSlots; ++i) {
        for (int k = i * L::kLanes; k < min(num_topk, (i + 1) * L::kLanes); ++k) {
            const int slot = row_broadcast<L::kLanes>(token.expert[i], k % L::kLanes) - lane * L::kPerLane;
            const float grad_k = row_broadcast<L::kLanes>(token.grad_weight[i], k % L::kLanes);
            if (slot >= 0 and slot < L::kPerLane) chosen |= 1u << slot;
            DSC_UNROLL
            for (int j = 0; j < L::kPerLane; ++j) {
                if (j == slot) grad[j] = grad_k;
            }
        }
    }
    return chosen;
}

// exp(logit - largest) in place of the logits.
template <typename L>
__device__ __forceinline__ void exponentiate(float (&logit)[L::kPerLane]) {
    float largest = logit[0];
    DSC_UNROLL
    for (int j = 1; j < L::kPerLane; ++j) largest = fmaxf(largest, logit[j]);
    largest = row_max<L::kLanes>(largest);
    DSC_UNROLL
    for (int j = 0; j < L::kPerLane; ++j) logit[j] = exp_fast(logit[j] - largest);
}

// A softmax over the experts whose bits are set in `counted`, and the mean of g under it.
struct Softmax {
    uint32_t counted;
    float factor, mean;  // p = numerator * factor

    __device__ __forceinline__ float grad(float numerator, float g, int j) const {
        return counted >> j & 1 ? numerator * factor * (g - mean) : 0.0f;
    }
};

template <typename L>
__device__ __forceinline__ Softmax softmax_of(const float (&numerator)[L::kPerLane],
                                              const float (&g)[L::kPerLane], uint32_t counted) {
    float sum = 0.0f, dot = 0.0f;
    DSC_UNROLL
    for (int j = 0; j < L::kPerLane; ++j) {
        const float term = counted >> j & 1 ? numerator[j] : 0.0f;
        sum += term;
        dot += term * g[j];
    }
    const float factor = 1.0f / row_sum<L::kLanes>(sum);
    return {counted, factor, row_sum<L::kLanes>(dot) * factor};
}

template <typename L>
__device__ __forceinline__ void store_grad(float* row, int num_experts, int lane,
                                           const float (&grad)[L::kPerLane]) {
    const int first = lane * L::kPerLane;
    if constexpr (L::kIsExact) {
        DSC_UNROLL
        for (int j = 0; j < L::kPerLane; j += 4) {
            *reinterpret_cast<float4*>(row + first + j) =
                make_float4(grad[j], grad[j + 1], grad[j + 2], grad[j + 3]);
        }
    } else {
        DSC_UNROLL
        for (int j = 0; j < L::kPerLane; ++j) {
            if (first + j < num_experts) row[first + j] = grad[j];
        }
    }
}

template <typename L>
__global__ void __launch_bounds__(kNumThreads) moe_gate_backward_kernel(const MoeGateBackwardParams p) {
    const int lane = threadIdx.x % L::kLanes;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * L::kTokensPerBlock + threadIdx.x / L::kLanes;
    const bool is_token = row < p.num_tokens;
    const int64_t token = is_token ? row : p.num_tokens - 1;

    wait_for_previous_kernel();
    Token<L> loaded = load_token<L>(p, token, lane);
    let_next_kernel_start();
    float grad[L::kPerLane] = {};
    const uint32_t chosen = spread<L>(loaded, p.num_topk, lane, grad);
    exponentiate<L>(loaded.logit);
    if (p.renormalize) {
        DSC_UNROLL
        for (int j = 0; j < L::kPerLane; ++j) loaded.logit[j] = chosen >> j & 1 ? loaded.logit[j] : 0.0f;
    }
    const Softmax of_weights = softmax_of<L>(loaded.logit, grad, kAllExperts);
    DSC_UNROLL
    for (int j = 0; j < L::kPerLane; ++j) grad[j] = of_weights.grad(loaded.logit[j], grad[j], j);
    if (is_token) store_grad<L>(p.grad_logits + token * p.num_experts, p.num_experts, lane, grad);
}

// A block takes a chunk of one sequence's tokens, so that the gradient of the terms is loaded once.
template <typename L>
__global__ void __launch_bounds__(kNumThreads)
    moe_gate_with_balance_backward_kernel(const MoeGateBackwardParams p, const MoeBalanceBackwardParams b) {
    const int lane = threadIdx.x % L::kLanes;
    const int row = threadIdx.x / L::kLanes;
    const balance::Chunk chunk = balance::chunk_of_block(b);

    wait_for_previous_kernel();
    let_next_kernel_start();
    float grad_prob[L::kPerLane];
    DSC_UNROLL
    for (int j = 0; j < L::kPerLane; ++j) {
        const int expert = lane * L::kPerLane + j;
        const bool is_expert = L::kIsExact or expert < p.num_experts;
        grad_prob[j] = is_expert ? balance::grad_of_prob<kNumTerms>(b, chunk.sequence, expert) : 0.0f;
    }
    for (int64_t first = chunk.first; first < chunk.end; first += L::kTokensPerBlock) {
        const bool is_token = first + row < chunk.end;
        const int64_t token = is_token ? first + row : chunk.end - 1;
        Token<L> loaded = load_token<L>(p, token, lane);
        float grad[L::kPerLane] = {};
        const uint32_t chosen = spread<L>(loaded, p.num_topk, lane, grad);
        exponentiate<L>(loaded.logit);
        if (p.renormalize) {  // two softmaxes, each with its own gradient
            const Softmax of_weights = softmax_of<L>(loaded.logit, grad, chosen);
            const Softmax of_terms = softmax_of<L>(loaded.logit, grad_prob, kAllExperts);
            DSC_UNROLL
            for (int j = 0; j < L::kPerLane; ++j) {
                grad[j] = of_weights.grad(loaded.logit[j], grad[j], j) +
                          of_terms.grad(loaded.logit[j], grad_prob[j], j);
            }
        } else {
            DSC_UNROLL
            for (int j = 0; j < L::kPerLane; ++j) grad[j] += grad_prob[j];
            const Softmax of_both = softmax_of<L>(loaded.logit, grad, kAllExperts);
            DSC_UNROLL
            for (int j = 0; j < L::kPerLane; ++j) grad[j] = of_both.grad(loaded.logit[j], grad[j], j);
        }
        if (is_token) store_grad<L>(p.grad_logits + token * p.num_experts, p.num_experts, lane, grad);
    }
}

// ---- host ----

// Groups do not matter to the gradient.
template <typename Function>
void with_backward_layout(const MoeGateBackwardParams& p, const Function& function) {
    const bool is_fast = is_aligned(p.logits) and is_aligned(p.grad_logits);
    if (is_fast and p.num_experts == 64) return function.template operator()<Experts64>();
    if (is_fast and p.num_experts == 160) return function.template operator()<Experts160>();
    with_any_layout<Groups::kAllKept>(p.num_experts, function);
}

}  // namespace
}  // namespace gate

void launch_moe_gate_backward(const MoeGateBackwardParams& p, cudaStream_t stream) {
    gate::check_limits("moe_gate", p);
    gate::with_backward_layout(p, [&]<typename L>() {
        const int64_t num_blocks = ceil_div<int64_t>(p.num_tokens, L::kTokensPerBlock);
        if (num_blocks == 0) return;
        launch_overlapped(gate::moe_gate_backward_kernel<L>, dim3(static_cast<unsigned>(num_blocks)),
                          dim3(gate::kNumThreads), 0, stream, p);
    });
}

void launch_moe_gate_with_balance_backward(const MoeGateBackwardParams& gate,
                                           const MoeBalanceBackwardParams& balance, cudaStream_t stream) {
    gate::check_limits("moe_gate_with_balance", gate);
    if (gate.num_tokens == 0) return;
    gate::with_backward_layout(gate, [&]<typename L>() {
        launch_overlapped(gate::moe_gate_with_balance_backward_kernel<L>, balance::grid_of(balance),
                          dim3(gate::kNumThreads), 0, stream, gate, balance);
    });
}

}  // namespace dsc
