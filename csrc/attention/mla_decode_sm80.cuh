// Latent decoding on mma.sync: a part of the plan and a tile of kRows query rows for each block.
//
// Rows of the cache come through a ring of stages of 32 (mla_decode_ring_sm80.cuh). A stage serves as keys
// and, its first 512 columns, as values. Three steps for each, with a barrier between: warps multiply queries
// with keys, in parts of the depth; the lanes that own a row add up the parts, weigh the scores as online
// softmax does (arXiv 2205.14135) and leave rounded weights over them; each warp adds weighted values to its
// 64 columns, whose sums stay in its registers.
#pragma once

#include <limits>

#include "attention/mla_decode_ring_sm80.cuh"
#include "core/math.h"
#include "core/overlap.h"
#include "core/quad_words.cuh"

namespace dsc::decode {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

// ---- the three steps of a stage ----

// Scores of the stage's keys, summed over the warp's part of the depth.
template <typename S>
__device__ __forceinline__ void sum_scores(const Memory<S>& memory, const typename S::T* stage) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int part = warp % S::kDepthParts, first_key = warp / S::kDepthParts % S::kWarpsN * 16;
    const int first_row = warp / (S::kDepthParts * S::kWarpsN) * S::kScoreFragments * 16;
    // Matrices of queries: rows 0-7, 8-15, then the next eight columns; of keys: columns first.
    const int matrix = lane / 8, line_row = lane % 8;
    const int row = first_row + matrix % 2 * 8 + line_row, key = first_key + matrix / 2 * 8 + line_row;
    float acc[S::kScoreFragments][2][4] = {};
    DSC_UNROLL
    for (int step = 0; step < kNumLines * S::kLineSteps; ++step) {
        const int line = step / S::kLineSteps;
        const int chunk = 2 * (part * S::kLineSteps + step % S::kLineSteps);
        uint32_t keys[4], queries[4];
        load_matrices(keys, stage + place(key, chunk + matrix % 2) + line * kLineElements);
        DSC_UNROLL
        for (int i = 0; i < S::kScoreFragments; ++i) {
            load_matrices(queries, memory.query + place(row, chunk + matrix / 2) + i * 16 * kCacheWidth +
                                       line * kLineElements);
            multiply_add<typename S::T>(acc[i][0], queries, keys[0], keys[1]);
            multiply_add<typename S::T>(acc[i][1], queries, keys[2], keys[3]);
        }
    }
    DSC_UNROLL
    for (int i = 0; i < S::kScoreFragments; ++i) {
        DSC_UNROLL
        for (int quarter = 0; quarter < 4; ++quarter) {
            const int j = quarter / 2, half = quarter % 2;
            float* const at = memory.score(part, first_row + 16 * i + 8 * half + lane / 4,
                                           first_key + 8 * j + 2 * (lane % 4));
            *reinterpret_cast<float2*>(at) = make_float2(acc[i][j][2 * half], acc[i][j][2 * half + 1]);
        }
    }
}

// What a lane knows of its row: the largest score so far, and its own keys' share of the sum of weights.
struct RowState {
    float largest = kLowest, sum = 0.0f;
};

template <typename S>
__device__ __forceinline__ int key_of(int vector) {
    return (vector * S::kLanes + static_cast<int>(threadIdx.x) % S::kLanes) * S::kVector;
}

// The lane's scores, over all parts of the depth.
template <typename S>
__device__ __forceinline__ void add_scores(const Memory<S>& memory, int row, float (&scores)[S::kKeys]) {
    DSC_UNROLL
    for (int i = 0; i < S::kKeys; ++i) scores[i] = 0.0f;
    DSC_UNROLL
    for (int part = 0; part < S::kDepthParts; ++part) {
        DSC_UNROLL
        for (int v = 0; v < S::kVectors; ++v) {
            const float* const at = memory.score(part, row, key_of<S>(v));
            DSC_UNROLL
            for (int i = 0; i < S::kVector; i += 2) {
                const float2 pair = reinterpret_cast<const float2*>(at)[i / 2];
                scores[v * S::kVector + i] += pair.x;
                scores[v * S::kVector + i + 1] += pair.y;
            }
        }
    }
}

