// One tile of a matrix product on the tensor cores of sm_90a: acc[m, n] = sum_k a[m, k] b[n, k] in float32.
//
// A block is a warpgroup that loads and two that multiply, over a ring of kStages shared-memory stages, each
// with two barriers: `full`, completed by the bytes of a stage as the copy engine (TMA) writes them, and
// `empty`, completed by the warps that have read it. A cluster of two blocks works on neighbouring tiles, and
// what both need is brought from L2 once, half by each block, into the shared memory of both. So a stage may
// be written again only when the warps of both blocks have read it: `empty` counts all of them.
//
// Both warpgroups share a tile by its rows, or by its columns where it has but 64 rows. Operands lie in
// shared memory in lines of 128 bytes, swizzled by the copy engine as wgmma reads them: with k contiguous
// (Major::kK, a line per m or n), or with m or n contiguous (Major::kMN, blocks of 64 m or n with a line per
// k).
#pragma once

#include <cuda.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "core/barriers_sm90.cuh"
#include "gemm/warpgroup_tile_sm90.cuh"

namespace dsc {

static_assert(kNormalHint == static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL) and
              kOnceHint == static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST) and
              kAgainHint == static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST));

// The instruction and the layouts of both rings, from which its descriptors are made.
template <typename S>
struct WarpgroupMma {
    using Element =
        std::conditional_t<std::is_same_v<typename S::T, __half>, cutlass::half_t, cutlass::bfloat16_t>;

    static constexpr auto kGmmaA = S::kMajorA == Major::kK ? cute::GMMA::Major::K : cute::GMMA::Major::MN;
    static constexpr auto kGmmaB = S::kMajorB == Major::kK ? cute::GMMA::Major::K : cute::GMMA::Major::MN;
    using Mma = decltype(cute::make_tiled_mma(
        cute::GMMA::ss_op_selector<Element, Element, float,
                                   cute::Shape<cute::_64, cute::Int<S::kWarpgroupN>, cute::Int<kTileK>>,
                                   kGmmaA, kGmmaB>(),
        cute::Layout<cute::Shape<cute::Int<S::kWarpgroupsM>, cute::Int<S::kWarpgroupsN>, cute::_1>>{}));

    template <Major kMajor, int kRows>
    static constexpr auto ring_layout() {
        using namespace cute;
        const auto shape = Shape<Int<kRows>, Int<kTileK>, Int<S::kStages>>{};
        if constexpr (kMajor == Major::kK) {
            return tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, shape, Step<_1, _2, _3>{});
        } else {
            return tile_to_shape(GMMA::Layout_MN_SW128_Atom<Element>{}, shape, Step<_2, _1, _3>{});
        }
    }
    using RingA = decltype(ring_layout<S::kMajorA, S::kM>());
    using RingB = decltype(ring_layout<S::kMajorB, S::kN>());
};

// ---- the ring ----

// In shared memory, in front of the ring itself.
template <int kStages>
struct RingBarriers {
    uint64_t full[kStages], empty[kStages];
};

// One thread of each block; the cluster meets before the barriers are used.
template <int kStages>
__device__ __forceinline__ void init_barriers(RingBarriers<kStages>& barriers) {
    DSC_UNROLL
    for (int stage = 0; stage < kStages; ++stage) {
        FullBarrier::init(&barriers.full[stage], 1);
        EmptyBarrier::init(&barriers.empty[stage], kCluster * kNumConsumers * kWarpgroup / kWarpSize);
    }
    cutlass::arch::fence_barrier_init();
}

// Where in the ring a role stands. `phase` is the parity of the round.
struct RingPlace {
    int stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void advance(int num_stages) {
        if (++stage < num_stages) return;
        stage = 0;
        phase ^= 1;
    }
};

// One lane for each block of the cluster: the stage may be written again as far as this warp goes.
__device__ __forceinline__ void release_stage(uint64_t* empty) {
    const int lane = threadIdx.x % kWarpSize;
    if (lane < kCluster) EmptyBarrier::arrive(empty, lane, true);
}

// ---- copies ----

