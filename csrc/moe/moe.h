// The mixture-of-experts family: which kernels there are and what each reads and writes.
#pragma once

#include "core/device.h"

namespace dsc {

// moe_gate: softmax over all experts, group-limited top-k (DeepSeek-V2, eqs 20-22 and section 2.2.2).
//
// The order of experts, bit for bit the same in the reference: by logit (not by probability: two logits that
// differ keep their order even where their probabilities round to one number), NaN above +inf, -0 equal to
// +0, ties to the smaller index. A group ranks by its largest logit, ties to the smaller group. Experts of
// dropped groups are never chosen, not even over a -inf in a kept group; so a row's indices are always
// distinct and in range.

constexpr int kMoeGateMaxExperts = 512;
constexpr int kMoeGateMaxTopk = 16;

struct MoeGateParams {
    const float* logits;  // [T, E]
    int32_t* idx;         // [T, K], largest weight first
    float* weight;        // [T, K]
    int64_t num_tokens;
    int num_experts, num_topk, num_groups, num_groups_kept;
    float scale;       // multiplies every weight
    bool renormalize;  // divide the K weights by their sum, before the scale
};

// The gradient of the weights with respect to the logits; the indices are constants.
struct MoeGateBackwardParams {
    const float* logits;       // [T, E]
    const int32_t* idx;        // [T, K], as the forward pass wrote it
    const float* grad_weight;  // [T, K]
    float* grad_logits;        // [T, E], every element is written
    int64_t num_tokens;
    int num_experts, num_topk;
    float scale;
    bool renormalize;
};

void launch_moe_gate(const MoeGateParams& p, cudaStream_t stream);
void launch_moe_gate_backward(const MoeGateBackwardParams& p, cudaStream_t stream);

}  // namespace dsc
