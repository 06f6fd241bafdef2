// Prefill attention on mma.sync: a tile of 128 queries of one head for each block, whose four warps have 32
// rows each. Blocks of keys and values come by asynchronous copies: the keys a block ahead, the values while
// keys are multiplied.
//
// Online softmax (FlashAttention-2, arXiv 2307.08691) in registers: a thread's scores become the left operand
// of the product with the values where they are. Weights are powers of two of the scores' distance to a
// reference, the largest score of the row at some time before: the sums are scaled anew only where a block's
// largest score is 2^kLag times above it.
#pragma once

#include <limits>

#include "attention/mla_prefill_tiles_sm80.cuh"
#include "core/math.h"
#include "core/overlap.h"
#include "core/quad_words.cuh"

namespace dsc::prefill {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLag = 8.0f;  // weights up to 2^8 are exact enough in float16, too

constexpr int kNumThreads = kPrefillSm80Threads;
constexpr int kWarpRows = kPrefillSm80TileRows / (kNumThreads / kWarpSize);
constexpr int kFragments = kWarpRows / 16;   // of a warp's rows
constexpr int kThreadRows = 2 * kFragments;  // row i is row 8 i + lane / 4 of the warp's
static_assert(kWarpRows % 16 == 0);

// Types and sizes of a kernel: keys and values in blocks of kKeys.
template <typename T_, int kWidth_, int kValueWidth_, int kKeys_>
struct Shape {
    using T = T_;
    static constexpr int kRows = kPrefillSm80TileRows, kKeys = kKeys_;
    static constexpr int kWidth = kWidth_, kValueWidth = kValueWidth_;
    static constexpr int kKeyElements = kKeys * kWidth;
};

// The block's shared memory: prefill_sm80_bytes.
template <typename S>
struct Memory {
    using T = typename S::T;
    T* query;   // [kRows][kWidth], swizzled
    T* keys;    // [2][kKeys][kWidth], swizzled
    T* values;  // [kKeys][kValueWidth], swizzled

    __device__ __forceinline__ explicit Memory(unsigned char* bytes)
        : query(reinterpret_cast<T*>(bytes)),
          keys(query + S::kRows * S::kWidth),
          values(keys + 2 * S::kKeyElements) {}
};

// A thread's fragments: (i, j) is rows 16 i and columns 8 j of the warp's.
template <typename S>
using Scores = float[kFragments][S::kKeys / 8][4];
template <typename S>
using Weights = uint32_t[kFragments][S::kKeys / 16][4];
template <typename S>
using Sums = float[kFragments][S::kValueWidth / 8][4];

// What a thread knows of its rows: the reference of their weights, and its own keys' share of their sums.
struct RowStates {
    float reference[kThreadRows], sum[kThreadRows];

