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
#include <cutlass/numeric_types.h>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "attention/mla_decode_blocks_sm90.cuh"
#include "core/barriers_sm90.cuh"
#include "core/overlap.h"

namespace dsc {

enum : int {
    kTold = kNumCutlassBarriers,
    kScored = kTold + 2,
    kBlanked = kScored + 2,
    kSummed = kBlanked + 2
};

struct DecodeMaps {
    CUtensorMap queries, cache;
};

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

// Where the n-th block of this part lies, and which round of its buffer it is.
struct DecodePlace {
    int buffer;
    uint32_t phase;

    __device__ __forceinline__ DecodePlace(int n, int num_buffers)
        : buffer(n % num_buffers), phase(n / num_buffers % 2) {}
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

// ---- products: a warpgroup ----

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

// What a consumer has in registers over a piece, and where its part of shared memory is.
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
    __device__ __forceinline__ const char* own_values(int n) const {
        return buffer(n) + warpgroup * kHalfStrips * kStripBytes;
    }

    // One lane of each warp.
    static __device__ __forceinline__ void release(uint64_t& empty) {
        if (threadIdx.x % kWarpSize == 0) EmptyBarrier::arrive(&empty);
    }
    __device__ __forceinline__ void release_values(int n) {
        release(shared.empty[n % options.num_buffers][warpgroup]);
    }

    // ---- scores of an own block: left in flight ----

    template <typename Acc>
    __device__ __forceinline__ void issue_scores(Acc& acc, int n) {
        using namespace cute;
        using Mma = DecodeMma<T>;
        typename Mma::Scores mma;
        const auto part = mma.get_slice(threadIdx.x % kWarpgroup);
        const auto a = part.make_fragment_A(
            part.partition_A(Mma::tensor(memory, typename Mma::template Strips<kNumStrips>{})));
        const auto b = part.make_fragment_B(
            part.partition_B(Mma::tensor(buffer(n), typename Mma::template Strips<kNumStrips>{})));
        const DecodePlace place(n, options.num_buffers);
        mma.accumulate_ = GMMA::ScaleOut::Zero;
        CUTE_UNROLL
        for (int turn = 0; turn < kNumStrips; ++turn) {
            const int strip = strip_in_turn(warpgroup, turn);
            wait_for<FullBarrier>(shared.full[place.buffer][strip], place.phase);
            if (turn == 0) warpgroup_fence_operand(acc);
            warpgroup_arrive();  // behind each wait: ptxas takes none for granted across a branch
            CUTE_UNROLL
            for (int k = 0; k < size<2>(a); ++k) {
                gemm(mma, a(_, _, k, strip), b(_, _, k, strip), acc);
                mma.accumulate_ = GMMA::ScaleOut::One;
            }
        }
    }

    // ---- products with the values ----

    // Rows behind the sequence may hold anything, and 0 * NaN is NaN: zeros into the own half, ordered before
    // the tensor cores' reads, once all warps have come.
    __device__ __forceinline__ void blank_values(int n) {
        const int num_rows = length - (n + block_offset) * kDecodeBlock;
        if (num_rows >= kDecodeBlock) return;
        keep_order();
        blank_lines<kHalfStrips, kDecodeBlock>(const_cast<char*>(own_values(n)), num_rows);
        order_before_async_reads();
        meet(kBlanked + warpgroup, kWarpgroup);
    }

    // values += weights * own half of the n-th block's rows: left in flight. `weights` is wgmma's a.
    template <typename Mma, typename Weights>
    __device__ __forceinline__ void issue_values(Mma mma, const Weights& weights, int n) {
        using namespace cute;
        const auto part = mma.get_slice(threadIdx.x % kWarpgroup);
        const auto b = part.make_fragment_B(
            part.partition_B(DecodeMma<T>::tensor(own_values(n), typename DecodeMma<T>::ValueStrips{})));
        auto acc = sums();
        mma.accumulate_ = GMMA::ScaleOut::One;
        warpgroup_fence_operand(acc);
        warpgroup_arrive();
        CUTE_UNROLL
        for (int k = 0; k < size<2>(b); ++k) gemm(mma, weights(_, _, k), b(_, _, k), acc);
    }

    // The other warpgroup's block: its weights are in shared memory once it has told.
    __device__ __forceinline__ void issue_kept(int n) {
        using namespace cute;
        using Mma = DecodeMma<T>;
        const DecodePlace place(n, options.num_buffers);
        DSC_LOOP
        for (int strip = 0; strip < kHalfStrips; ++strip) {
            wait_for<FullBarrier>(shared.full[place.buffer][warpgroup * kHalfStrips + strip], place.phase);
        }
        meet(kTold + (warpgroup ^ 1), kDecodeConsumers);
        float factor[2];
        follow_maxima(rows, factor, shared.maxima[warpgroup ^ 1]);
        rescale(values, factor);
        blank_values(n);
        typename Mma::Kept mma;
        const auto part = mma.get_slice(threadIdx.x % kWarpgroup);
        const auto strips =
            Mma::tensor(buffer(n) + kRopeStrip * kStripBytes, typename Mma::template Strips<1>{});
        issue_values(mma, part.make_fragment_A(part.partition_A(strips(_, _, 0))), n);
    }

