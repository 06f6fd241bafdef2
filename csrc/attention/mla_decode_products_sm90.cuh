// The products of latent decoding on sm_90a, and how its two warpgroups go through the blocks of a piece
// (mla_decode_sm90.cuh says what belongs to which, and which barrier means what).
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/numeric_types.h>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "attention/mla_decode_blocks_sm90.cuh"
#include "core/barriers_sm90.cuh"

namespace dsc {

// Named barriers, a pair for each of the warpgroups.
constexpr int kTold = kNumCutlassBarriers, kScored = kTold + 2, kBlanked = kScored + 2,
              kSummed = kBlanked + 2;

struct DecodeShared {
    uint64_t full[kDecodeBuffers][kNumStrips], empty[kDecodeBuffers][kDecodeWarpgroups];
    uint64_t queries_full, queries_empty;
    float maxima[kDecodeWarpgroups][kDecodeRows];
    float sums[2][kDecodeWarpgroups][kDecodeRows];  // of pieces in turn
};

template <typename Barrier>
__device__ __forceinline__ void wait_for(const uint64_t& barrier, uint32_t parity) {
    wait_for_phase<Barrier, kMlaDecodeSm90IsProven>(&barrier, parity);
}

// One lane of each warp.
__device__ __forceinline__ void release(uint64_t& empty) {
    if (threadIdx.x % kWarpSize == 0) EmptyBarrier::arrive(&empty);
}

// Where the n-th block of this part lies, and which round of its buffer it is.
struct DecodePlace {
    int buffer;
    uint32_t phase;

    __device__ __forceinline__ DecodePlace(int n, int num_buffers)
        : buffer(n % num_buffers), phase(n / num_buffers % 2) {}
};

// The instructions, and the layouts of strips from which their descriptors are made.
template <typename T>
struct DecodeMma {
    using Element = std::conditional_t<std::is_same_v<T, __half>, cutlass::half_t, cutlass::bfloat16_t>;
    template <int kN>
    using Shape = cute::Shape<cute::_64, cute::Int<kN>, cute::_64>;
    static constexpr auto kK = cute::GMMA::Major::K, kMN = cute::GMMA::Major::MN;
    using Scores = decltype(cute::make_tiled_mma(
        cute::GMMA::ss_op_selector<Element, Element, float, Shape<kDecodeBlock>, kK, kK>()));
    using Kept = decltype(cute::make_tiled_mma(
        cute::GMMA::ss_op_selector<Element, Element, float, Shape<kHalfColumns>, kK, kMN>()));
    using Held = decltype(cute::make_tiled_mma(
        cute::GMMA::rs_op_selector<Element, Element, float, Shape<kHalfColumns>, kK, kMN>()));

    // Strips by their rows (queries, keys, weights), one behind the other; half a block's values by columns.
    template <int kCount>
    using Strips = decltype(cute::tile_to_shape(
        cute::GMMA::Layout_K_SW128_Atom<Element>{},
        cute::Shape<cute::Int<kDecodeBlock>, cute::Int<kLineElements>, cute::Int<kCount>>{},
        cute::Step<cute::_1, cute::_2, cute::_3>{}));
    using ValueStrips = decltype(cute::tile_to_shape(
        cute::GMMA::Layout_MN_SW128_Atom<Element>{},
        cute::Shape<cute::Int<kHalfColumns>, cute::Int<kDecodeBlock>>{}, cute::Step<cute::_2, cute::_1>{}));

    template <typename Layout>
    static __host__ __device__ __forceinline__ auto tensor(const char* at, Layout layout) {
        return cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Element*>(const_cast<char*>(at))),
                                 layout);
    }
};

// What a thread that multiplies has in registers over a piece, and where its part of shared memory is.
template <typename T>
struct DecodeConsumer {
    const MlaDecodeParams& p;
    const DecodeOptions& options;
    DecodeShared& shared;
    char* memory;  // queries, then buffers
    int warpgroup;
    DecodeValues values;
    DecodeSoftmax rows;
    DecodeView view;
    int length, block_offset;  // of the piece: block n of the part is block n + block_offset of the sequence

    __device__ __forceinline__ char* buffer(int n) const {
        return memory + (1 + n % options.num_buffers) * kBufferBytes;
    }
    __device__ __forceinline__ char* own_values(int n) const {
        return buffer(n) + warpgroup * kHalfStrips * kStripBytes;
    }
    __device__ __forceinline__ uint64_t& empty(int n) const {
        return shared.empty[n % options.num_buffers][warpgroup];
    }
};

// The values as wgmma's accumulators.
template <typename T>
__device__ __forceinline__ auto sums_of(DecodeConsumer<T>& own) {
    using namespace cute;
    return make_tensor(
        make_rmem_ptr(own.values),
        partition_fragment_C(typename DecodeMma<T>::Kept{}, Shape<_64, Int<kHalfColumns>>{}).layout());
}