    __device__ __forceinline__ RowStates() {
        DSC_UNROLL
        for (int row = 0; row < kThreadRows; ++row) {
            reference[row] = -kInfinity;
            sum[row] = 0.0f;
        }
    }
};

// ---- a block of keys ----

// scores = queries @ keys^T.
template <typename S>
__device__ __forceinline__ void multiply_keys(const typename S::T* query, const typename S::T* keys,
                                              Scores<S>& scores) {
    using T = typename S::T;
    const int thread = unhoisted(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
    // Matrices of queries: rows 0-7, 8-15, then the next eight columns; of keys: columns first.
    const int matrix = lane / 8, line_row = lane % 8;
    const int row = warp * kWarpRows + matrix % 2 * 8 + line_row, key = matrix / 2 * 8 + line_row;
    DSC_UNROLL
    for (int element = 0; element < kFragments * S::kKeys / 2; ++element) {
        scores[element / (S::kKeys / 2)][element / 4 % (S::kKeys / 8)][element % 4] = 0.0f;
    }
    // A line after the other, so that no more fragments are in flight than registers are left for.
    DSC_NO_UNROLL
    for (int line = 0; line < S::kWidth; line += kLineElements) {
        DSC_UNROLL
        for (int chunk = 0; chunk < kLineChunks; chunk += 2) {
            uint32_t queries[kFragments][4], fragment[4];
            const T* const first_query = query + place<S::kWidth>(row, chunk + matrix / 2) + line;
            const T* const first_key = keys + place<S::kWidth>(key, chunk + matrix % 2) + line;
            DSC_UNROLL
            for (int i = 0; i < kFragments; ++i) load_matrices(queries[i], first_query + i * 16 * S::kWidth);
            DSC_UNROLL
            for (int j = 0; j < S::kKeys / 16; ++j) {
                load_matrices(fragment, first_key + j * 16 * S::kWidth);
                DSC_UNROLL
                for (int i = 0; i < kFragments; ++i) {
                    multiply_add<T>(scores[i][2 * j], queries[i], fragment[0], fragment[1]);
                    multiply_add<T>(scores[i][2 * j + 1], queries[i], fragment[2], fragment[3]);
                }
            }
        }
    }
}

// Scores of keys that a row does not see become -inf; num_seen(i) counts those of the block that row i sees.
template <typename S, typename NumSeen>
__device__ __forceinline__ void hide_scores(Scores<S>& scores, const NumSeen& num_seen) {
    const int first_key = 2 * (threadIdx.x % 4);
    DSC_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
        const int num_own = num_seen(row) - first_key;
        DSC_UNROLL
        for (int element = 0; element < S::kKeys / 4; ++element) {
            const int j = element / 2, half = element % 2;
            if (8 * j + half >= num_own) scores[row / 2][j][row % 2 * 2 + half] = -kInfinity;
        }
    }
}

// Moves the references that lag too far behind the block's largest scores, and the sums with them.
template <typename S>
__device__ __forceinline__ void move_references(const Scores<S>& scores, float factor, RowStates& rows,
                                                Sums<S>& sums) {
    float largest[kThreadRows];
    bool moves = false;
    DSC_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
        largest[row] = -kInfinity;
        DSC_UNROLL
        for (int element = 0; element < S::kKeys / 4; ++element) {
            largest[row] = max(largest[row], scores[row / 2][element / 2][row % 2 * 2 + element % 2]);
        }
        largest[row] = row_max<4>(largest[row]);
        // Not where both are -inf: no comparison with NaN is true.
        const bool lags = (largest[row] - rows.reference[row]) * factor > kLag;
        if (not lags) largest[row] = rows.reference[row];
        moves = moves or lags;
    }
    if (not __any_sync(kAllLanes, moves)) return;
    DSC_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
        const bool stays = largest[row] == rows.reference[row];
        const float scale = stays ? 1.0f : exp2_fast((rows.reference[row] - largest[row]) * factor);
        rows.reference[row] = largest[row];
        rows.sum[row] *= scale;
        DSC_UNROLL
        for (int element = 0; element < S::kValueWidth / 4; ++element) {
            sums[row / 2][element / 2][row % 2 * 2 + element % 2] *= scale;
        }
    }
}

// weights = 2^(factor * (scores - reference)), which are rounded behind their sums.
template <typename S>
__device__ __forceinline__ void weigh_scores(const Scores<S>& scores, float factor, RowStates& rows,
                                             Weights<S>& weights) {
    DSC_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
        const float reference = rows.reference[row] == -kInfinity ? 0.0f : rows.reference[row] * factor;
        DSC_UNROLL
        for (int j = 0; j < S::kKeys / 8; ++j) {
            const float* const pair = &scores[row / 2][j][row % 2 * 2];
            const float low = exp2_fast(pair[0] * factor - reference);
            const float high = exp2_fast(pair[1] * factor - reference);
            rows.sum[row] += low + high;
            weights[row / 2][j / 2][j % 2 * 2 + row % 2] = rounded_pair<typename S::T>(low, high);
        }
    }
}