// Weights of the stage's keys, of which the row sees the first num_seen, rounded over part 0 of its scores.
template <typename S>
__device__ __forceinline__ void weigh_scores(const Memory<S>& memory, RowState& state, int num_seen,
                                             float scale) {
    const int row = threadIdx.x / S::kLanes;
    float scores[S::kKeys];
    add_scores<S>(memory, row, scores);
    float largest = kLowest;
    DSC_UNROLL
    for (int i = 0; i < S::kKeys; ++i) {
        const int key = key_of<S>(i / S::kVector) + i % S::kVector;
        scores[i] = key < num_seen ? scores[i] * scale : -kInfinity;
        largest = max(largest, scores[i]);
    }
    largest = max(state.largest, row_max<S::kLanes>(largest));
    const float factor = exp_fast(state.largest - largest);
    state.largest = largest;
    state.sum *= factor;
    DSC_UNROLL
    for (int i = 0; i < S::kKeys; ++i) {
        scores[i] = exp_fast(scores[i] - largest);
        state.sum += scores[i];
    }
    __syncwarp();  // the row's scores have been read
    DSC_UNROLL
    for (int i = 0; i < S::kKeys; i += 2) {
        const int key = key_of<S>(i / S::kVector) + i % S::kVector;
        *reinterpret_cast<uint32_t*>(memory.weight(row, key)) =
            rounded_pair<typename S::T>(scores[i], scores[i + 1]);
    }
    if (threadIdx.x % S::kLanes == 0) memory.factor[row] = factor;
}

// The warp's columns: sums * factor + weights @ values.
template <typename S>
__device__ __forceinline__ void add_values(const Memory<S>& memory, const typename S::T* stage,
                                           Sums<S>& sums) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int matrix = lane / 8, line_row = lane % 8;
    float factor[S::kFragments][2];
    bool changes = false;
    DSC_UNROLL
    for (int i = 0; i < 2 * S::kFragments; ++i) {
        factor[i / 2][i % 2] = memory.factor[8 * i + lane / 4];
        changes = changes or factor[i / 2][i % 2] != 1.0f;
    }
    if (__any_sync(kAllLanes, changes)) {
        DSC_UNROLL
        for (int i = 0; i < S::kFragments; ++i) {
            DSC_UNROLL
            for (int element = 0; element < kWarpColumns / 2; ++element) {
                sums[i][element / 4][element % 4] *= factor[i][element / 2 % 2];
            }
        }
    }
    DSC_UNROLL
    for (int k = 0; k < kStageRows; k += 16) {
        uint32_t weights[S::kFragments][4];
        DSC_UNROLL
        for (int i = 0; i < S::kFragments; ++i) {
            load_matrices(weights[i],
                          memory.weight(16 * i + matrix % 2 * 8 + line_row, k + matrix / 2 * kChunk));
        }
        DSC_UNROLL
        for (int j = 0; j < kWarpColumns / 16; ++j) {
            uint32_t values[4];
            load_matrices_transposed(
                values,
                stage + place(k + matrix % 2 * 8 + line_row, 2 * j + matrix / 2) + warp * kLineElements);
            DSC_UNROLL
            for (int i = 0; i < S::kFragments; ++i) {
                multiply_add<typename S::T>(sums[i][2 * j], weights[i], values[0], values[1]);
                multiply_add<typename S::T>(sums[i][2 * j + 1], weights[i], values[2], values[3]);
            }
        }
    }
}

// ---- results ----

// A tile's place among results, or partial results.
struct Place {
    int64_t first_row;
    int num_rows;  // that exist
    bool is_whole;
};

// The log-sum-exp of each row, and what its sums are to be multiplied by. A row that saw nothing has no sums.
template <typename S>
__device__ __forceinline__ void finish_rows(const Memory<S>& memory, const MlaDecodeParams& p,
                                            const Place& at, const RowState& state) {
    const int row = threadIdx.x / S::kLanes;
    const float sum = row_sum<S::kLanes>(state.sum);
    if (threadIdx.x % S::kLanes != 0) return;
    memory.inverse[row] = sum == 0.0f ? 0.0f : 1.0f / sum;
    float* const lse = at.is_whole ? p.lse : p.partial_lse;
    if (row < at.num_rows) lse[at.first_row + row] = sum == 0.0f ? -kInfinity : state.largest + logf(sum);
}

