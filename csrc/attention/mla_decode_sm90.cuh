// Latent decoding on sm_90a: copies by the copy engine (TMA), products by wgmma, two warpgroups that work on
// alternate blocks of the cache.
//
// A block of the grid holds 64 rows of queries and two blocks of 64 rows of the cache in shared memory. The
// result, 64 x 512 sums in float32, fills the registers of two warpgroups, which own half of the columns
// each. Block n of the cache lies in buffer n % 2 and belongs to warpgroup n % 2: the owner takes its scores
// and their softmax, and keeps the weights twice, in registers and, for the other one, in shared memory. Both
// multiply them by their half of the values. So one warpgroup's softmax hides under the other's products.
// Maxima go from one to the other with the weights: block n's follow from those of block n - 1.
//
// A warp of its own loads, into whichever buffer is free, across sequences too: the next one's copies fly
// while this one's result is stored. Scores begin with a block's first strip; a buffer is free again by
// halves.
//
//   full[buffer][strip]    the strip's bytes are there
//   empty[buffer][half]    the warpgroup that owns these values has multiplied by them. What else was read
//                          there came before: the scores, by the weights; the weights of the other one, by
//                          its own half
//   kTold + warpgroup      its weights and maxima are there (a named barrier that it only tells)
//   kScored + warpgroup    all its warps have read the strip that weights go to
//
// A block's scores come before the product on the weights of the block ahead of it (kScoresFirst) where the
// tensor cores are the limit, since maxima then follow each other at the pace of the softmax alone; behind it
// where memory is, since buffers are then free sooner.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "attention/mla_decode_products_sm90.cuh"
#include "core/overlap.h"

namespace dsc {

struct DecodeMaps {
    CUtensorMap queries, cache;
};

// ---- copies: one thread ----

__device__ __forceinline__ void load_strip_box(const CUtensorMap& map, uint64_t& full, uint64_t hint,
                                               char* target, const BoxPlace& place) {
    const auto& [column, row, outer, _, __] = place.at;
    cute::SM90_TMA_LOAD_3D::copy(&map, &full, hint, target, column, row, outer);
}

__device__ __forceinline__ void load_queries(const CUtensorMap& map, const DecodeTile& tile, int sequence,
                                             DecodeShared& shared, char* queries) {
    FullBarrier::arrive_and_expect_tx(&shared.queries_full, kBufferBytes);
    DSC_UNROLL
    for (int strip = 0; strip < kNumStrips; ++strip) {
        load_strip_box(map, shared.queries_full, kNormalHint, queries + strip * kStripBytes,
                       decode_query_place(tile, sequence, strip));
    }
}

// The n-th block of the part, by the turns in which its strips are free.
__device__ __forceinline__ void load_block(const MlaDecodeParams& p, const CUtensorMap& map,
                                           const DecodeOptions& options, DecodeShared& shared, char* buffers,
                                           const DecodePages& pages, int block, int n) {
    const DecodePlace place(n, options.num_buffers);
    const int owner = n % kDecodeWarpgroups, box_rows = decode_box_rows(p.page_size);
    char* const buffer = buffers + place.buffer * kBufferBytes;
    DSC_LOOP
    for (int turn = 0; turn < kNumStrips; ++turn) {
        if (turn == 0) wait_for<EmptyBarrier>(shared.empty[place.buffer][owner], place.phase ^ 1);
        if (turn == kHalfStrips) {
            wait_for<EmptyBarrier>(shared.empty[place.buffer][owner ^ 1], place.phase ^ 1);
        }
        const int strip = strip_in_turn(owner, turn);
        uint64_t& full = shared.full[place.buffer][strip];
        FullBarrier::arrive_and_expect_tx(&full, kStripBytes);
        DSC_UNROLL
        for (int box = 0; box < kMostBoxes; ++box) {
            if (box * box_rows >= kDecodeBlock) break;
            load_strip_box(map, full, options.hint,
                           buffer + strip * kStripBytes + box * box_rows * kLineBytes,
                           decode_box_place(p, pages, block, strip, box));
        }
    }
}

__device__ __forceinline__ void load_pieces(const DecodeMaps& maps, const MlaDecodeParams& p,
                                            const DecodeOptions& options, DecodeShared& shared,
                                            char* memory) {
    cute::prefetch_tma_descriptor(&maps.cache);
    cute::prefetch_tma_descriptor(&maps.queries);
    const DecodeTile tile = decode_tile();
    int n = 0;
    uint32_t round = 0;
    for_each_piece(p, tile, [&](const DecodePiece& piece) {
        if (piece.is_empty()) return;
        DecodePages coming = decode_pages(p, piece, piece.begin);
        wait_for<EmptyBarrier>(shared.queries_empty, round ^ 1);
        load_queries(maps.queries, tile, piece.sequence, shared, memory);
        round ^= 1;
        DSC_LOOP
        for (int block = piece.begin; block < piece.end; ++block, ++n) {
            const DecodePages pages = coming;
            if (block + 1 < piece.end) coming = decode_pages(p, piece, block + 1);
            load_block(p, maps.cache, options, shared, memory + kBufferBytes, pages, block, n);
        }
    });
    let_next_kernel_start();
}

// ---- the kernel ----

__device__ __forceinline__ void init_barriers(DecodeShared& shared) {
    constexpr int kWarps = kWarpgroup / kWarpSize;
    for (int buffer = 0; buffer < kDecodeBuffers; ++buffer) {
        for (int strip = 0; strip < kNumStrips; ++strip) FullBarrier::init(&shared.full[buffer][strip], 1);
        for (int half = 0; half < kDecodeWarpgroups; ++half) {
            EmptyBarrier::init(&shared.empty[buffer][half], kWarps);
        }
    }
    FullBarrier::init(&shared.queries_full, 1);
    EmptyBarrier::init(&shared.queries_empty, kDecodeWarpgroups * kWarps);
    cutlass::arch::fence_barrier_init();
}

template <typename T, bool kScoresFirst>
__global__ void __launch_bounds__(kDecodeSm90Threads, 1)
    mla_decode_sm90_kernel(const __grid_constant__ DecodeMaps maps, const __grid_constant__ MlaDecodeParams p,
                           const __grid_constant__ DecodeOptions options) {
    extern __shared__ __align__(kRingAlignment) char memory[];
    __shared__ DecodeShared shared;
    static_assert(sizeof(DecodeShared) <= kDecodeSm90StaticBytes);
    if (threadIdx.x == 0) init_barriers(shared);
    __syncthreads();
    wait_for_previous_kernel();
    if (threadIdx.x < kDecodeConsumers) {
        cutlass::arch::warpgroup_reg_alloc<kDecodeMultiplyRegisters>();
        DecodeConsumer<T> own{.p = p,
                              .options = options,
                              .shared = shared,
                              .memory = memory,
                              .warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup};
        attend_pieces<kScoresFirst>(own);
    } else {
        cutlass::arch::warpgroup_reg_dealloc<kDecodeLoadRegisters>();
        if (threadIdx.x == kDecodeConsumers) load_pieces(maps, p, options, shared, memory);
    }
}

}  // namespace dsc