// sums += weights @ values.
template <typename S>
__device__ __forceinline__ void add_values(const typename S::T* values, const Weights<S>& weights,
                                           Sums<S>& sums) {
    const int lane = unhoisted(threadIdx.x) % kWarpSize, matrix = lane / 8;
    const int key = matrix % 2 * 8 + lane % 8;
    DSC_UNROLL
    for (int k = 0; k < S::kKeys / 16; ++k) {
        DSC_UNROLL
        for (int j = 0; j < S::kValueWidth / 16; ++j) {
            const int chunk = j % 4 * 2 + matrix / 2, line = j / 4 * kLineElements;
            uint32_t fragment[4];
            load_matrices_transposed(
                fragment, values + place<S::kValueWidth>(key, chunk) + k * 16 * S::kValueWidth + line);
            DSC_UNROLL
            for (int i = 0; i < kFragments; ++i) {
                multiply_add<typename S::T>(sums[i][2 * j], weights[i][k], fragment[0], fragment[1]);
                multiply_add<typename S::T>(sums[i][2 * j + 1], weights[i][k], fragment[2], fragment[3]);
            }
        }
    }
}

// ---- a tile of queries ----

// The tile of a block, and where its rows begin. In shared memory: registers are for the products.
template <typename T>
struct Tile {
    const T *query, *keys, *values;
    int64_t first_query;
    int num_rows, head;      // num_rows may be more than a tile has
    int num_keys, num_seen;  // of the sequence, and by the tile's row 0

    // Keys that a row of the tile sees; one that does not exist may see more than there are.
    __device__ __forceinline__ int num_seen_by(int row, bool causal) const {
        return causal ? num_seen + row : num_keys;
    }
};

template <typename T>
__device__ __forceinline__ Tile<T> find_tile(const MlaPrefillParams& p, const PrefillWork& work) {
    const PrefillTile tile = tile_at(p.plan, work.tile);
    const PrefillSequence sequence =
        prefill_sequence(p.cu_seqlens_q, p.cu_seqlens_k, tile.sequence, p.num_queries, p.num_keys);
    const int first_row = tile.block * kPrefillSm80TileRows;
    const int key_head = work.head / (p.num_heads / p.num_key_heads);
    const int64_t first_query = int64_t{sequence.first_query} + first_row;
    return {.query = row_of<T>(p.q, first_query, work.head),
            .keys = row_of<T>(p.k, sequence.first_key, key_head),
            .values = row_of<T>(p.v, sequence.first_key, key_head),
            .first_query = first_query,
            .num_rows = sequence.num_queries - first_row,
            .head = work.head,
            .num_keys = sequence.num_keys,
            .num_seen = sequence.num_seen(first_row, p.causal)};
}

// The weights of a block of keys, some of which the warp's rows see.
template <typename S>
__device__ __forceinline__ void weigh_block(const MlaPrefillParams& p, const Tile<typename S::T>& tile,
                                            const Memory<S>& memory, int block, RowStates& rows,
                                            Sums<S>& sums, Weights<S>& weights) {
    const float factor = p.scale * kLog2E;
    const int first_key = block * S::kKeys, first_row = threadIdx.x / kWarpSize * kWarpRows;
    Scores<S> scores;
    multiply_keys<S>(memory.query, memory.keys + block % 2 * S::kKeyElements, scores);
    if (first_key + S::kKeys > tile.num_seen_by(first_row, p.causal)) {
        const int own_row = first_row + threadIdx.x % kWarpSize / 4;
        hide_scores<S>(scores,
                       [&](int i) { return tile.num_seen_by(own_row + 8 * i, p.causal) - first_key; });
    }
    move_references<S>(scores, factor, rows, sums);
    weigh_scores<S>(scores, factor, rows, weights);
}

