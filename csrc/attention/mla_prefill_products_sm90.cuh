// The products of prefill attention on sm_90a, and how a warpgroup goes through the blocks of a tile
// (mla_prefill_sm90.cuh says which barrier means what).
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/numeric_types.h>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "attention/mla_prefill_blocks_sm90.cuh"
#include "core/barriers_sm90.cuh"

namespace dsc::prefill_sm90 {

// Named barriers; kTurn has one for each of the warpgroups.
constexpr int kBlanked = kNumCutlassBarriers, kTurn = kBlanked + 1;

struct Shared {
    uint64_t keys_full[kStages], keys_empty[kStages], values_full[kStages], values_empty[kStages];
    uint64_t queries_full, queries_empty;
    Tile tiles[2];  // of rounds in turn
};
static_assert(sizeof(Shared) <= kStaticBytes);

template <typename Barrier>
__device__ __forceinline__ void wait_for(const uint64_t& barrier, uint32_t parity) {
    wait_for_phase<Barrier, kMlaPrefillSm90IsProven>(&barrier, parity);
}

// One lane of each warp.
__device__ __forceinline__ void release(uint64_t& empty) {
    if (threadIdx.x % kWarpSize == 0) EmptyBarrier::arrive(&empty);
}

// Where in a ring a role stands. `phase` is the parity of the round.
struct Place {
    int stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void advance(int num_stages) {
        if (++stage < num_stages) return;
        stage = 0;
        phase ^= 1;
    }
};

// The instructions, and the layouts of strips from which their descriptors are made. Both warpgroups share a
// tile by its rows.
template <typename S>
struct Mma {
    using T = typename S::T;
    using Element = std::conditional_t<std::is_same_v<T, __half>, cutlass::half_t, cutlass::bfloat16_t>;
    static constexpr auto kK = cute::GMMA::Major::K, kMN = cute::GMMA::Major::MN;
    using Warpgroups = cute::Layout<cute::Shape<cute::Int<kWarpgroups>, cute::_1, cute::_1>>;
    using ForScores = decltype(cute::make_tiled_mma(
        cute::GMMA::ss_op_selector<Element, Element, float,
                                   cute::Shape<cute::_64, cute::Int<kKeys>, cute::_64>, kK, kK>(),
        Warpgroups{}));
    using ForValues = decltype(cute::make_tiled_mma(
        cute::GMMA::rs_op_selector<Element, Element, float,
                                   cute::Shape<cute::_64, cute::Int<kValueWidth>, cute::_64>, kK, kMN>(),
        Warpgroups{}));

    // Strips of queries or keys by their rows, one behind the other; of values by columns; stages behind.
    template <int kCount>
    using Strips =
        decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{},
                                     cute::Shape<cute::Int<kRows>, cute::Int<S::kWidth>, cute::Int<kCount>>{},
                                     cute::Step<cute::_1, cute::_2, cute::_3>{}));
    using ValueStrips = decltype(cute::tile_to_shape(
        cute::GMMA::Layout_MN_SW128_Atom<Element>{},
        cute::Shape<cute::Int<kValueWidth>, cute::Int<kKeys>, cute::Int<kStages>>{},
        cute::Step<cute::_2, cute::_1, cute::_3>{}));

    template <typename Layout>
    static __host__ __device__ __forceinline__ auto tensor(const char* at, Layout layout) {
        return cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Element*>(const_cast<char*>(at))),
                                 layout);
    }
};

// What a thread that multiplies has in registers over a tile, and where its part of shared memory is.
template <typename S>
struct Consumer {
    const MlaPrefillParams& p;
    const Options& options;
    Shared& shared;
    char* memory;
    int warpgroup;
    Place keys = {}, values = {};
    Values sums;
    RowStates rows;
    View view;
};

// The sums, and the weights, as wgmma takes them.
template <typename S>
__device__ __forceinline__ auto sums_of(Consumer<S>& own) {
    using namespace cute;
    using SumShape = cute::Shape<Int<kRows>, Int<kValueWidth>>;
    return make_tensor(make_rmem_ptr(own.sums),
                       partition_fragment_C(typename Mma<S>::ForValues{}, SumShape{}).layout());
}

