// What the two backward kernels of mla_prefill on mma.sync have in common: tiles of queries and of keys in
// shared memory, and for a pair of them the weights P and their gradient dS, made again from the log-sum-exp:
//     P = exp2(log2(e) * scale * Q K^T - log2(e) * lse),  dS = P * (dO V^T - delta).
//
// Both are rounded to the tensors' type on their way to shared memory, where the products read them. A weight
// that a mask hides is 0; rows behind a sequence's end come in as zeros, with a log-sum-exp of +inf, so that
// their weights are 0 without a mask.
#pragma once

#include <limits>

#include "attention/mla_prefill_products_sm80.cuh"
#include "core/math.h"
#include "core/overlap.h"
#include "core/quad_words.cuh"

namespace dsc::prefill_backward {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Tiles of kQueries and kKeys rows, and how the warps share each product. Elements of shared memory: Q, dO,
// K, V, P and dS.
template <typename T_, int kWidth_, int kValueWidth_, int kQueries_>
struct Tile {
    using T = T_;
    static constexpr int kWidth = kWidth_, kValueWidth = kValueWidth_, kQueries = kQueries_, kKeys = 64;
    static constexpr int kQueryElements = kQueries * kWidth, kGradOutElements = kQueries * kValueWidth;
    static constexpr int kKeyElements = kKeys * kWidth, kValueElements = kKeys * kValueWidth;
    static constexpr int kScoreElements = kQueries * kKeys;
    static constexpr int kSharedBytes =
        2 * (kQueryElements + kGradOutElements + kKeyElements + kValueElements + 2 * kScoreElements);
    using Scores = WarpGrid<kQueries, kKeys, 4>;
    using GradQ = WarpGrid<kQueries, kWidth, kQueries / 32>;
    using GradK = WarpGrid<kKeys, kWidth, 2>;
    using GradV = WarpGrid<kKeys, kValueWidth, 2>;
    static_assert(sizeof(T) == 2 and kWidth % kLineElements == 0 and kValueWidth % kLineElements == 0);
};

// The block's shared memory.
template <typename S>
struct Memory {
    using T = typename S::T;
    T *query, *grad_out, *key, *value;
    T *weight, *grad_score;  // [kQueries][kKeys]

    __device__ __forceinline__ explicit Memory(unsigned char* bytes) {
        query = reinterpret_cast<T*>(bytes);
        grad_out = query + S::kQueryElements;
        key = grad_out + S::kGradOutElements;
        value = key + S::kKeyElements;
        weight = value + S::kValueElements;
        grad_score = weight + S::kScoreElements;
    }
};

// A block's place: a tile of one sequence and its head.
struct Place {
    PrefillSequence sequence;
    int sequence_idx, tile, head;
};

__device__ __forceinline__ bool has_place(const MlaPrefillBackwardParams& p, int num_heads) {
    return blockIdx.x < int64_t{p.plan[0]} * num_heads;
}

// Found again behind a loop that leaves no registers to keep it in.
__device__ __forceinline__ Place find_place(const MlaPrefillBackwardParams& p, int num_heads) {
    const PrefillWork work = prefill_work(unhoisted(blockIdx.x), p.plan[0], num_heads);
    const PrefillTile tile = prefill::tile_at(p.plan, work.tile);
    return {prefill_sequence(p.cu_seqlens_q, p.cu_seqlens_k, tile.sequence, p.num_queries, p.num_keys),
            tile.sequence, tile.block, work.head};
}

// ---- copies ----

// Starts copying the rows of a tile of queries, or of keys: q or dO, k or v.
template <int kRows, int kWidth, typename T>
__device__ __forceinline__ void start_queries(T* tile, const HeadRows& rows, const PrefillSequence& sequence,
                                              int first_query, int head) {
    prefill::start_rows<kRows, kWidth, kNumThreads>(
        tile, prefill::row_of<T>(rows, int64_t{sequence.first_query} + first_query, head), rows.token_stride,
        sequence.num_queries - first_query);
}

template <int kRows, int kWidth, typename T>
__device__ __forceinline__ void start_keys(T* tile, const HeadRows& rows, const PrefillSequence& sequence,
                                           int first_key, int head) {
    prefill::start_rows<kRows, kWidth, kNumThreads>(
        tile, prefill::row_of<T>(rows, int64_t{sequence.first_key} + first_key, head), rows.token_stride,
        sequence.num_keys - first_key);
}

// ---- scores ----

// Which keys of a tile a query sees: row r of the queries' tile the first min(num_keys, of_first + r).
struct Seen {
    int of_first, num_keys;

    template <typename S>
    __device__ __forceinline__ bool hides_some() const {
        return min(of_first, num_keys) < S::kKeys;
    }
};

// Of the queries from first_query on and the keys from first_key on.
__device__ __forceinline__ Seen seen_keys(const PrefillSequence& sequence, int first_query, int first_key,
                                          bool causal) {
    constexpr int kAll = 1 << 30;
    return {causal ? sequence.num_seen(first_query, true) - first_key : kAll, sequence.num_keys - first_key};
}

// A thread's rows: log2(e) * lse, and delta.
template <typename S>
struct RowValues {
    float lse[S::Scores::kBlocksM][2], delta[S::Scores::kBlocksM][2];