// Until all but the last kBehind batches of products are over.
template <int kBehind, typename Acc>
__device__ __forceinline__ void finish(Acc&& acc) {
    cute::warpgroup_wait<kBehind>();
    cute::warpgroup_fence_operand(acc);
}

// ---- scores ----

// Of an own block, strip by strip as they come: left in flight.
template <typename T, typename Acc>
__device__ __forceinline__ void issue_scores(const DecodeConsumer<T>& own, Acc& acc, int n) {
    using namespace cute;
    using Mma = DecodeMma<T>;
    using Strips = typename Mma::template Strips<kNumStrips>;
    typename Mma::Scores mma;
    const auto part = mma.get_slice(threadIdx.x % kWarpgroup);
    const auto a = part.make_fragment_A(part.partition_A(Mma::tensor(own.memory, Strips{})));
    const auto b = part.make_fragment_B(part.partition_B(Mma::tensor(own.buffer(n), Strips{})));
    const DecodePlace place(n, own.options.num_buffers);
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    CUTE_UNROLL
    for (int turn = 0; turn < kNumStrips; ++turn) {
        const int strip = strip_in_turn(own.warpgroup, turn);
        wait_for<FullBarrier>(own.shared.full[place.buffer][strip], place.phase);
        if (turn == 0) warpgroup_fence_operand(acc);
        warpgroup_arrive();  // behind each wait: ptxas takes none for granted across a branch
        CUTE_UNROLL
        for (int k = 0; k < size<2>(a); ++k) {
            gemm(mma, a(_, _, k, strip), b(_, _, k, strip), acc);
            mma.accumulate_ = GMMA::ScaleOut::One;
        }
    }
    warpgroup_commit_batch();
}

// Scores into weights: into `held` for itself, into shared memory for the other warpgroup.
template <typename T, typename Acc, typename Held>
__device__ __forceinline__ void weigh_and_tell(DecodeConsumer<T>& own, const Acc& acc, Held& held,
                                               float (&factor)[2], int n) {
    constexpr float kLog2E = 1.4426950408889634f;
    DecodeScores scores;
    DecodeWeights weights;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(acc); ++i) scores[i] = acc(i);
    weigh_scores(scores, own.rows, factor, own.view, n + own.block_offset, own.p.scale * kLog2E);
    round_weights<T>(weights, scores);
    keep_rows(own.shared.maxima[own.warpgroup], own.rows.max);
    meet(kScored + own.warpgroup, kWarpgroup);
    keep_weights(own.buffer(n) + kRopeStrip * kStripBytes, weights);
    order_before_async_reads();
    tell(kTold + own.warpgroup, kDecodeConsumers);
    auto words = cute::recast<uint32_t>(held);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(words); ++i) words(i) = weights[i];
}

// ---- values ----

// Rows behind the sequence may hold anything, and 0 * NaN is NaN: zeros into the own half, ordered before the
// tensor cores' reads, once all warps have come.
template <typename T>
__device__ __forceinline__ void blank_values(const DecodeConsumer<T>& own, int n) {
    const int num_rows = own.length - (n + own.block_offset) * kDecodeBlock;
    if (num_rows >= kDecodeBlock) return;
    keep_order();
    blank_lines<kHalfStrips, kDecodeBlock>(own.own_values(n), num_rows);
    order_before_async_reads();
    meet(kBlanked + own.warpgroup, kWarpgroup);
}

// values += weights * own half of the n-th block's rows: left in flight. `weights` is wgmma's a.
template <typename T, typename Mma, typename Weights>
__device__ __forceinline__ void issue_values(DecodeConsumer<T>& own, Mma mma, const Weights& weights, int n) {
    using namespace cute;
    const auto part = mma.get_slice(threadIdx.x % kWarpgroup);
    const auto b = part.make_fragment_B(
        part.partition_B(DecodeMma<T>::tensor(own.own_values(n), typename DecodeMma<T>::ValueStrips{})));
    auto acc = sums_of(own);
    mma.accumulate_ = GMMA::ScaleOut::One;
    warpgroup_fence_operand(acc);
    warpgroup_arrive();
    CUTE_UNROLL
    for (int k = 0; k < size<2>(b); ++k) gemm(mma, weights(_, _, k), b(_, _, k), acc);
    warpgroup_commit_batch();
}

