// The gradients of prefill attention on mma.sync: a block holds a tile of keys and values of one key head and
// walks over the queries that see it, of all query heads that share it. dK and dV stay in its registers, so
// no two blocks add to the same key. dQ, to which all tiles of keys add, goes out by float32 atomics.
//
// Resources of a tile of 128 queries and 64 keys at 192/128, on 256 threads:
//     registers: dK 48, dV 32 for the whole walk; dO V^T and Q K^T 32 + 32, then dQ 96.
//     shared memory: Q 48, dO 32, K 24, V 16, P 16, dS 16 KiB: 152 of the 163 that a block of sm_80 may have.
// A product's cycles, by multiply-adds (1024 an SM and cycle) and by what ldmatrix moves (128 bytes): dO V^T
// 1024 / 1024, Q K^T 1536 / 1536, P^T dO 1024 / 1024, dS^T Q 1536 / 1280, dS K 1536 / 1024. Half the queries
// are half the multiply-adds, but 0.63 of the bytes. The next dO comes while dK and dQ are multiplied, the
// next Q while dQ and the next dO V^T are, without a second buffer.
//
// Sums of dQ lie as the warps hold them: 16 rows by 16 columns are 256 floats, a warp's atomic is 128 bytes
// in a row. Rows as they are in grad_q would take eight times as many lines.
#pragma once

#include "attention/mla_prefill_rows.h"
#include "attention/mla_prefill_scores_sm80.cuh"

namespace dsc::prefill_backward {

// The queries that see a tile of keys: tiles of one query head after the other. They begin with the first 16
// that see one, not with a whole tile, which at a diagonal saves half a tile for every second tile of keys.
struct QueryWalk {
    int head, end_head;
    int first_query, begin, end;  // of the tile, and of a head's tiles

