// The kernels round the backward pass of prefill attention: what every row needs ahead of it, and grad_q from
// its float32 sums behind it.
//
// Sums of grad_q lie as the warps that add to them hold their fragments. Blocks of 16 queries of a sequence;
// in each all heads; in each blocks of 16 columns, 256 floats: sum_place. A sequence begins in a block of its
// own.
#pragma once

#include "attention/mla_prefill.h"
#include "core/host_device.h"

namespace dsc {

constexpr int kSumRows = 16;

// The block of 16 queries that a sequence begins in. num_sum_blocks in all.
DSC_HOST_DEVICE constexpr int64_t first_sum_block(int64_t first_query, int sequence) {
    return first_query / kSumRows + sequence;
}

DSC_HOST_DEVICE constexpr int64_t num_sum_blocks(int64_t num_queries, int num_sequences) {
    return num_queries / kSumRows + num_sequences;
}

// Lane `lane` of a warp holds 8 elements of a block of 16 x 16: columns 2 * (lane % 4) and the one behind of
// row lane / 4, the same of row lane / 4 + 8, then those of the right half.
DSC_HOST_DEVICE constexpr int sum_place(int column_block, int element, int lane) {
    return (column_block * 8 + element) * 32 + lane;
}

// row_values; zeros in sums_q, unless deterministic, and in the gradients of rows of no sequence.
void launch_mla_prefill_row_values(const MlaPrefillBackwardParams& p, cudaStream_t stream);

// grad_q = scale * sums_q, rounded.
void launch_mla_prefill_round_sums(const MlaPrefillBackwardParams& p, cudaStream_t stream);

}  // namespace dsc