// Outputs and log-sum-exps of the warp's rows.
template <typename S>
__device__ __forceinline__ void store_rows(const MlaPrefillParams& p, const Tile<typename S::T>& tile,
                                           const RowStates& rows, const Sums<S>& sums) {
    using T = typename S::T;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    DSC_UNROLL
    for (int i = 0; i < kThreadRows; ++i) {
        const int row = warp * kWarpRows + 8 * i + lane / 4;
        const bool is_there = row < tile.num_rows;
        const int64_t at = (tile.first_query + row) * p.num_heads + tile.head;
        const float sum = row_sum<4>(rows.sum[i]);
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        if (is_there and lane % 4 == 0) {
            p.lse[at] = sum == 0.0f ? -kInfinity : rows.reference[i] * p.scale + logf(sum);
        }
        T* const out = static_cast<T*>(p.out) + at * S::kValueWidth + lane % 4 * kChunk;
        DSC_UNROLL
        for (int j = 0; j < S::kValueWidth / 8; j += 4) {
            uint32_t pieces[4];
            DSC_UNROLL
            for (int n = 0; n < 4; ++n) {
                const float* const pair = &sums[i / 2][j + n][i % 2 * 2];
                pieces[n] = rounded_pair<T>(pair[0] * inverse, pair[1] * inverse);
            }
            const Word word = transposed_in_quad(pieces[0], pieces[1], pieces[2], pieces[3]);
            if (is_there) *reinterpret_cast<Word*>(out + j * kChunk) = word;
        }
    }
}

// Block (tile of queries, head), in the order of prefill_work.
template <typename S>
__global__ void __launch_bounds__(kNumThreads, kPrefillSm80BlocksPerSm)
    mla_prefill_sm80_kernel(const MlaPrefillParams p) {
    using T = typename S::T;
    DSC_SHARED_DYNAMIC(unsigned char, bytes);
    const Memory<S> memory(bytes);
    wait_for_previous_kernel();
    const int num_tiles = p.plan[0];
    if (static_cast<int>(blockIdx.x) >= num_tiles * p.num_heads) return;
    DSC_SHARED(Tile<T>, tile);
    if (threadIdx.x == 0) tile = find_tile<T>(p, prefill_work(blockIdx.x, num_tiles, p.num_heads));
    __syncthreads();
    // Of the tile's rows, and of the warp's, the last that exists sees the most keys.
    const int first_row = threadIdx.x / kWarpSize * kWarpRows, last_row = tile.num_rows - 1;
    const int num_keys = tile.num_seen_by(min(S::kRows - 1, last_row), p.causal);
    const int num_seen =
        first_row > last_row ? 0 : tile.num_seen_by(min(first_row + kWarpRows - 1, last_row), p.causal);

    const auto start_keys = [&](int block) {
        const int first = block * S::kKeys;
        start_rows<S::kKeys, S::kWidth, kNumThreads>(memory.keys + block % 2 * S::kKeyElements,
                                                     tile.keys + first * p.k.token_stride, p.k.token_stride,
                                                     tile.num_keys - first);
    };
    RowStates rows;
    Sums<S> sums = {};
    const int num_blocks = num_keys > 0 ? num_prefill_blocks(num_keys, S::kKeys) : 0;
    if (num_blocks > 0) {
        start_rows<S::kRows, S::kWidth, kNumThreads>(memory.query, tile.query, p.q.token_stride,
                                                     tile.num_rows);
        start_keys(0);
    }
    commit_copies();
    for (int block = 0; block < num_blocks; ++block) {
        const int first_key = block * S::kKeys;
        wait_copies<0>();
        __syncthreads();  // the block's keys are there, and nobody reads what lies ahead of them any more
        start_rows<S::kKeys, S::kValueWidth, kNumThreads>(memory.values,
                                                          tile.values + first_key * p.v.token_stride,
                                                          p.v.token_stride, tile.num_keys - first_key);
        commit_copies();
        if (block + 1 < num_blocks) start_keys(block + 1);
        commit_copies();
        const bool sees = first_key < num_seen;
        Weights<S> weights;
        if (sees) weigh_block<S>(p, tile, memory, block, rows, sums, weights);
        wait_copies<1>();
        __syncthreads();  // the values are there
        if (sees) add_values<S>(memory.values, weights, sums);
    }
    let_next_kernel_start();
    store_rows<S>(p, tile, rows, sums);
}

}  // namespace dsc::prefill
