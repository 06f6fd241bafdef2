// Prefill attention on sm_90a: copies by the copy engine (TMA), products by wgmma.
//
// A block of the grid takes tiles of 128 queries of one head, as they come: two warpgroups multiply 64 rows
// each with blocks of 128 keys and their values, and a warp of its own loads. The sums, 64 x 128 in float32 a
// warpgroup, stay in registers, and so do the weights: rounded where they are, they become the left operand
// of the product with the values (FlashAttention-3, arXiv 2407.08608).
//
// Two things hide the softmax. A warpgroup issues the scores of its next block ahead of the product on the
// last one's weights, and weighs them while that is under way; and the two issue in turn, so that one weighs
// while the other multiplies. The loader runs ahead, across tiles too: the next one's queries and keys fly
// while this one's last block is multiplied and its rows are stored.
//
//   keys_full, values_full[stage]    the block's bytes are there
//   keys_empty, values_empty[stage]  all warps' products on them are over
//   queries_full                     the tile is told of, and its queries are there
//   queries_empty                    all warps' last scores of the tile are over; the one before it is stored
//   kBlanked                         rows of values behind the sequence are zeros
//   kTurn + warpgroup                the other one has issued its products
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "attention/mla_prefill_products_sm90.cuh"
#include "core/overlap.h"

namespace dsc::prefill_sm90 {

struct Maps {
    CUtensorMap queries, keys, values;
};

// ---- copies: one thread ----

__device__ __forceinline__ void load_box(const CUtensorMap& map, uint64_t& full, char* target,
                                         const BoxPlace& place) {
    const auto& [column, head, row, _, __] = place.at;
    cute::SM90_TMA_LOAD_3D::copy(&map, &full, kNormalHint, target, column, head, row);
}

// Where the loader stands.
template <typename S>
struct Loader {
    const Maps& maps;
    const Options& options;
    Shared& shared;
    char* memory;
    Place keys = {}, values = {};
};

template <typename S>
__device__ __forceinline__ void load_keys(Loader<S>& own, const Tile& tile, int block) {
    uint64_t& full = own.shared.keys_full[own.keys.stage];
    wait_for<EmptyBarrier>(own.shared.keys_empty[own.keys.stage], own.keys.phase ^ 1);
    FullBarrier::arrive_and_expect_tx(&full, S::kKeyBytes);
    char* const target = own.memory + S::kFirstKey + own.keys.stage * S::kKeyBytes;
    DSC_UNROLL
    for (int strip = 0; strip < S::kKeyStrips; ++strip) {
        load_box(own.maps.keys, full, target + strip * kStripBytes, key_place(tile, block, strip));
    }
    own.keys.advance(own.options.num_stages);
}

template <typename S>
__device__ __forceinline__ void load_values(Loader<S>& own, const Tile& tile, int block) {
    uint64_t& full = own.shared.values_full[own.values.stage];
    wait_for<EmptyBarrier>(own.shared.values_empty[own.values.stage], own.values.phase ^ 1);
    FullBarrier::arrive_and_expect_tx(&full, S::kValueBytes);
    char* const target = own.memory + S::kFirstValue + own.values.stage * S::kValueBytes;
    DSC_UNROLL
    for (int strip = 0; strip < S::kValueStrips; ++strip) {
        load_box(own.maps.values, full, target + strip * kStripBytes, key_place(tile, block, strip));
    }
    own.values.advance(own.options.num_stages);
}

// Tells of a tile, or that there is none, and brings the queries of one whose rows see something.
template <typename S>
__device__ __forceinline__ void load_queries(Loader<S>& own, const Tile& tile, uint32_t round) {
    uint64_t& full = own.shared.queries_full;
    wait_for<EmptyBarrier>(own.shared.queries_empty, round ^ 1);
    keep_order();
    own.shared.tiles[round] = tile;
    keep_order();
    if (tile.num_blocks == 0) {
        FullBarrier::arrive(&full);
        return;
    }
    FullBarrier::arrive_and_expect_tx(&full, S::kQueryBytes);
    DSC_UNROLL
    for (int strip = 0; strip < S::kKeyStrips; ++strip) {
        load_box(own.maps.queries, full, own.memory + strip * kStripBytes, query_place(tile, strip));
    }
}

// Blocks in the order in which they are needed: the keys of one ahead of the values of the one before.
template <typename S>
__device__ __forceinline__ void load_tiles(Loader<S>& own, const MlaPrefillParams& p) {
    cute::prefetch_tma_descriptor(&own.maps.queries);
    cute::prefetch_tma_descriptor(&own.maps.keys);
    cute::prefetch_tma_descriptor(&own.maps.values);
    Tile tile = find_tile(p, static_cast<int>(blockIdx.x));
    DSC_LOOP
    for (uint32_t round = 0;; round ^= 1) {
        if (tile.num_blocks > 0) load_keys(own, tile, tile.num_blocks - 1);
        load_queries(own, tile, round);
        if (tile.num_rows == 0) break;
        DSC_LOOP
        for (int block = tile.num_blocks - 1; block >= 0; --block) {
            if (block > 0) load_keys(own, tile, block - 1);
            load_values(own, tile, block);
        }
        tile = find_tile(p, next_index(p));
    }
    let_next_kernel_start();
}

// ---- the kernel ----

__device__ __forceinline__ void init_barriers(Shared& shared) {
    constexpr int kWarps = kConsumers / kWarpSize;
    for (int stage = 0; stage < kStages; ++stage) {
        FullBarrier::init(&shared.keys_full[stage], 1);
        FullBarrier::init(&shared.values_full[stage], 1);
        EmptyBarrier::init(&shared.keys_empty[stage], kWarps);
        EmptyBarrier::init(&shared.values_empty[stage], kWarps);
    }
    FullBarrier::init(&shared.queries_full, 1);
    EmptyBarrier::init(&shared.queries_empty, kWarps);
    cutlass::arch::fence_barrier_init();
}

template <typename S>
__global__ void __launch_bounds__(kThreads, 1)
    mla_prefill_sm90_kernel(const __grid_constant__ Maps maps, const __grid_constant__ MlaPrefillParams p,
                            const __grid_constant__ Options options) {
    extern __shared__ __align__(kRingAlignment) char memory[];
    __shared__ Shared shared;
    if (threadIdx.x == 0) init_barriers(shared);
    __syncthreads();
    wait_for_previous_kernel();
    if (threadIdx.x < kConsumers) {
        cutlass::arch::warpgroup_reg_alloc<kMultiplyRegisters>();
        Consumer<S> own{.p = p,
                        .options = options,
                        .shared = shared,
                        .memory = memory,
                        .warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup};
        attend_tiles(own);
    } else {
        cutlass::arch::warpgroup_reg_dealloc<kLoadRegisters>();
        if (threadIdx.x != kConsumers) return;
        Loader<S> own{.maps = maps, .options = options, .shared = shared, .memory = memory};
        load_tiles(own, p);
    }
}

}  // namespace dsc::prefill_sm90
