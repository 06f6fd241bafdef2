// The products of the gradients of prefill attention on sm_90a, and how a warpgroup goes through the blocks
// of queries of a tile (mla_prefill_backward_sm90.cuh says which barrier means what).
#pragma once

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // CuTe's wgmma with 48 columns
#include <cutlass/arch/barrier.h>
#include <cutlass/numeric_types.h>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "attention/mla_prefill_backward_blocks_sm90.cuh"
#include "attention/mla_prefill_backward_sm90.h"
#include "core/barriers_sm90.cuh"

namespace dsc::prefill_backward_sm90 {

// Named barriers; kWeighed has one for each of the warpgroups.
constexpr int kBlanked = kNumCutlassBarriers, kShared = kBlanked + 1, kOver = kShared + 1,
              kWeighed = kOver + 1;

struct Shared {
    uint64_t keys_full, values_full;
    uint64_t queries_full[kStages], grad_out_full[kStages], queries_empty[kStages];
    uint64_t weights_empty, sums_full, sums_empty;
};
static_assert(sizeof(Shared) <= kStaticBytes);

template <typename Barrier>
__device__ __forceinline__ void wait_for(const uint64_t& barrier, uint32_t parity) {
    wait_for_phase<Barrier, kMlaPrefillBackwardSm90IsProven>(&barrier, parity);
}

// One lane of each warp.
__device__ __forceinline__ void release(uint64_t& empty) {
    if (threadIdx.x % kWarpSize == 0) EmptyBarrier::arrive(&empty);
}

// Where the n-th block of a tile lies, and which round of its stage it is.
struct Place {
    int stage;
    uint32_t phase;

    __device__ __forceinline__ Place(int n, int num_stages)
        : stage(n % num_stages), phase(n / num_stages % 2) {}
};

// The instructions, and the layouts of strips from which their descriptors are made. The warpgroups share the
// keys of the products with scores and for dK and dV; each has all keys of its strips of dQ.
template <typename S>
struct Mma {
    using T = typename S::T;
    using Element = std::conditional_t<std::is_same_v<T, __half>, cutlass::half_t, cutlass::bfloat16_t>;
    static constexpr auto kK = cute::GMMA::Major::K, kMN = cute::GMMA::Major::MN;
    using OwnKeys = cute::Shape<cute::_64, cute::Int<kOwnKeys>, cute::_64>;
    using Warpgroups = cute::Layout<cute::Shape<cute::_1, cute::Int<kWarpgroups>, cute::_1>>;
    // Queries by keys, along the columns of both; and columns by keys, along the queries.
    using ForScores = decltype(cute::make_tiled_mma(
        cute::GMMA::ss_op_selector<Element, Element, float, OwnKeys, kK, kK>(), Warpgroups{}));
    using ForKeys = decltype(cute::make_tiled_mma(
        cute::GMMA::ss_op_selector<Element, Element, float, OwnKeys, kMN, kK>(), Warpgroups{}));
    // Queries by columns of so many strips, along the keys.
    template <int kCount>
    using ForQueries = decltype(cute::make_tiled_mma(
        cute::GMMA::ss_op_selector<Element, Element, float,
                                   cute::Shape<cute::_64, cute::Int<64 * kCount>, cute::_64>, kMN, kMN>()));

    // Rows by columns, one strip behind the other, and stages behind; and the same bytes as columns by rows.
    template <int kRows, int kColumns, int kCount>
    using Strips =
        decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{},
                                     cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::Int<kCount>>{},
                                     cute::Step<cute::_1, cute::_2, cute::_3>{}));
    template <int kRows, int kColumns, int kCount>
    using Turned =
        decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<Element>{},
                                     cute::Shape<cute::Int<kColumns>, cute::Int<kRows>, cute::Int<kCount>>{},
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
    const MlaPrefillBackwardParams& p;
    const Options& options;
    Shared& shared;
    char* memory;
    int warpgroup;
    Sums grad_k[S::kStrips], grad_v[kValueStrips];  // 64 columns each
    Tile tile;
};

// The sums of columns by the warpgroup's keys, as wgmma takes them.
template <typename S, int kCount>
__device__ __forceinline__ auto sums_of(Sums (&sums)[kCount]) {
    using namespace cute;
    using SumShape = cute::Shape<Int<kLineElements * kCount>, Int<kKeys>>;
    return make_tensor(make_rmem_ptr(&sums[0][0]),
                       partition_fragment_C(typename Mma<S>::ForKeys{}, SumShape{}).layout());
}

// Until all but the last kBehind batches of products are over.
template <int kBehind, typename Acc>
__device__ __forceinline__ void finish(Acc&& acc) {
    cute::warpgroup_wait<kBehind>();
    cute::warpgroup_fence_operand(acc);
}

// ---- products ----

