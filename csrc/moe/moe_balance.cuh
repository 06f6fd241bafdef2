// How the tokens of moe_balance_loss are cut up: no block has tokens of two sequences.
#pragma once

#include "core/check.h"
#include "core/math.h"
#include "moe/moe.h"

namespace dsc::balance {

// The tokens of one block, of one sequence; none if the sequence has fewer tokens than chunks.
struct Chunk {
    int sequence;
    int64_t first, end;
};

// Params: MoeBalanceParams or MoeBalanceBackwardParams. The grid is num_sequences * num_chunks blocks.
template <typename Params>
__device__ __forceinline__ Chunk chunk_of_block(const Params& p) {
    const int sequence = static_cast<int>(blockIdx.x) / p.num_chunks;
    const int chunk = static_cast<int>(blockIdx.x) % p.num_chunks;
    const int length = static_cast<int>(p.num_tokens) / p.num_sequences;  // 64-bit division costs a hundred
    const int size = ceil_div(length, p.num_chunks);
    const int first = min(chunk * size, length);
    const int64_t begin = static_cast<int64_t>(sequence) * length;
    return {sequence, begin + first, begin + min(first + size, length)};
}

// Numbers in a row of MoeBalanceParams::count.
__device__ __forceinline__ int num_counts(const MoeBalanceParams& p) {
    return p.num_experts + 2 * p.num_groups;
}

template <typename Params>
dim3 grid_of(const Params& p) {
    constexpr int kMaxTokens = 1 << 30;
    DSC_CHECK(p.num_tokens <= kMaxTokens, "moe_balance_loss: num_tokens must be <= ", kMaxTokens, ", got ",
              p.num_tokens);
    return dim3(static_cast<unsigned>(p.num_sequences) * static_cast<unsigned>(p.num_chunks));
}

// The gradient of all terms together in the probability of an expert of the sequence. kNumTerms: num_terms.
template <int kNumTerms>
__device__ __forceinline__ float grad_of_prob(const MoeBalanceBackwardParams& p, int sequence, int expert) {
    float grad = 0.0f;
    DSC_UNROLL
    for (int c = 0; c < kNumTerms; ++c) {
        const int64_t row = static_cast<int64_t>(c) * p.num_sequences + sequence;
        grad += p.grad_terms[c] * p.load[row * p.num_experts + expert];
    }
    return grad;
}

}  // namespace dsc::balance
