// The mixture-of-experts family: which kernels there are and what each reads and writes.
#pragma once

#include "core/device.h"
#include "core/dtype.h"

namespace dsc {

// The most that a kernel takes. moe_balance_loss alone takes any K.
constexpr int kMoeMaxExperts = 512;
constexpr int kMoeMaxTopk = 16;

// moe_gate: softmax over all experts, group-limited top-k (DeepSeek-V2, eqs 20-22 and section 2.2.2).
//
// The order of experts, bit for bit the same in the reference: by logit (not by probability: two logits that
// differ keep their order even where their probabilities round to one number), NaN above +inf, -0 equal to
// +0, ties to the smaller index. A group ranks by its largest logit, ties to the smaller group. Experts of
// dropped groups are never chosen, not even over a -inf in a kept group; so a row's indices are always
// distinct and in range.

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

// moe_balance_loss: the expert-, device- and communication-level terms of DeepSeek-V2 (eqs 23-31), taken per
// sequence and averaged over sequences. N is 3, the terms unweighted, or 1, their weighted sum. Tokens are B
// sequences of T / B tokens, one after the other; each is cut into C chunks, and a block of the first launch
// adds up one chunk. The experts of each group are cut into L slices, and a block of the second launch adds
// up the chunks of one slice of one sequence, always in the same order.
struct MoeBalanceParams {
    // Scratch, of any initial value.
    float* prob_sum;  // [B * C, E], of each chunk: probabilities
    int32_t* count;   // [B * C, E + 2 G], choices of each expert, choices and choosing tokens of each group
    float* slice_terms;     // [B * G * L, N]
    int32_t* num_finished;  // [1]

    float* terms;  // [N]
    float* load;   // [N, B, E], the gradient of each term in every probability of the sequence
    int64_t num_tokens;
    int num_sequences, num_chunks, num_slices, num_experts, num_topk, num_groups, num_groups_kept, num_terms;
    float weight[3];  // of each term in the sum, where N is 1
};

// C: enough blocks to fill a GPU, few enough that adding the chunks up costs little.
int moe_balance_num_chunks(int64_t num_tokens, int num_sequences);
// L: enough blocks to read the chunks at once.
int moe_balance_num_slices(int num_sequences, int num_experts, int num_groups);

struct MoeBalanceBackwardParams {
    const float* grad_terms;  // [N]
    const float* load;        // [N, B, E]
    int64_t num_tokens;
    int num_sequences, num_chunks, num_experts, num_terms;
};

// From probabilities and the gate's choices, of which those outside [0, E) count for nobody.
struct MoeBalanceLossParams {
    MoeBalanceParams balance;
    const void* probs;   // [T, E]
    const int32_t* idx;  // [T, K]
    FloatType dtype;     // of probs
};

struct MoeBalanceLossBackwardParams {
    MoeBalanceBackwardParams balance;
    void* grad_probs;  // [T, E], every element is written
    FloatType dtype;   // of grad_probs
};

void launch_moe_balance(const MoeBalanceLossParams& p, cudaStream_t stream);
void launch_moe_balance_backward(const MoeBalanceLossBackwardParams& p, cudaStream_t stream);
// The second launch alone.
void launch_moe_balance_finish(const MoeBalanceParams& p, cudaStream_t stream);

// moe_gate_with_balance: both ops at once, the probabilities never leaving the registers. `balance` describes
// the same tokens, experts and groups as `gate`; its N is 3.
void launch_moe_gate_with_balance(const MoeGateParams& gate, const MoeBalanceParams& balance,
                                  cudaStream_t stream);
// grad_logits of the weights and the terms together.
void launch_moe_gate_with_balance_backward(const MoeGateBackwardParams& gate,
                                           const MoeBalanceBackwardParams& balance, cudaStream_t stream);

// moe_permute: tokens in expert order. M = T * K; expert e owns the rows from offsets[e - 1] to offsets[e],
// in the order of the flat choices t * K + k. A choice outside [0, E) is dropped: its row is -1, and as many
// rows at the end belong to nobody.

// Which rows the choices get. One launch, or two where there are more choices than one block should rank.
struct MoePermuteMapsParams {
    const int32_t* idx;  // [T, K], any value
    int32_t* offsets;    // [E], the row after the last one of each expert
    int32_t* row;        // [T, K]
    int32_t* token;      // [M], the token of each row; 0, a token in range, where the row is nobody's
    int32_t* counts;     // [moe_permute_num_counts(T * K), E], scratch: needs no initial value
    int64_t num_choices;
    int num_experts, num_topk;
};

// Rows of the scratch of MoePermuteMapsParams: one a chunk of choices, none where one block does it all.
int moe_permute_num_counts(int64_t num_choices);

// The maps, and the copy: rows[row[t, k]] = x[t], zero from offsets[E - 1] on.
struct MoePermuteParams {
    MoePermuteMapsParams maps;
    const void* x;  // [T, D]
    void* rows;     // [M, D], every element is written
    int64_t num_tokens, width;
    int num_topk;
    FloatType dtype;  // of x and rows
};

void launch_moe_permute_maps(const MoePermuteMapsParams& p, cudaStream_t stream);
void launch_moe_permute(const MoePermuteParams& p, cudaStream_t stream);

// moe_unpermute: out[t] = sum over k of weight[t, k] * y[row[t, k]], in float32 in the order of k, rounded
// once. Without weights, the gradient of moe_permute.
struct MoeUnpermuteParams {
    const void* y;        // [M, D]
    const float* weight;  // [T, K], or null: all 1
    const int32_t* row;   // [T, K]
    void* out;            // [T, D]
    int64_t num_tokens, width;
    int num_topk;
    FloatType dtype;  // of y and out
};

// grad_y[row[t, k]] = weight[t, k] * grad[t], zero from offsets[E - 1] on; grad_weight[t, k] is the product
// of grad[t] and y[row[t, k]], 0 where dropped.
struct MoeUnpermuteBackwardParams {
    const void* grad;        // [T, D]
    const void* y;           // [M, D]
    const float* weight;     // [T, K]
    const int32_t* row;      // [T, K]
    const int32_t* offsets;  // [E]
    void* grad_y;            // [M, D], written where a row is a choice's or is behind the last one
    float* grad_weight;      // [T, K]
    int64_t num_tokens, width;
    int num_topk, num_experts;
    FloatType dtype;  // of grad, y and grad_y
};

void launch_moe_unpermute(const MoeUnpermuteParams& p, cudaStream_t stream);
void launch_moe_unpermute_backward(const MoeUnpermuteBackwardParams& p, cudaStream_t stream);

}  // namespace dsc
