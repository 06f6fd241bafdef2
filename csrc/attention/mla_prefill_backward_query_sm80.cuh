// The gradient of prefill attention to its queries without atomics, for callers that want the same bits every
// time: a block holds a tile of queries of one head and walks over the keys that it sees, in their order. dQ
// stays in its registers. S and dS are made a second time for it: 1152 multiply-adds for a query, a key and a
// head where the atomics need 832.
//
// Resources at 192/128: dQ 96 registers for the whole walk, Q K^T and dO V^T 32 + 32. Shared memory as the
// other kernel's, of which P stays unused. The next V comes while dQ is multiplied, the next K while the next
// dO V^T is.
#pragma once

#include "attention/mla_prefill_scores_sm80.cuh"

namespace dsc::prefill_backward {

// Keys or values of a block, of which there may be none left.
template <int kWidth, typename S>
__device__ __forceinline__ void start_block(typename S::T* tile, const HeadRows& rows, const Place& place,
                                            int head, bool is_there, int block) {
    if (is_there) {
        start_keys<S::kKeys, kWidth>(tile, rows, place.sequence, block * S::kKeys, head);
    }
    commit_copies();
}

// Block: a tile of queries of one head, as the plan has them.
template <typename S>
__global__ void __launch_bounds__(kNumThreads, 1)
    mla_prefill_grad_query_sm80_kernel(const MlaPrefillBackwardParams p) {
    using T = typename S::T;
    using Grid = typename S::GradQ;
    DSC_SHARED_DYNAMIC(unsigned char, bytes);
    const Memory<S> memory(bytes);
    wait_for_previous_kernel();
    if (not has_place(p, p.num_heads)) return;
    const Place place = find_place(p, p.num_heads);
    const PrefillTiling tiling{PrefillSide::kQueries, S::kQueries, S::kKeys, p.causal};
    const int first_query = place.tile * S::kQueries, key_head = place.head / (p.num_heads / p.num_key_heads);
    const int num_blocks = end_key_block(place.sequence, place.tile, tiling);
    const auto start_value = [&](int block) {
        start_block<S::kValueWidth, S>(memory.value, p.v, place, key_head, block < num_blocks, block);
    };
    const auto start_key = [&](int block) {
        start_block<S::kWidth, S>(memory.key, p.k, place, key_head, block < num_blocks, block);
    };
    if (num_blocks > 0) {
        start_queries<S::kQueries, S::kValueWidth>(memory.grad_out, p.grad_out, place.sequence, first_query,
                                                   place.head);
        start_value(0);
        start_queries<S::kQueries, S::kWidth>(memory.query, p.q, place.sequence, first_query, place.head);
        start_key(0);
    }
    RowValues<S> rows;
    rows.load(p, place.sequence, first_query, place.head);
    Sums<Grid> grad_q;
    clear<Grid>(grad_q);
    for (int block = 0; block < num_blocks; ++block) {
        make_scores<S, false>(memory, rows,
                              seen_keys(place.sequence, first_query, block * S::kKeys, p.causal),
                              p.scale * kLog2E);
        __syncthreads();
        start_value(block + 1);
        add_product<T, Grid, S::kKeys / 16>(
            grad_q, Operand<Grid, Side::kA, Depth::kAlongRows, S::kKeys>(memory.grad_score),
            Operand<Grid, Side::kB, Depth::kAcrossRows, S::kWidth>(memory.key));
        __syncthreads();
        start_key(block + 1);
    }
    let_next_kernel_start();
    const Place end = find_place(p, p.num_heads);
    const int row = end.tile * S::kQueries;
    const int64_t first = (int64_t{end.sequence.first_query} + row) * p.num_heads + end.head;
    store_gradient<Grid, S::kWidth>(static_cast<T*>(p.grad_q) + first * S::kWidth, p.num_heads,
                                    end.sequence.num_queries - row, grad_q, p.scale);
}

}  // namespace dsc::prefill_backward