    // Scores of an own block into weights: into `held` for itself, into shared memory for the other one.
    template <typename Acc, typename Held>
    __device__ __forceinline__ void weigh_and_tell(const Acc& acc, Held& held, float (&factor)[2], int n) {
        constexpr float kLog2E = 1.4426950408889634f;
        DecodeScores scores;
        DecodeWeights weights;
        CUTE_UNROLL
        for (int i = 0; i < cute::size(acc); ++i) scores[i] = acc(i);
        weigh_scores(scores, rows, factor, view, n + block_offset, p.scale * kLog2E);
        round_weights<T>(weights, scores);
        keep_rows(shared.maxima[warpgroup], rows.max);
        meet(kScored + warpgroup, kWarpgroup);
        keep_weights(buffer(n) + kRopeStrip * kStripBytes, weights);
        order_before_async_reads();
        tell(kTold + warpgroup, kDecodeConsumers);
        auto words = cute::recast<uint32_t>(held);
        CUTE_UNROLL
        for (int i = 0; i < cute::size(words); ++i) words(i) = weights[i];
    }

    // ---- a piece ----

    // Until all but the last kBehind batches of products are over.
    template <int kBehind, typename Acc>
    static __device__ __forceinline__ void finish(Acc&& acc) {
        cute::warpgroup_wait<kBehind>();
        cute::warpgroup_fence_operand(acc);
    }
    __device__ __forceinline__ auto sums() {
        using namespace cute;
        return make_tensor(
            make_rmem_ptr(values),
            partition_fragment_C(typename DecodeMma<T>::Kept{}, Shape<_64, Int<kHalfColumns>>{}).layout());
    }

    __device__ __forceinline__ void multiply_kept(int n) {
        issue_kept(n);
        cute::warpgroup_commit_batch();
        finish<0>(sums());
        release_values(n);
    }

    // An own block, and with kHasPrevious the other warpgroup's ahead of it in the piece.
    template <bool kScoresFirst, bool kHasPrevious>
    __device__ __forceinline__ void take_block(int n, bool is_last) {
        using namespace cute;
        using Mma = DecodeMma<T>;
        typename Mma::Held mma;
        auto acc = partition_fragment_C(typename Mma::Scores{}, Shape<_64, Int<kDecodeBlock>>{});
        auto held = make_tensor<typename Mma::Element>(Layout<Shape<Shape<_2, _2, _2>, _1, _4>>{});
        if constexpr (kHasPrevious and not kScoresFirst) multiply_kept(n - 1);
        issue_scores(acc, n);
        warpgroup_commit_batch();
        if constexpr (kHasPrevious and kScoresFirst) {
            issue_kept(n - 1);
            warpgroup_commit_batch();
            finish<1>(acc);
        } else {
            finish<0>(acc);
        }
        if (is_last) release(shared.queries_empty);
        float factor[2];
        weigh_and_tell(acc, held, factor, n);
        if constexpr (kHasPrevious and kScoresFirst) {
            finish<0>(sums());
            release_values(n - 1);
        }
        rescale(values, factor);
        blank_values(n);
        warpgroup_fence_operand(held);
        issue_values(mma, held, n);
        warpgroup_commit_batch();
        finish<0>(sums());
        release_values(n);
    }

    // Blocks n to end - 1 of the part, one piece.
    template <bool kScoresFirst>
    __device__ __forceinline__ void attend(int n, int end, uint32_t round) {
        const bool is_first = n % kDecodeWarpgroups == warpgroup;
        if (is_first or n + 1 < end) {
            wait_for<FullBarrier>(shared.queries_full, round);
        } else {
            release(shared.queries_empty);
        }
        if (is_first) take_block<kScoresFirst, false>(n, n + kDecodeWarpgroups >= end);
        DSC_LOOP
        for (n += is_first ? 2 : 1; n < end; n += kDecodeWarpgroups) {
            take_block<kScoresFirst, true>(n, n + kDecodeWarpgroups >= end);
        }
        if (n == end) multiply_kept(end - 1);
    }

    // Each warpgroup has summed the weights of its own blocks.
    __device__ __forceinline__ void add_sums(uint32_t round) {
        DSC_UNROLL
        for (int half = 0; half < 2; ++half) rows.sum[half] = row_sum<4>(rows.sum[half]);
        keep_rows(shared.sums[round][warpgroup], rows.sum);
        meet(kSummed, kDecodeConsumers);
        const float* const others = shared.sums[round][warpgroup ^ 1] + decode_lane().row;
        rows.sum[0] += others[0];
        rows.sum[1] += others[8];
    }
};

template <typename T, bool kScoresFirst>
__device__ __forceinline__ void attend_pieces(const MlaDecodeParams& p, const DecodeOptions& options,
                                              DecodeShared& shared, char* memory) {
    const DecodeTile tile = decode_tile();
    DecodeConsumer<T> consumer{.p = p,
                               .options = options,
                               .shared = shared,
                               .memory = memory,
                               .warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup};
    int n = 0;
    uint32_t round = 0;
    for_each_piece(p, tile, [&](const DecodePiece& piece) {
        consumer.rows = {};
        cute::clear(consumer.sums());
        if (not piece.is_empty()) {
            consumer.view = decode_view(p, piece, tile);
            consumer.length = piece.length;
            consumer.block_offset = piece.begin - n;
            const int end = n + piece.end - piece.begin;
            consumer.template attend<kScoresFirst>(n, end, round);
            consumer.add_sums(round);
            n = end;
            round ^= 1;
        }
        store_result<T>(p, piece, tile, consumer.values, consumer.rows, consumer.warpgroup);
    });
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
        attend_pieces<T, kScoresFirst>(p, options, shared, memory);
    } else {
        cutlass::arch::warpgroup_reg_dealloc<kDecodeLoadRegisters>();
        if (threadIdx.x == kDecodeConsumers) load_pieces(maps, p, options, shared, memory);
    }
}

}  // namespace dsc
