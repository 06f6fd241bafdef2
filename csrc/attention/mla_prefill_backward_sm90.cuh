// The gradients of prefill attention on sm_90a: copies by the copy engine (TMA), products by wgmma.
//
// A block of the grid takes a tile of 96 keys and values of one key head, which stay in shared memory, and
// walks over the queries that see it in blocks of 64, of all query heads that share it. Each of two
// warpgroups has 48 of the keys: scores Q K^T and dO V^T, P and dS out of them, and in registers over the
// whole walk dV^T += dO^T P and dK^T += Q^T dS. dQ = dS K needs the keys of both: they exchange dS through
// shared memory, multiply half of its columns each, and one thread lets the copy engine add them to float32
// sums.
//
// Keys are the columns of every product but the last, so that 96 of them suffice: wgmma takes rows by 64 and
// columns by 8. At 192/128 a thread has 72 sums of dK and 48 of dV, and besides 24 + 24 scores or 64 or 32 of
// dQ: 184 of the 216 that 240 registers have room for.
//
//   keys_full, values_full          the tile's are there
//   queries_full, grad_out_full     a block's are there
//   queries_empty                   all warps' products on both are over
//   weights_empty                   all warps' products on a block's P and dS are over
//   sums_full                       a block's dQ lies in shared memory
//   sums_empty                      and is on its way to the sums
//   kBlanked                        rows behind the sequence are zeros
//   kWeighed + warpgroup            a warpgroup's lines of P are there; at the end of dK and dV
//   kShared                         dS is there, of both
//   kOver                           nobody reads the tile's keys and values any more
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "attention/mla_prefill_backward_products_sm90.cuh"
#include "core/overlap.h"

namespace dsc::prefill_backward_sm90 {

struct Maps {
    CUtensorMap keys, values, queries, grad_out;
};

// ---- copies: one thread ----

// Strips of one operand, of kStripBytes each.
template <int kCount, int kStripBytes, typename Find>
__device__ __forceinline__ void load_strips(const CUtensorMap& map, uint64_t& full, char* target,
                                            const Find& place_of) {
    FullBarrier::arrive_and_expect_tx(&full, kCount * kStripBytes);
    DSC_UNROLL
    for (int strip = 0; strip < kCount; ++strip) {
        const BoxPlace place = place_of(strip);
        cute::SM90_TMA_LOAD_3D::copy(&map, &full, kNormalHint, target + strip * kStripBytes, place.at[0],
                                     place.at[1], place.at[2]);
    }
}

// Operands in the order in which they are needed.
template <typename S>
__device__ __forceinline__ void load_tile(const Maps& maps, const MlaPrefillBackwardParams& p,
                                          const Options& options, const Tile& tile, Shared& shared,
                                          char* memory) {
    Walk walk = walk_of(p, tile);
    if (not walk.has_block()) return;
    const auto from_keys = [&](int strip) { return key_place(tile, strip); };
    const auto from_queries = [&](int strip) { return query_place(tile, walk, strip); };
    load_strips<S::kStrips, kKeyStripBytes>(maps.keys, shared.keys_full, memory, from_keys);
    DSC_LOOP
    for (int n = 0; walk.has_block(); ++n, walk.advance()) {
        const Place place(n, options.num_stages);
        wait_for<EmptyBarrier>(shared.queries_empty[place.stage], place.phase ^ 1);
        load_strips<S::kStrips, kQueryStripBytes>(maps.queries, shared.queries_full[place.stage],
                                                  memory + S::kFirstQuery + place.stage * S::kQueryBytes,
                                                  from_queries);
        if (n == 0) {
            load_strips<kValueStrips, kKeyStripBytes>(maps.values, shared.values_full,
                                                      memory + S::kFirstValue, from_keys);
        }
        load_strips<kValueStrips, kQueryStripBytes>(
            maps.grad_out, shared.grad_out_full[place.stage],
            memory + S::kFirstGradOut + place.stage * S::kGradOutBytes, from_queries);
    }
    let_next_kernel_start();
}

// Sums of dQ, block by block.
template <typename S>
__device__ __forceinline__ void add_tile(const MlaPrefillBackwardParams& p, const Tile& tile, Shared& shared,
                                         const char* memory) {
    Walk walk = walk_of(p, tile);
    DSC_LOOP
    for (int n = 0; walk.has_block(); ++n, walk.advance()) {
        wait_for<EmptyBarrier>(shared.sums_full, n % 2);
        start_adding_sums<S::kWidth>(p, tile, walk, memory + S::kFirstSum);
        finish_adding<false>();
        EmptyBarrier::arrive(&shared.sums_empty);
    }
    finish_adding<true>();
}

// ---- the kernel ----

__device__ __forceinline__ void init_barriers(Shared& shared) {
    constexpr int kWarps = kConsumers / kWarpSize;
    FullBarrier::init(&shared.keys_full, 1);
    FullBarrier::init(&shared.values_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
        FullBarrier::init(&shared.queries_full[stage], 1);
        FullBarrier::init(&shared.grad_out_full[stage], 1);
        EmptyBarrier::init(&shared.queries_empty[stage], kWarps);
    }
    EmptyBarrier::init(&shared.weights_empty, kWarps);
    EmptyBarrier::init(&shared.sums_full, kWarps);
    EmptyBarrier::init(&shared.sums_empty, 1);
    cutlass::arch::fence_barrier_init();
}

template <typename S>
__global__ void __launch_bounds__(kThreads, 1)
    mla_prefill_backward_sm90_kernel(const __grid_constant__ Maps maps,
                                     const __grid_constant__ MlaPrefillBackwardParams p,
                                     const __grid_constant__ Options options) {
    extern __shared__ __align__(kRingAlignment) char memory[];
    __shared__ Shared shared;
    if (threadIdx.x == 0) init_barriers(shared);
    __syncthreads();
    wait_for_previous_kernel();
    const Tile tile = find_tile(p, static_cast<int>(blockIdx.x));
    if (not tile.is_there) return;
    if (threadIdx.x < kConsumers) {
        cutlass::arch::warpgroup_reg_alloc<kMultiplyRegisters>();
        Consumer<S> own{.p = p,
                        .options = options,
                        .shared = shared,
                        .memory = memory,
                        .warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup,
                        .tile = tile};
        take_tile(own);
    } else {
        cutlass::arch::warpgroup_reg_dealloc<kLoadRegisters>();
        if (threadIdx.x == kConsumers) load_tile<S>(maps, p, options, tile, shared, memory);
        if (threadIdx.x == kConsumers + kWarpSize) add_tile<S>(p, tile, shared, memory);
    }
}

}  // namespace dsc::prefill_backward_sm90