// Columns 64 w and on of warp w: in words of rounded numbers, or partial sums as they are.
template <typename S>
__device__ __forceinline__ void store_sums(const Memory<S>& memory, const MlaDecodeParams& p, const Place& at,
                                           const Sums<S>& sums) {
    using T = typename S::T;
    const int lane = threadIdx.x % kWarpSize, column = threadIdx.x / kWarpSize * kWarpColumns;
    DSC_UNROLL
    for (int i = 0; i < 2 * S::kFragments; ++i) {
        const int row = 8 * i + lane / 4, half = i % 2;
        const float inverse = memory.inverse[row];
        const auto& all = sums[i / 2];
        const int64_t first = (at.first_row + row) * kLatentWidth + column;
        if (at.is_whole) {
            DSC_UNROLL
            for (int j = 0; j < kWarpColumns / 8; j += 4) {
                uint32_t pieces[4];
                DSC_UNROLL
                for (int n = 0; n < 4; ++n) {
                    const float low = all[j + n][2 * half], high = all[j + n][2 * half + 1];
                    pieces[n] = rounded_pair<T>(low * inverse, high * inverse);
                }
                const Word word = transposed_in_quad(pieces[0], pieces[1], pieces[2], pieces[3]);
                T* const out = static_cast<T*>(p.out) + first + (j + lane % 4) * kChunk;
                if (row < at.num_rows) *reinterpret_cast<Word*>(out) = word;
            }
        } else if (row < at.num_rows) {
            DSC_UNROLL
            for (int j = 0; j < kWarpColumns / 8; ++j) {
                *reinterpret_cast<float2*>(p.partial_out + first + j * 8 + 2 * (lane % 4)) =
                    make_float2(all[j][2 * half] * inverse, all[j][2 * half + 1] * inverse);
            }
        }
    }
}

// The result of a sequence without rows.
template <typename S>
__device__ __forceinline__ void store_nothing(const MlaDecodeParams& p, const Place& at) {
    constexpr int kRowWords = kLatentWidth / kChunk;
    const int num_rows = min(S::kRows, at.num_rows);
    Word* const out = static_cast<Word*>(p.out) + at.first_row * kRowWords;
    for (int i = threadIdx.x; i < num_rows * kRowWords; i += kNumThreads) out[i] = make_uint4(0, 0, 0, 0);
    if (static_cast<int>(threadIdx.x) < num_rows) p.lse[at.first_row + threadIdx.x] = -kInfinity;
}

// Block (tile of queries, part of the plan).
template <typename S>
__global__ void __launch_bounds__(kNumThreads)
    mla_decode_sm80_kernel(const MlaDecodeParams p, const int num_stages, const int page_shift) {
    DSC_SHARED_DYNAMIC(unsigned char, bytes);
    const Memory<S> memory(bytes);
    const int part = blockIdx.y, first_row = blockIdx.x * S::kRows;
    const int query_row = first_row + static_cast<int>(threadIdx.x) / S::kLanes;
    wait_for_previous_kernel();
    PieceWalk walk(p, part);
    RowSource<typename S::T> source(p, walk, page_shift);
    for (int i = 0; i < num_stages - 1; ++i) {
        source.start(memory.ring + i * kStageElements);
        commit_copies();
    }
    int stage = 0;
    for (; walk.has_piece(p); ++walk.sequence) {
        const DecodePiece piece = walk.piece(p);
        const Place at{first_result_row(p, piece, part) + first_row, num_query_rows(p) - first_row,
                       piece.is_whole};
        if (piece.is_empty()) {
            if (piece.is_whole) store_nothing<S>(p, at);
            continue;
        }
        load_query<S>(memory, p, piece.sequence, first_row);
        const int num_seen = num_seen_rows(p, query_row, piece.length);
        RowState state;
        Sums<S> sums = {};
        for (int row = piece.first_row(); row < piece.end_row(); row += kStageRows) {
            wait_for_stage(num_stages);
            __syncthreads();  // all threads' copies, and nobody reads the stage before this one any more
            source.start(memory.ring + (stage == 0 ? num_stages - 1 : stage - 1) * kStageElements);
            commit_copies();
            if (not source.has_rows()) let_next_kernel_start();
            const auto* const rows = memory.ring + stage * kStageElements;
            sum_scores<S>(memory, rows);
            __syncthreads();
            weigh_scores<S>(memory, state, num_seen - row, p.scale);
            __syncthreads();
            add_values<S>(memory, rows, sums);
            stage = stage + 1 == num_stages ? 0 : stage + 1;
        }
        finish_rows<S>(memory, p, at, state);
        __syncthreads();
        store_sums<S>(memory, p, at, sums);
    }
}

}  // namespace dsc::decode