// One box, to this block or, with kIsShared, to both.
template <bool kIsShared, typename Boxes>
__device__ __forceinline__ void load_box(const Boxes& boxes, char* target, uint64_t* full, int k_block,
                                         int box) {
    const BoxPlace place = boxes.box_place(k_block, box);
    const auto& [c0, c1, c2, c3, c4] = place.at;
    char* const at = target + box * (Boxes::kBoxLines * kLineBytes);
    const auto copy = [&](auto one, auto many, auto... coordinates) {
        if constexpr (kIsShared) {
            decltype(many)::copy(boxes.map, full, (1 << kCluster) - 1, boxes.hint, at, coordinates...);
        } else {
            decltype(one)::copy(boxes.map, full, boxes.hint, at, coordinates...);
        }
    };
    using namespace cute;
    if constexpr (Boxes::kRank == 2) {
        copy(SM90_TMA_LOAD_2D{}, SM90_TMA_LOAD_MULTICAST_2D{}, c0, c1);
    } else if constexpr (Boxes::kRank == 3) {
        copy(SM90_TMA_LOAD_3D{}, SM90_TMA_LOAD_MULTICAST_3D{}, c0, c1, c2);
    } else {
        copy(SM90_TMA_LOAD_5D{}, SM90_TMA_LOAD_MULTICAST_5D{}, c0, c1, c2, c3, c4);
    }
}

// This block's copies of one k block. `is_shared`: half of the operand, to both blocks.
template <typename Boxes>
__device__ __forceinline__ void load_operand(const Boxes& boxes, char* target, uint64_t* full, int k_block,
                                             bool is_shared, int rank) {
    constexpr int kHalf = Boxes::kNumBoxes / kCluster;
    if (is_shared) {
        DSC_UNROLL
        for (int i = 0; i < kHalf; ++i) load_box<true>(boxes, target, full, k_block, rank * kHalf + i);
    } else {
        DSC_UNROLL
        for (int box = 0; box < Boxes::kNumBoxes; ++box) load_box<false>(boxes, target, full, k_block, box);
    }
}

// ---- the product ----

// One warpgroup's sums over num_k_blocks stages from `place` on. One k block is always in flight: a stage is
// released when the next one has been issued and the products on it are over.
//     prepare(stage, k_block): before the stage is read.
template <typename S, typename Prepare>
__device__ __forceinline__ void multiply_tile(WarpgroupSums<S>& sums, char* ring,
                                              RingBarriers<S::kStages>& barriers, RingPlace& place,
                                              int num_stages, int num_k_blocks, const Prepare& prepare) {
    using namespace cute;
    using Wgmma = WarpgroupMma<S>;
    using Element = typename Wgmma::Element;
    typename Wgmma::Mma mma;
    const auto part = mma.get_slice(threadIdx.x - kWarpgroup);
    const auto ring_a = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(ring)), typename Wgmma::RingA{});
    const auto ring_b = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(ring + S::kStages * S::kBytesA)),
                                    typename Wgmma::RingB{});
    const auto a = part.make_fragment_A(part.partition_A(ring_a));  // (MMA, 1, k / 16, stage)
    const auto b = part.make_fragment_B(part.partition_B(ring_b));
    auto acc = partition_fragment_C(mma, Shape<Int<S::kM>, Int<S::kN>>{});
    static_assert(decltype(size(acc))::value == 4 * S::kBlocksN);
    if (num_k_blocks == 0) clear(acc);
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    int previous = 0;
    DSC_LOOP
    for (int k_block = 0; k_block < num_k_blocks; ++k_block) {
        wait_for_phase<FullBarrier, kSm90IsProven>(&barriers.full[place.stage], place.phase);
        prepare(place.stage, k_block);
        warpgroup_fence_operand(acc);
        warpgroup_arrive();
        CUTE_UNROLL
        for (int k = 0; k < size<2>(a); ++k) {
            gemm(mma, a(_, _, k, place.stage), b(_, _, k, place.stage), acc);
            mma.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
        warpgroup_wait<1>();
        warpgroup_fence_operand(acc);
        if (k_block > 0) release_stage(&barriers.empty[previous]);
        previous = place.stage;
        place.advance(num_stages);
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc);
    if (num_k_blocks > 0) release_stage(&barriers.empty[previous]);
    CUTE_UNROLL
    for (int i = 0; i < 4 * S::kBlocksN; ++i) sums[i] = acc(i);
}

}  // namespace dsc