template <typename S>
__device__ __forceinline__ auto weights_of(Weights& weights) {
    using namespace cute;
    return make_tensor(make_rmem_ptr(reinterpret_cast<typename Mma<S>::Element*>(weights)),
                       Layout<cute::Shape<cute::Shape<_2, _2, _2>, _1, Int<kKeys / 16>>>{});
}

// Until all but the last kBehind batches of products are over.
template <int kBehind, typename Acc>
__device__ __forceinline__ void finish(Acc&& acc) {
    cute::warpgroup_wait<kBehind>();
    cute::warpgroup_fence_operand(acc);
}

// ---- turns ----

// The warpgroups issue what they have in turn, so that one's softmax lies under the other's products.
template <typename S>
__device__ __forceinline__ void take_turn(const Consumer<S>& own) {
    if (own.options.takes_turns) meet(kTurn + own.warpgroup, kConsumers);
}

template <typename S>
__device__ __forceinline__ void give_turn(const Consumer<S>& own) {
    if (own.options.takes_turns) tell(kTurn + (own.warpgroup ^ 1), kConsumers);
}

// ---- products ----

template <typename S>
__device__ __forceinline__ void wait_for_keys(const Consumer<S>& own) {
    wait_for<FullBarrier>(own.shared.keys_full[own.keys.stage], own.keys.phase);
}