// The other warpgroup's block: its weights are in shared memory once it has told. Left in flight.
template <typename T>
__device__ __forceinline__ void issue_kept(DecodeConsumer<T>& own, int n) {
    using namespace cute;
    using Mma = DecodeMma<T>;
    const int other = own.warpgroup ^ 1;
    const DecodePlace place(n, own.options.num_buffers);
    DSC_LOOP
    for (int i = 0; i < kHalfStrips; ++i) {
        wait_for<FullBarrier>(own.shared.full[place.buffer][own.warpgroup * kHalfStrips + i], place.phase);
    }
    meet(kTold + other, kDecodeConsumers);
    float factor[2];
    follow_maxima(own.rows, factor, own.shared.maxima[other]);
    rescale(own.values, factor);
    blank_values(own, n);
    typename Mma::Kept mma;
    const auto part = mma.get_slice(threadIdx.x % kWarpgroup);
    const auto strip =
        Mma::tensor(own.buffer(n) + kRopeStrip * kStripBytes, typename Mma::template Strips<1>{});
    issue_values(own, mma, part.make_fragment_A(part.partition_A(strip(_, _, 0))), n);
}

template <typename T>
__device__ __forceinline__ void multiply_kept(DecodeConsumer<T>& own, int n) {
    issue_kept(own, n);
    finish<0>(sums_of(own));
    release(own.empty(n));
}

// ---- a piece ----

// An own block, and with kHasPrevious the other warpgroup's ahead of it in the piece.
template <bool kScoresFirst, bool kHasPrevious, typename T>
__device__ __forceinline__ void take_block(DecodeConsumer<T>& own, int n, bool is_last) {
    using namespace cute;
    using Mma = DecodeMma<T>;
    typename Mma::Held mma;
    auto acc = partition_fragment_C(typename Mma::Scores{}, Shape<_64, Int<kDecodeBlock>>{});
    auto held = make_tensor<typename Mma::Element>(Layout<Shape<Shape<_2, _2, _2>, _1, _4>>{});
    if constexpr (kHasPrevious and not kScoresFirst) multiply_kept(own, n - 1);
    issue_scores(own, acc, n);
    if constexpr (kHasPrevious and kScoresFirst) {
        issue_kept(own, n - 1);
        finish<1>(acc);
    } else {
        finish<0>(acc);
    }
    if (is_last) release(own.shared.queries_empty);
    float factor[2];
    weigh_and_tell(own, acc, held, factor, n);
    if constexpr (kHasPrevious and kScoresFirst) {
        finish<0>(sums_of(own));
        release(own.empty(n - 1));
    }
    rescale(own.values, factor);
    blank_values(own, n);
    warpgroup_fence_operand(held);
    issue_values(own, mma, held, n);
    finish<0>(sums_of(own));
    release(own.empty(n));
}

// Blocks n to end - 1 of the part, one piece.
template <bool kScoresFirst, typename T>
__device__ __forceinline__ void attend(DecodeConsumer<T>& own, int n, int end, uint32_t round) {
    const bool is_first = n % kDecodeWarpgroups == own.warpgroup;
    if (is_first or n + 1 < end) {
        wait_for<FullBarrier>(own.shared.queries_full, round);
    } else {
        release(own.shared.queries_empty);
    }
    if (is_first) take_block<kScoresFirst, false>(own, n, n + kDecodeWarpgroups >= end);
    DSC_LOOP
    for (n += is_first ? 2 : 1; n < end; n += kDecodeWarpgroups) {
        take_block<kScoresFirst, true>(own, n, n + kDecodeWarpgroups >= end);
    }
    if (n == end) multiply_kept(own, end - 1);
}

// Each warpgroup has summed the weights of its own blocks.
template <typename T>
__device__ __forceinline__ void add_sums(DecodeConsumer<T>& own, uint32_t round) {
    DSC_UNROLL
    for (int half = 0; half < 2; ++half) own.rows.sum[half] = row_sum<4>(own.rows.sum[half]);
    keep_rows(own.shared.sums[round][own.warpgroup], own.rows.sum);
    meet(kSummed, kDecodeConsumers);
    const float* const others = own.shared.sums[round][own.warpgroup ^ 1] + decode_lane().row;
    own.rows.sum[0] += others[0];
    own.rows.sum[1] += others[8];
}

template <bool kScoresFirst, typename T>
__device__ __forceinline__ void attend_pieces(DecodeConsumer<T>& own) {
    const DecodeTile tile = decode_tile();
    int n = 0;
    uint32_t round = 0;
    for_each_piece(own.p, tile, [&](const DecodePiece& piece) {
        own.rows = {};
        cute::clear(sums_of(own));
        if (not piece.is_empty()) {
            own.view = decode_view(own.p, piece, tile);
            own.length = piece.length;
            own.block_offset = piece.begin - n;
            const int end = n + piece.end - piece.begin;
            attend<kScoresFirst>(own, n, end, round);
            add_sums(own, round);
            n = end;
            round ^= 1;
        }
        store_result<T>(own.p, piece, tile, own.values, own.rows, own.warpgroup);
    });
}

}  // namespace dsc