// acc = a * b, or with kAdds acc += a * b, of tensors in shared memory: left in flight.
template <bool kAdds, typename TiledMma, typename A, typename B, typename Acc>
__device__ __forceinline__ void issue(TiledMma mma, int thread, const A& a_rows, const B& b_rows, Acc& acc) {
    using namespace cute;
    const auto part = mma.get_slice(thread);
    const auto a = part.make_fragment_A(part.partition_A(a_rows));
    const auto b = part.make_fragment_B(part.partition_B(b_rows));
    mma.accumulate_ = kAdds ? GMMA::ScaleOut::One : GMMA::ScaleOut::Zero;
    warpgroup_fence_operand(acc);
    warpgroup_arrive();
    CUTE_UNROLL
    for (int k = 0; k < size<2>(a); ++k) {
        gemm(mma, a(_, _, k), b(_, _, k), acc);
        mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
}

// acc = rows of queries, of a stage, times the warpgroup's rows of keys.
template <typename S, int kColumns, typename Acc>
__device__ __forceinline__ void issue_scores(const Consumer<S>& own, Acc& acc, int first_query, int first_key,
                                             int stage) {
    using M = Mma<S>;
    const auto queries =
        M::tensor(own.memory + first_query, typename M::template Strips<kQueries, kColumns, kStages>{});
    const auto keys = M::tensor(own.memory + first_key, typename M::template Strips<kKeys, kColumns, 1>{});
    issue<false>(typename M::ForScores{}, threadIdx.x, queries(cute::_, cute::_, stage),
                 keys(cute::_, cute::_, 0), acc);
}

// sums += columns of a stage's queries times the warpgroup's lines of P or dS.
template <typename S, int kCount>
__device__ __forceinline__ void issue_keys(Consumer<S>& own, Sums (&sums)[kCount], int first_query,
                                           int first_weight, int stage) {
    using M = Mma<S>;
    constexpr int kColumns = kLineElements * kCount;
    const auto columns =
        M::tensor(own.memory + first_query, typename M::template Turned<kQueries, kColumns, kStages>{});
    const auto weights =
        M::tensor(own.memory + first_weight, typename M::template Strips<kKeys, kQueries, 1>{});
    auto acc = sums_of<S>(sums);
    issue<true>(typename M::ForKeys{}, threadIdx.x, columns(cute::_, cute::_, stage),
                weights(cute::_, cute::_, 0), acc);
}

// acc = dS times kCount strips of the keys.
template <int kCount, typename S, typename Acc>
__device__ __forceinline__ void issue_queries(const Consumer<S>& own, Acc& acc, int first_strip) {
    using M = Mma<S>;
    const auto grads =
        M::tensor(own.memory + S::kFirstGradScore, typename M::template Turned<kKeys, kQueries, 1>{});
    const auto keys = M::tensor(own.memory + first_strip * kKeyStripBytes,
                                typename M::template Turned<kKeys, kLineElements * kCount, 1>{});
    issue<false>(typename M::template ForQueries<kCount>{}, threadIdx.x % kWarpgroup,
                 grads(cute::_, cute::_, 0), keys(cute::_, cute::_, 0), acc);
}

// ---- blanking ----

// Rows behind the sequence may hold anything, and 0 * NaN is NaN: zeros, of one operand by each warpgroup,
// ordered before the tensor cores' reads, once all warps have come. Both operands have landed.
template <int kFirstStrips, int kSecondStrips, int kLines>
__device__ __forceinline__ void blank(int warpgroup, char* first, char* second, int num_rows) {
    keep_order();
    if (warpgroup == 0) {
        blank_lines<kFirstStrips, kLines>(first, num_rows);
    } else {
        blank_lines<kSecondStrips, kLines>(second, num_rows);
    }
    order_before_async_reads();
    meet(kBlanked, kConsumers);
}

template <typename S>
__device__ __forceinline__ void blank_keys(const Consumer<S>& own) {
    const int num_keys = num_keys_of(own.tile);
    if (num_keys >= kKeys) return;
    wait_for<FullBarrier>(own.shared.keys_full, 0);
    wait_for<FullBarrier>(own.shared.values_full, 0);
    blank<S::kStrips, kValueStrips, kKeys>(own.warpgroup, own.memory, own.memory + S::kFirstValue, num_keys);
}

template <typename S>
__device__ __forceinline__ void blank_queries(const Consumer<S>& own, int num_rows, const Place& place) {
    if (num_rows >= kQueries) return;
    wait_for<FullBarrier>(own.shared.queries_full[place.stage], place.phase);
    wait_for<FullBarrier>(own.shared.grad_out_full[place.stage], place.phase);
    blank<S::kStrips, kValueStrips, kQueries>(
        own.warpgroup, own.memory + S::kFirstQuery + place.stage * S::kQueryBytes,
        own.memory + S::kFirstGradOut + place.stage * S::kGradOutBytes, num_rows);
}

// ---- a block ----

// P, and under it dP; then dV += dO^T P, left in flight, and under it dS. Both lie in shared memory behind
// it.
template <typename S>
__device__ __forceinline__ void make_scores(Consumer<S>& own, const Walk& walk, const Place& place, int n) {
    using namespace cute;
    using T = typename S::T;
    using AccShape = cute::Shape<Int<kQueries>, Int<kKeys>>;
    const Rows rows = load_rows(own.p, own.tile, walk);
    auto scores = partition_fragment_C(typename Mma<S>::ForScores{}, AccShape{});
    auto grads = partition_fragment_C(typename Mma<S>::ForScores{}, AccShape{});
    wait_for<FullBarrier>(own.shared.queries_full[place.stage], place.phase);
    issue_scores<S, S::kWidth>(own, scores, S::kFirstQuery, 0, place.stage);
    wait_for<FullBarrier>(own.shared.grad_out_full[place.stage], place.phase);
    issue_scores<S, kValueWidth>(own, grads, S::kFirstGradOut, S::kFirstValue, place.stage);
    finish<1>(scores);
    Sums& weights = reinterpret_cast<Sums&>(*scores.data());
    hide_scores(weights, own.tile, walk, own.p.causal);
    weigh_scores(weights, rows, own.p.scale * kLog2E);
    wait_for<EmptyBarrier>(own.shared.weights_empty, n % 2 ^ 1);
    keep_turned<T>(own.memory + S::kFirstWeight, weights, 1.0f);
    order_before_async_reads();
    meet(kWeighed + own.warpgroup, kWarpgroup);
    issue_keys(own, own.grad_v, S::kFirstGradOut, S::kFirstWeight, place.stage);
    finish<1>(grads);
    Sums& grad_scores = reinterpret_cast<Sums&>(*grads.data());
    make_grad_scores(grad_scores, weights, rows);
    keep_turned<T>(own.memory + S::kFirstGradScore, grad_scores, 1.0f);
    order_before_async_reads();
    meet(kShared, kConsumers);
}

// dQ = dS K of kCount strips, to be added to its sums, and dK += Q^T dS.
template <int kCount, typename S>
__device__ __forceinline__ void multiply_scores(Consumer<S>& own, const Place& place, int n,
                                                int first_strip) {
    using namespace cute;
    using AccShape = cute::Shape<Int<kQueries>, Int<kLineElements * kCount>>;
    auto acc = partition_fragment_C(typename Mma<S>::template ForQueries<kCount>{}, AccShape{});
    issue_queries<kCount>(own, acc, first_strip);
    issue_keys(own, own.grad_k, S::kFirstQuery, S::kFirstGradScore, place.stage);
    finish<1>(acc);
    finish<1>(sums_of<S>(own.grad_v));
    wait_for<EmptyBarrier>(own.shared.sums_empty, n % 2 ^ 1);
    keep_sums<S::kWidth, kCount>(own.memory + S::kFirstSum,
                                 reinterpret_cast<const float (&)[32 * kCount]>(*acc.data()), first_strip);
    order_before_async_reads();
    __syncwarp();
    release(own.shared.sums_full);
    finish<0>(sums_of<S>(own.grad_k));
    release(own.shared.queries_empty[place.stage]);
    release(own.shared.weights_empty);
}

// ---- a tile ----

template <typename S>
__device__ __forceinline__ void take_blocks(Consumer<S>& own) {
    Walk walk = walk_of(own.p, own.tile);
    if (not walk.has_block()) return;
    blank_keys(own);
    wait_for<FullBarrier>(own.shared.keys_full, 0);
    wait_for<FullBarrier>(own.shared.values_full, 0);
    DSC_LOOP
    for (int n = 0; walk.has_block(); ++n, walk.advance()) {
        const Place place(n, own.options.num_stages);
        blank_queries(own, walk.num_rows(), place);
        make_scores(own, walk, place, n);
        const OwnStrips strips = own_strips(S::kStrips, own.warpgroup, n);
        if (S::kStrips > 2 and strips.count == 2) {
            multiply_scores<2>(own, place, n, strips.first);
        } else {
            multiply_scores<1>(own, place, n, strips.first);
        }
    }
}

// dK and dV of a tile, in the places of K and V once nobody reads them any more, and from there to memory.
template <typename S>
__device__ __forceinline__ void take_tile(Consumer<S>& own) {
    using T = typename S::T;
    cute::clear(sums_of<S>(own.grad_k));
    cute::clear(sums_of<S>(own.grad_v));
    take_blocks(own);
    meet(kOver, kConsumers);
    DSC_UNROLL
    for (int strip = 0; strip < S::kStrips; ++strip) {
        keep_turned<T>(own.memory + strip * kKeyStripBytes, own.grad_k[strip], own.p.scale);
    }
    DSC_UNROLL
    for (int strip = 0; strip < kValueStrips; ++strip) {
        keep_turned<T>(own.memory + S::kFirstValue + strip * kKeyStripBytes, own.grad_v[strip], 1.0f);
    }
    meet(kWeighed + own.warpgroup, kWarpgroup);
    store_gradients<S>(own.p, own.tile, own.memory);
}

}  // namespace dsc::prefill_backward_sm90