// acc = queries * the next block of keys: left in flight.
template <typename S, typename Acc>
__device__ __forceinline__ void issue_scores(const Consumer<S>& own, Acc& acc) {
    using namespace cute;
    typename Mma<S>::ForScores mma;
    const auto part = mma.get_slice(threadIdx.x);
    const auto queries = Mma<S>::tensor(own.memory, typename Mma<S>::template Strips<1>{});
    const auto keys = Mma<S>::tensor(own.memory + S::kFirstKey, typename Mma<S>::template Strips<kStages>{});
    const auto a = part.make_fragment_A(part.partition_A(queries));
    const auto b = part.make_fragment_B(part.partition_B(keys));
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    warpgroup_fence_operand(acc);
    warpgroup_arrive();
    CUTE_UNROLL
    for (int k = 0; k < size<2>(a); ++k) {
        gemm(mma, a(_, _, k, _0{}), b(_, _, k, own.keys.stage), acc);
        mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
}

// sums += weights * the values of their block: left in flight.
template <typename S>
__device__ __forceinline__ void issue_values(Consumer<S>& own, Weights& weights) {
    using namespace cute;
    typename Mma<S>::ForValues mma;
    const auto part = mma.get_slice(threadIdx.x);
    const auto values = Mma<S>::tensor(own.memory + S::kFirstValue, typename Mma<S>::ValueStrips{});
    const auto b = part.make_fragment_B(part.partition_B(values));
    auto a = weights_of<S>(weights);
    auto acc = sums_of(own);
    wait_for<FullBarrier>(own.shared.values_full[own.values.stage], own.values.phase);
    mma.accumulate_ = GMMA::ScaleOut::One;
    warpgroup_fence_operand(a);
    warpgroup_fence_operand(acc);
    warpgroup_arrive();
    CUTE_UNROLL
    for (int k = 0; k < size<2>(b); ++k) gemm(mma, a(_, _, k), b(_, _, k, own.values.stage), acc);
    warpgroup_commit_batch();
}

template <typename S>
__device__ __forceinline__ void release_keys(Consumer<S>& own) {
    release(own.shared.keys_empty[own.keys.stage]);
    own.keys.advance(own.options.num_stages);
}

template <typename S>
__device__ __forceinline__ void release_values(Consumer<S>& own) {
    release(own.shared.values_empty[own.values.stage]);
    own.values.advance(own.options.num_stages);
}

// Rows behind the sequence may hold anything, and 0 * NaN is NaN: zeros into half of the columns, the other
// warpgroup writes the other half, ordered before the tensor cores' reads, once all warps have come.
template <typename S>
__device__ __forceinline__ void blank_values(const Consumer<S>& own, int num_rows) {
    if (num_rows >= kKeys) return;
    wait_for<FullBarrier>(own.shared.values_full[own.values.stage], own.values.phase);
    keep_order();
    char* const block = own.memory + S::kFirstValue + own.values.stage * S::kValueBytes;
    blank_lines<1, kKeys>(block + own.warpgroup * kStripBytes, num_rows);
    order_before_async_reads();
    meet(kBlanked, kConsumers);
}

// ---- a tile ----

// Scores into weights, in place; `scale` and the result as move_references has them.
template <typename S, typename Acc>
__device__ __forceinline__ bool weigh(Consumer<S>& own, Acc& acc, float (&scale)[2], int block) {
    const float factor = own.p.scale * kLog2E;
    Scores& scores = reinterpret_cast<Scores&>(*acc.data());
    hide_scores(scores, own.view, block);
    const bool moves = move_references(scores, factor, own.rows, scale);
    weigh_scores(scores, factor, own.rows);
    cute::warpgroup_fence_operand(acc);
    return moves;
}

// The tile's blocks of keys from the last one, where the mask is, to the first. The scores of a block are
// issued ahead of the product on the weights of the one before, and weighed while that is under way.
template <typename S>
__device__ __forceinline__ void attend(Consumer<S>& own, const Tile& tile) {
    using namespace cute;
    using T = typename S::T;
    using AccShape = cute::Shape<Int<kRows>, Int<kKeys>>;
    Weights weights;
    float scale[2] = {1, 1};
    int block = tile.num_blocks - 1;
    {
        auto acc = partition_fragment_C(typename Mma<S>::ForScores{}, AccShape{});
        wait_for_keys(own);
        take_turn(own);
        issue_scores(own, acc);
        give_turn(own);
        finish<0>(acc);
        release_keys(own);
        if (block == 0) release(own.shared.queries_empty);
        weigh(own, acc, scale, block);
        round_weights<T>(weights, reinterpret_cast<Scores&>(*acc.data()));
    }
    blank_values(own, num_values_of_last(tile));
    if (block > 0) wait_for_keys(own);
    DSC_LOOP
    while (--block >= 0) {
        auto acc = partition_fragment_C(typename Mma<S>::ForScores{}, AccShape{});
        take_turn(own);
        issue_scores(own, acc);
        issue_values(own, weights);
        give_turn(own);
        finish<1>(acc);
        release_keys(own);
        if (block == 0) release(own.shared.queries_empty);
        const bool moves = weigh(own, acc, scale, block);
        // The next block's keys, here: ptxas takes a wait for products ahead of any arithmetic, but not of a
        // branch, and the exponentials belong under the product.
        if (block > 0) wait_for_keys(own);
        finish<0>(sums_of(own));
        release_values(own);
        round_weights<T>(weights, reinterpret_cast<Scores&>(*acc.data()));
        if (moves) rescale(own.sums, scale);
    }
    take_turn(own);
    issue_values(own, weights);
    give_turn(own);
    finish<0>(sums_of(own));
    release_values(own);
}

// All tiles that the loader finds.
template <typename S>
__device__ __forceinline__ void attend_tiles(Consumer<S>& own) {
    if (own.warpgroup == 1) give_turn(own);  // the first turn is warpgroup 0's
    DSC_LOOP
    for (uint32_t round = 0;; round ^= 1) {
        wait_for<FullBarrier>(own.shared.queries_full, round);
        keep_order();
        const Tile& tile = own.shared.tiles[round];
        if (tile.num_rows == 0) break;
        own.rows = {};
        cute::clear(sums_of(own));
        if (tile.num_blocks > 0) {
            own.view = view_of(tile, own.p.causal);
            attend(own, tile);
        } else {
            release(own.shared.queries_empty);
        }
        store_rows<typename S::T>(own.p, tile, own.rows, own.sums);
    }
    if (own.warpgroup == 0) take_turn(own);  // that nobody needs any more
}

}  // namespace dsc::prefill_sm90
