// The grouped products on sm_90a: persistent clusters of two blocks, one warpgroup that loads (TMA), two that
// multiply (wgmma), stores from registers.
//
// Every product is the same kernel over a Job (grouped_jobs_sm90.cuh), which says where a tile's operands
// lie, which tiles there are, and what becomes of the sums. Experts are contiguous in the rows of x, so one
// tensor map over all rows and one over all experts' weights serve every tile.
//
// Bring-up on a GPU, one step at a time, by ProductOptions: two stages, no multicast, no skew; then all
// stages; then multicast; then skew (docs/grouped_gemm_sm90.md).
#pragma once

#include "core/overlap.h"
#include "gemm/grouped_jobs_sm90.cuh"
#include "gemm/tile_product_sm90.cuh"

namespace dsc {

struct ProductOptions {
    int num_stages;   // 2 to kStages
    bool multicasts;  // else each block loads both of its operands itself
    int skew_blocks;  // k blocks that the first warpgroup is ahead of the second; 0: none
};

// ---- roles ----

template <typename S, typename Job>
__device__ __forceinline__ void load_tiles(const TensorMaps& maps, const Job& job, const GroupTable& table,
                                           RingBarriers<S::kStages>& barriers, char* ring,
                                           const ProductOptions& options) {
    const int rank = static_cast<int>(cute::block_rank_in_cluster());
    const int num_pairs = job.num_tile_pairs(table);
    RingPlace place;
    for (int idx = blockIdx.x / kCluster; idx < num_pairs; idx += gridDim.x / kCluster) {
        const ProductTile tile = job.tile_at(table, idx, rank);
        const auto a = job.a_of(maps, tile);
        const auto b = job.b_of(maps, tile);
        const bool shares_a = options.multicasts and tile.shares_rows != Job::kSwaps;
        const bool shares_b = options.multicasts and tile.shares_rows == Job::kSwaps;
        DSC_LOOP
        for (int k_block = 0; k_block < tile.num_k_blocks; ++k_block) {
            uint64_t* const full = &barriers.full[place.stage];
            wait_for_phase<EmptyBarrier, kSm90IsProven>(&barriers.empty[place.stage], place.phase ^ 1);
            FullBarrier::arrive_and_expect_tx(full, S::kStageBytes);
            load_operand(a, ring + place.stage * S::kBytesA, full, k_block, shares_a, rank);
            load_operand(b, ring + S::kStages * S::kBytesA + place.stage * S::kBytesB, full, k_block,
                         shares_b, rank);
            place.advance(options.num_stages);
        }
    }
    let_next_kernel_start();
}

template <typename S, typename Job>
__device__ __forceinline__ void multiply_tiles(const Job& job, const GroupTable& table,
                                               RingBarriers<S::kStages>& barriers, char* ring,
                                               const ProductOptions& options) {
    using cutlass::arch::NamedBarrier;
    static_assert(NamedBarrier::ReservedNamedBarrierCount == kNumCutlassBarriers);
    constexpr int kBoth = kNumConsumers * kWarpgroup;
    const int rank = static_cast<int>(cute::block_rank_in_cluster());
    const int num_pairs = job.num_tile_pairs(table);
    const bool is_second = threadIdx.x >= kWarpgroup + kBoth / 2;
    bool is_skewing = options.skew_blocks > 0;
    RingPlace place;
    for (int idx = blockIdx.x / kCluster; idx < num_pairs; idx += gridDim.x / kCluster) {
        const ProductTile tile = job.tile_at(table, idx, rank);
        if (is_skewing and is_second) {
            NamedBarrier::sync(kBoth, kSkewBarrier);
            is_skewing = false;
        }
        WarpgroupSums<S> sums;
        multiply_tile<S>(sums, ring, barriers, place, options.num_stages, tile.num_k_blocks,
                         [&](int stage, int k_block) {
                             if (is_skewing and k_block == options.skew_blocks) {
                                 NamedBarrier::arrive(kBoth, kSkewBarrier);
                                 is_skewing = false;
                             }
                             job.prepare(ring, tile, stage, k_block);
                         });
        if (is_skewing) {  // a tile of few k blocks
            NamedBarrier::arrive(kBoth, kSkewBarrier);
            is_skewing = false;
        }
        job.store(sums, tile);
    }
}

template <typename S, typename Job>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kNumThreadsSm90, 1)
    grouped_product_kernel(const __grid_constant__ TensorMaps maps, const __grid_constant__ Job job,
                           const __grid_constant__ ProductOptions options) {
    extern __shared__ __align__(kRingAlignment) char ring[];
    __shared__ RingBarriers<S::kStages> barriers;
    __shared__ GroupTable table;
    static_assert(sizeof(barriers) + sizeof(table) <= kSm90StaticBytes);
    if (threadIdx.x == 0) init_barriers(barriers);
    wait_for_previous_kernel();
    job.fill(table);
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();  // both blocks' barriers are there
    if (threadIdx.x < kWarpgroup) {
        cutlass::arch::warpgroup_reg_dealloc<kSm90LoadRegisters>();
        if (threadIdx.x == 0) load_tiles<S>(maps, job, table, barriers, ring, options);
    } else {
        cutlass::arch::warpgroup_reg_alloc<kSm90MultiplyRegisters>();
        multiply_tiles<S>(job, table, barriers, ring, options);
    }
    // Neither block leaves while the other may still arrive on its barriers.
    __syncwarp();
    cute::cluster_sync();
}

}  // namespace dsc
