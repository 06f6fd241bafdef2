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
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "core/warp.h"
#include "gemm/tile_product_sm80.cuh"

namespace dsc {

constexpr int kLineBytes = 128;  // of the swizzle, and kTileK elements
constexpr int kCluster = kSm90Cluster;
constexpr int kWarpgroup = 128;   // threads
constexpr int kNumConsumers = 2;  // warpgroups
constexpr int kNumThreadsSm90 = (1 + kNumConsumers) * kWarpgroup;
static_assert(kNumThreadsSm90 == kSm90Threads);
constexpr int kRingAlignment = 1024;  // eight lines: the swizzle repeats

// A loop that the compiler leaves one.
#define DSC_LOOP _Pragma("unroll 1")

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

// What a block computes at a time.
template <typename T_, int kM_, int kN_, int kStages_, Major kMajorA_, Major kMajorB_>
struct WarpgroupTile {
    using T = T_;
    using Element = std::conditional_t<std::is_same_v<T, __half>, cutlass::half_t, cutlass::bfloat16_t>;
    static constexpr int kM = kM_, kN = kN_, kStages = kStages_;
    static constexpr Major kMajorA = kMajorA_, kMajorB = kMajorB_;
    static constexpr int kWarpgroupsM = kM >= 128 ? 2 : 1, kWarpgroupsN = kNumConsumers / kWarpgroupsM;
    static constexpr int kWarpgroupM = kM / kWarpgroupsM, kWarpgroupN = kN / kWarpgroupsN;
    static constexpr int kBytesA = kM * kLineBytes, kBytesB = kN * kLineBytes;
    static constexpr int kStageBytes = kBytesA + kBytesB, kRingBytes = kStages * kStageBytes;
    static constexpr int kBlocksN = kWarpgroupN / 8;  // of 8 columns, in a thread's sums
    static_assert(kWarpgroupM == 64 and kStages >= 2 and kTileK * sizeof(T) == kLineBytes);

    static constexpr auto kGmmaA = kMajorA == Major::kK ? cute::GMMA::Major::K : cute::GMMA::Major::MN;
    static constexpr auto kGmmaB = kMajorB == Major::kK ? cute::GMMA::Major::K : cute::GMMA::Major::MN;
    using Mma = decltype(cute::make_tiled_mma(
        cute::GMMA::ss_op_selector<Element, Element, float,
                                   cute::Shape<cute::_64, cute::Int<kWarpgroupN>, cute::Int<kTileK>>, kGmmaA,
                                   kGmmaB>(),
        cute::Layout<cute::Shape<cute::Int<kWarpgroupsM>, cute::Int<kWarpgroupsN>, cute::_1>>{}));

    template <Major kMajor, int kRows>
    static constexpr auto ring_layout() {
        using namespace cute;
        const auto shape = Shape<Int<kRows>, Int<kTileK>, Int<kStages>>{};
        if constexpr (kMajor == Major::kK) {
            return tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, shape, Step<_1, _2, _3>{});
        } else {
            return tile_to_shape(GMMA::Layout_MN_SW128_Atom<Element>{}, shape, Step<_2, _1, _3>{});
        }
    }
    using RingA = decltype(ring_layout<kMajorA, kM>());
    using RingB = decltype(ring_layout<kMajorB, kN>());
};

// A thread's sums: acc[4 * j + 2 * half + i] is row `half` and column i of the j-th block of eight columns.
template <typename S>
using WarpgroupSums = float[4 * S::kBlocksN];

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

// ---- operands ----

// How an operand lies in memory, and with it the dimensions of its tensor map, innermost first. Coordinates
// outside a map read as zeros.
enum class Form {
    kRows,         // x [M, K], a line per row: k, row
    kRowDepth,     // x [M, C] whose rows are the depth: column, row
    kWeights,      // w [E, N, K]: k, n, expert
    kWeightDepth,  // w [E, K, N]: n, k, expert
    kGateUp,       // w [E, 2, F, K], eight rows of gate and eight of up in turn: k, f % 8, gate or up, f / 8,
                   // expert
};

constexpr bool is_depth(Form form) {
    return form == Form::kRowDepth or form == Form::kWeightDepth;
}

constexpr int rank_of(Form form) {
    if (form == Form::kGateUp) return 5;
    return form == Form::kRows or form == Form::kRowDepth ? 2 : 3;
}

// Where a box begins, dimensions in the order of its map's.
struct BoxPlace {
    int at[5];
};