    __device__ __forceinline__ void load(const MlaPrefillBackwardParams& p, const PrefillSequence& sequence,
                                         int first_row, int head) {
        const int64_t first = head * p.num_queries + sequence.first_query + first_row;
        const int num_rows = sequence.num_queries - first_row;
        DSC_UNROLL
        for (int i = 0; i < 2 * S::Scores::kBlocksM; ++i) {
            const int row = S::Scores::row(threadIdx.x, i / 2) + i % 2 * 8 + threadIdx.x % kWarpSize / 4;
            const float* const values = p.row_values + first + row;
            lse[i / 2][i % 2] = row < num_rows ? values[0] : kInfinity;
            delta[i / 2][i % 2] = row < num_rows ? values[p.num_heads * p.num_queries] : 0.0f;
        }
    }
};

// dS of the tile, and P, from Q K^T and dO V^T, to shared memory.
template <typename S, bool kKeepsWeights, bool kHides>
__device__ __forceinline__ void weigh_scores(const Memory<S>& memory, const Sums<typename S::Scores>& scores,
                                             const Sums<typename S::Scores>& grad_weights,
                                             const RowValues<S>& rows, const Seen& seen, float scale) {
    using Grid = typename S::Scores;
    using T = typename S::T;
    const int thread = unhoisted(threadIdx.x), lane = thread % kWarpSize;
    DSC_UNROLL
    for (int i = 0; i < 2 * Grid::kBlocksM; ++i) {
        const int row = Grid::row(thread, i / 2) + i % 2 * 8 + lane / 4;
        const int num_seen = kHides ? min(seen.num_keys, seen.of_first + row) : S::kKeys;
        const float lse = rows.lse[i / 2][i % 2], delta = rows.delta[i / 2][i % 2];
        DSC_UNROLL
        for (int j = 0; j < 2 * Grid::kBlocksN; ++j) {
            const int key = Grid::column(thread, j / 2) + j % 2 * 8 + 2 * (lane % 4);
            const float* const score = scores[i / 2][j / 2][j % 2] + 2 * (i % 2);
            const float* const grad = grad_weights[i / 2][j / 2][j % 2] + 2 * (i % 2);
            float weight[2];
            DSC_UNROLL
            for (int n = 0; n < 2; ++n) {
                weight[n] = exp2_fast(score[n] * scale - lse);
                if (kHides and key + n >= num_seen) weight[n] = 0.0f;
            }
            const int at = prefill::place<S::kKeys>(row, key / kChunk) + key % kChunk;
            if constexpr (kKeepsWeights) {
                *reinterpret_cast<uint32_t*>(memory.weight + at) = rounded_pair<T>(weight[0], weight[1]);
            }
            *reinterpret_cast<uint32_t*>(memory.grad_score + at) =
                rounded_pair<T>(weight[0] * (grad[0] - delta), weight[1] * (grad[1] - delta));
        }
    }
}

// One pair of tiles: of this thread's copies V and dO may have one newer group under way, Q and K have none.
// Behind another barrier P, where it is kept, and dS may be read.
template <typename S, bool kKeepsWeights>
__device__ __forceinline__ void make_scores(const Memory<S>& memory, const RowValues<S>& rows,
                                            const Seen& seen, float scale) {
    using Grid = typename S::Scores;
    using T = typename S::T;
    Sums<Grid> scores, grad_weights;
    clear<Grid>(grad_weights);
    wait_copies<1>();
    __syncthreads();
    add_product<T, Grid, S::kValueWidth / 16>(
        grad_weights, Operand<Grid, Side::kA, Depth::kAlongRows, S::kValueWidth>(memory.grad_out),
        Operand<Grid, Side::kB, Depth::kAlongRows, S::kValueWidth>(memory.value));
    clear<Grid>(scores);
    wait_copies<0>();
    __syncthreads();
    add_product<T, Grid, S::kWidth / 16>(scores,
                                         Operand<Grid, Side::kA, Depth::kAlongRows, S::kWidth>(memory.query),
                                         Operand<Grid, Side::kB, Depth::kAlongRows, S::kWidth>(memory.key));
    if (seen.template hides_some<S>()) {
        weigh_scores<S, kKeepsWeights, true>(memory, scores, grad_weights, rows, seen, scale);
    } else {
        weigh_scores<S, kKeepsWeights, false>(memory, scores, grad_weights, rows, seen, scale);
    }
}

// ---- results ----

// Rows of a gradient, [.., heads, kWidth]: `rows` is the head's first. A thread gets a word of every block of
// 16 x 16 that its warp summed.
template <typename Grid, int kWidth, typename T>
__device__ __forceinline__ void store_gradient(T* rows, int num_heads, int num_rows, const Sums<Grid>& sums,
                                               float factor) {
    const int thread = unhoisted(threadIdx.x), lane = thread % kWarpSize, quad_lane = lane % 4;
    DSC_UNROLL
    for (int i = 0; i < Grid::kBlocksM; ++i) {
        const int row = Grid::row(thread, i) + quad_lane / 2 * 8 + lane / 4;
        T* const target = rows + int64_t{row} * num_heads * kWidth + quad_lane % 2 * kChunk;
        DSC_UNROLL
        for (int j = 0; j < Grid::kBlocksN; ++j) {
            uint32_t pieces[4];  // upper left, upper right, lower left, lower right
            DSC_UNROLL
            for (int n = 0; n < 4; ++n) {
                const float* const pair = sums[i][j][n % 2] + n / 2 * 2;
                pieces[n] = rounded_pair<T>(pair[0] * factor, pair[1] * factor);
            }
            const Word word = transposed_in_quad(pieces[0], pieces[1], pieces[2], pieces[3]);
            if (row < num_rows) *reinterpret_cast<Word*>(target + Grid::column(thread, j)) = word;
        }
    }
}

}  // namespace dsc::prefill_backward