    __device__ __forceinline__ bool has_tile() const { return head < end_head and begin < end; }
    __device__ __forceinline__ void advance(int num_queries) {
        first_query += num_queries;
        if (first_query < end) return;
        first_query = begin;
        ++head;
    }
};

template <typename S>
__device__ __forceinline__ QueryWalk walk_queries(const MlaPrefillBackwardParams& p, const Place& place) {
    const int group = p.num_heads / p.num_key_heads;
    const int begin = place.sequence.first_seeing(place.tile * S::kKeys, p.causal) / kSumRows * kSumRows;
    return {place.head * group, (place.head + 1) * group, begin, begin, place.sequence.num_queries};
}

// The halves of a tile of the walk, of which there may be none left.
template <typename S>
__device__ __forceinline__ void start_query(const MlaPrefillBackwardParams& p, const Memory<S>& memory,
                                            const Place& place, const QueryWalk& walk) {
    if (walk.has_tile()) {
        start_queries<S::kQueries, S::kWidth>(memory.query, p.q, place.sequence, walk.first_query, walk.head);
    }
    commit_copies();
}

template <typename S>
__device__ __forceinline__ void start_grad_out(const MlaPrefillBackwardParams& p, const Memory<S>& memory,
                                               const Place& place, const QueryWalk& walk) {
    if (walk.has_tile()) {
        start_queries<S::kQueries, S::kValueWidth>(memory.grad_out, p.grad_out, place.sequence,
                                                   walk.first_query, walk.head);
    }
    commit_copies();
}

// dQ += dS K, by atomics.
template <typename S>
__device__ __forceinline__ void add_grad_query(const MlaPrefillBackwardParams& p, const Memory<S>& memory,
                                               const Place& place, const QueryWalk& walk) {
    using Grid = typename S::GradQ;
    Sums<Grid> sums;
    clear<Grid>(sums);
    add_product<typename S::T, Grid, S::kKeys / 16>(
        sums, Operand<Grid, Side::kA, Depth::kAlongRows, S::kKeys>(memory.grad_score),
        Operand<Grid, Side::kB, Depth::kAcrossRows, S::kWidth>(memory.key));
    const int thread = unhoisted(threadIdx.x), lane = thread % kWarpSize;
    const int64_t first_block = first_sum_block(place.sequence.first_query, place.sequence_idx);
    DSC_UNROLL
    for (int i = 0; i < Grid::kBlocksM; ++i) {
        const int row = walk.first_query + Grid::row(thread, i);
        if (row >= place.sequence.num_queries) continue;
        float* const target =
            p.sums_q + ((first_block + row / kSumRows) * p.num_heads + walk.head) * kSumRows * S::kWidth;
        DSC_UNROLL
        for (int j = 0; j < Grid::kBlocksN; ++j) {
            DSC_UNROLL
            for (int element = 0; element < 8; ++element) {
                atomicAdd(target + sum_place(Grid::column(thread, j) / 16, element, lane),
                          sums[i][j][element / 4][element % 4]);
            }
        }
    }
}

// Block: a tile of keys of one key head, as the plan has them.
template <typename S>
__global__ void __launch_bounds__(kNumThreads, 1)
    mla_prefill_backward_sm80_kernel(const MlaPrefillBackwardParams p) {
    using T = typename S::T;
    DSC_SHARED_DYNAMIC(unsigned char, bytes);
    const Memory<S> memory(bytes);
    wait_for_previous_kernel();
    if (not has_place(p, p.num_key_heads)) return;
    const Place place = find_place(p, p.num_key_heads);
    const int first_key = place.tile * S::kKeys;
    QueryWalk walk = walk_queries<S>(p, place);
    if (walk.has_tile()) {
        start_keys<S::kKeys, S::kValueWidth>(memory.value, p.v, place.sequence, first_key, place.head);
        start_grad_out<S>(p, memory, place, walk);
        start_keys<S::kKeys, S::kWidth>(memory.key, p.k, place.sequence, first_key, place.head);
        start_query<S>(p, memory, place, walk);
    }
    Sums<typename S::GradK> grad_k;
    Sums<typename S::GradV> grad_v;
    clear<typename S::GradK>(grad_k);
    clear<typename S::GradV>(grad_v);
    while (walk.has_tile()) {
        QueryWalk next = walk;
        next.advance(S::kQueries);
        RowValues<S> rows;
        rows.load(p, place.sequence, walk.first_query, walk.head);
        make_scores<S, true>(memory, rows, seen_keys(place.sequence, walk.first_query, first_key, p.causal),
                             p.scale * kLog2E);
        __syncthreads();

        // Each of dO and Q is read for the last time, then its place is free for the next.
        add_product<T, typename S::GradV, S::kQueries / 16>(
            grad_v, Operand<typename S::GradV, Side::kA, Depth::kAcrossRows, S::kKeys>(memory.weight),
            Operand<typename S::GradV, Side::kB, Depth::kAcrossRows, S::kValueWidth>(memory.grad_out));
        __syncthreads();
        start_grad_out<S>(p, memory, place, next);
        add_product<T, typename S::GradK, S::kQueries / 16>(
            grad_k, Operand<typename S::GradK, Side::kA, Depth::kAcrossRows, S::kKeys>(memory.grad_score),
            Operand<typename S::GradK, Side::kB, Depth::kAcrossRows, S::kWidth>(memory.query));
        __syncthreads();
        start_query<S>(p, memory, place, next);
        if (not p.deterministic) add_grad_query<S>(p, memory, place, walk);
        walk = next;
    }
    let_next_kernel_start();
    const Place end = find_place(p, p.num_key_heads);
    const int num_heads = p.num_key_heads, num_keys = end.sequence.num_keys - end.tile * S::kKeys;
    const int64_t first = (int64_t{end.sequence.first_key} + end.tile * S::kKeys) * num_heads + end.head;
    store_gradient<typename S::GradK, S::kWidth>(static_cast<T*>(p.grad_k) + first * S::kWidth, num_heads,
                                                 num_keys, grad_k, p.scale);
    store_gradient<typename S::GradV, S::kValueWidth>(static_cast<T*>(p.grad_v) + first * S::kValueWidth,
                                                      num_heads, num_keys, grad_v, 1.0f);
}

}  // namespace dsc::prefill_backward