// kLines of 128 bytes in each stage, brought as boxes that follow each other in shared memory; half of the
// boxes are a block's part of what the cluster shares.
template <Form kForm_, int kLines>
struct OperandBoxes {
    static constexpr Form kForm = kForm_;
    static constexpr int kRank = rank_of(kForm);
    static constexpr int kBoxLines = is_depth(kForm) ? kTileK : kLines / kCluster;
    static constexpr int kNumBoxes = kLines / kBoxLines;
    static_assert(kNumBoxes % kCluster == 0 and kBoxLines * kLineBytes % kRingAlignment == 0);

    const CUtensorMap* map;
    int first;  // m, n or f
    int group;  // the expert, or its first row where rows are the depth
    uint64_t hint;

    __host__ __device__ BoxPlace box_place(int k_block, int box) const {
        const int k = k_block * kTileK, line = first + box * kBoxLines;
        if constexpr (kForm == Form::kRows) return {k, line};
        if constexpr (kForm == Form::kRowDepth) return {line, group + k};
        if constexpr (kForm == Form::kWeights) return {k, line, group};
        if constexpr (kForm == Form::kWeightDepth) return {line, k, group};
        return {k, 0, 0, first / 8 + box * (kBoxLines / 16), group};
    }

    // This block's copies of one k block. `is_shared`: half of the operand, to both blocks.
    __device__ __forceinline__ void load(char* target, uint64_t* full, int k_block, bool is_shared,
                                         int rank) const {
        if (is_shared) {
            DSC_UNROLL
            for (int i = 0; i < kNumBoxes / kCluster; ++i) {
                load_box<true>(target, full, k_block, rank * (kNumBoxes / kCluster) + i);
            }
        } else {
            DSC_UNROLL
            for (int box = 0; box < kNumBoxes; ++box) load_box<false>(target, full, k_block, box);
        }
    }

  private:
    template <bool kIsShared>
    __device__ __forceinline__ void load_box(char* target, uint64_t* full, int k_block, int box) const {
        const BoxPlace place = box_place(k_block, box);
        const auto& [c0, c1, c2, c3, c4] = place.at;
        char* const at = target + box * (kBoxLines * kLineBytes);
        const auto copy = [&](auto one, auto many, auto... coordinates) {
            if constexpr (kIsShared) {
                decltype(many)::copy(map, full, (1 << kCluster) - 1, hint, at, coordinates...);
            } else {
                decltype(one)::copy(map, full, hint, at, coordinates...);
            }
        };
        using namespace cute;
        if constexpr (kRank == 2) {
            copy(SM90_TMA_LOAD_2D{}, SM90_TMA_LOAD_MULTICAST_2D{}, c0, c1);
        } else if constexpr (kRank == 3) {
            copy(SM90_TMA_LOAD_3D{}, SM90_TMA_LOAD_MULTICAST_3D{}, c0, c1, c2);
        } else {
            copy(SM90_TMA_LOAD_5D{}, SM90_TMA_LOAD_MULTICAST_5D{}, c0, c1, c2, c3, c4);
        }
    }
};

// ---- the product ----

// One warpgroup's sums over num_k_blocks stages from `place` on. One k block is always in flight: a stage is
// released when the next one has been issued and the products on it are over.
//     prepare(stage, k_block): before the stage is read.
template <typename S, typename Prepare>
__device__ __forceinline__ void multiply_tile(WarpgroupSums<S>& sums, char* ring,
                                              RingBarriers<S::kStages>& barriers, RingPlace& place,
                                              int num_stages, int num_k_blocks, const Prepare& prepare) {
    using namespace cute;
    using Element = typename S::Element;
    typename S::Mma mma;
    const auto part = mma.get_slice(threadIdx.x - kWarpgroup);
    const auto ring_a = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(ring)), typename S::RingA{});
    const auto ring_b = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(ring + S::kStages * S::kBytesA)),
                                    typename S::RingB{});
    const auto a = part.make_fragment_A(part.partition_A(ring_a));  // (MMA, 1, k / 16, stage)
    const auto b = part.make_fragment_B(part.partition_B(ring_b));
    auto acc = partition_fragment_C(mma, Shape<Int<S::kM>, Int<S::kN>>{});
    static_assert(decltype(size(acc))::value == 4 * S::kBlocksN);
    if (num_k_blocks == 0) clear(acc);
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    int previous = 0;
    DSC_LOOP
    for (int k_block = 0; k_block < num_k_blocks; ++k_block) {
        FullBarrier::wait(&barriers.full[place.stage], place.phase);
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
