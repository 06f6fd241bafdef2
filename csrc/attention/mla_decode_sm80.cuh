// Latent decoding on mma.sync: a part of the plan and a tile of kRows query rows for each block.
//
// The queries of a piece lie in shared memory, 576 wide; rows of the cache travel through a ring of stages of
// 32 by asynchronous copies, which run on from one piece into the next. A stage serves as keys and, its first
// 512 columns, as values. Three steps for each, with a barrier between: warps multiply queries with keys, in
// parts of the depth; the lanes that own a row add up the parts, weigh the scores as online softmax does
// (arXiv 2205.14135) and leave rounded weights over them; each warp adds weighted values to its 64 columns,
// whose sums stay in its registers.
//
// A row of 576 is nine lines of 128 bytes, in which 16-byte chunk c of row r lies at c ^ (r % 8): the eight
// rows of every ldmatrix are in different banks, transposed or not.
#pragma once

#include <limits>

#include "attention/mla_decode_pieces.cuh"
#include "core/math.h"
#include "core/overlap.h"
#include "core/ptx_sm80.cuh"
#include "core/quad_words.cuh"

namespace dsc::decode {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

constexpr int kNumThreads = kDecodeSm80Threads;
constexpr int kStageRows = kDecodeSm80StageRows;
constexpr int kChunk = 8;                           // elements of 16 bytes
constexpr int kLineChunks = 8, kLineElements = 64;  // of 128 bytes
constexpr int kNumLines = kCacheWidth / kLineElements;
constexpr int kStageElements = kStageRows * kCacheWidth;
constexpr int kWarpColumns = kLatentWidth / (kNumThreads / kWarpSize);  // of the values: a line of a row
static_assert(kWarpColumns == kLineElements and kNumThreads == kStageRows * kLineChunks);

// How a tile of queries is shared by a block's warps and lanes.
template <typename T_, int kRows_>
struct Tile {
    using T = T_;
    static constexpr int kRows = kRows_, kFixedBytes = decode_sm80_fixed_bytes(kRows);
    // Scores: warps over rows, over the stage's keys, over the depth.
    static constexpr int kWarpsM = decode_sm80_warps_m(kRows), kWarpsN = 2;
    static constexpr int kDepthParts = decode_sm80_depth_parts(kRows);
    static constexpr int kScoreFragments = kRows / kWarpsM / 16;
    static constexpr int kLineSteps =
        kLineElements / 16 / kDepthParts;  // of a line's four products, in a part
    // Weights: lanes that share a row, and the keys of each, which lie in vectors.
    static constexpr int kLanes = kNumThreads / kRows;
    static constexpr int kKeys = kStageRows / kLanes;
    static constexpr int kVector = kKeys < 4 ? kKeys : 4, kVectors = kKeys / kVector;
    // Values: all rows, 64 columns a warp.
    static constexpr int kFragments = kRows / 16;
    static_assert(kWarpsM * kWarpsN * kDepthParts * kWarpSize == kNumThreads and kLanes <= kWarpSize);
};

// The sums of a thread: fragment (i, j) is rows 16 i and columns 8 j of the warp's.
template <typename S>
using Sums = float[S::kFragments][kWarpColumns / 8][4];

// The block's shared memory; as many bytes as decode_sm80_fixed_bytes and the stages take.
template <typename S>
struct Memory {
    using T = typename S::T;
    T* query;        // [kRows][576], swizzled
    float* scores;   // [kDepthParts][kRows][32], swizzled; part 0 becomes weights [kRows][64], swizzled
    float* factor;   // [kRows], by which a stage changes the sums
    float* inverse;  // [kRows], by which the finished sums are multiplied
    T* ring;         // [stages][32][576], swizzled

    __device__ __forceinline__ explicit Memory(unsigned char* bytes) {
        query = reinterpret_cast<T*>(bytes);
        scores = reinterpret_cast<float*>(query + S::kRows * kCacheWidth);
        factor = scores + S::kDepthParts * S::kRows * kStageRows;
        inverse = factor + S::kRows;
        ring = reinterpret_cast<T*>(bytes + S::kFixedBytes);
    }

    // Vectors of four scores of a row at their number with its bits reversed, chunks of eight weights as
    // those of a line.
    __device__ __forceinline__ float* score(int part, int row, int key) const {
        const int mixed = (row & 1) << 2 | (row & 2) | (row >> 2 & 1);
        return scores + (part * S::kRows + row) * kStageRows + ((key / 4) ^ mixed) * 4 + key % 4;
    }
    __device__ __forceinline__ T* weight(int row, int key) const {
        T* const first = reinterpret_cast<T*>(scores + row * kStageRows);
        return first + ((key / kChunk) ^ (row % kLineChunks)) * kChunk + key % kChunk;
    }
};

// Where chunk `chunk` of line 0 lies in a row of 576; the same chunk of line i is i * kLineElements behind.
__device__ __forceinline__ int place(int row, int chunk) {
    return row * kCacheWidth + ((chunk ^ row) % kLineChunks) * kChunk;
}

// ---- copies ----

// The rows of a part's pieces, 32 at a time, in order. A thread copies a chunk of each line of one row, whose
// page it looks up a stage ahead.
template <typename T>
struct RowSource {
    const MlaDecodeParams& p;
    PieceWalk walk;
    int page_shift;
    int row = 0, end_row = 0;  // the next stage's first, and the piece's end
    int page = -1;             // of the thread's row in that stage

    __device__ __forceinline__ RowSource(const MlaDecodeParams& p, const PieceWalk& walk, int page_shift)
        : p(p), walk(walk), page_shift(page_shift) {
        find_rows();
    }

    __device__ __forceinline__ bool has_rows() const { return row < end_row; }

    // The first piece from the walk's on that has rows; then the walk is behind it.
    __device__ __forceinline__ void find_rows() {
        for (; row >= end_row and walk.has_piece(p); ++walk.sequence) {
            const DecodePiece piece = walk.piece(p);
            if (piece.is_empty()) continue;
            row = piece.first_row();
            end_row = piece.end_row();
        }
        fetch();
    }

    __device__ __forceinline__ void fetch() {
        const int own = row + static_cast<int>(threadIdx.x) / kLineChunks;
        page = -1;
        if (own < end_row) page = p.page_table[(walk.sequence - 1) * p.table_stride + (own >> page_shift)];
    }

    __device__ __forceinline__ void start(T* stage) {
        if (not has_rows()) return;
        const int thread = unhoisted(threadIdx.x), own = thread / kLineChunks, chunk = thread % kLineChunks;
        const bool is_valid = page >= 0 and page < p.num_pages;
        const int in_page = (row + own) & ((1 << page_shift) - 1);
        const int64_t first = is_valid ? page * p.page_stride + in_page * kCacheWidth : 0;
        const T* const source = static_cast<const T*>(p.cache) + first + chunk * kChunk;
        T* const target = stage + place(own, chunk);
        DSC_UNROLL
        for (int line = 0; line < kNumLines; ++line) {
            copy_async(target + line * kLineElements, source + line * kLineElements, is_valid);
        }
        row += kStageRows;
        if (row < end_row) {
            fetch();
        } else {
            find_rows();
        }
    }
};

// All but the newest num_stages - 2 groups of copies have landed: the stage to be read has.
__device__ __forceinline__ void wait_for_stage(int num_stages) {
    static_assert(kDecodeSm80FewestStages == 2 and kDecodeSm80MostStages == 6);
    switch (num_stages) {
        case 2:
            return wait_copies<0>();
        case 3:
            return wait_copies<1>();
        case 4:
            return wait_copies<2>();
        case 5:
            return wait_copies<3>();
        default:
            return wait_copies<4>();
    }
}

// The tile's queries, zeros where there are no more. Behind a barrier since they were read last; one follows.
template <typename S>
__device__ __forceinline__ void load_query(const Memory<S>& memory, const MlaDecodeParams& p, int sequence,
                                           int first_row) {
    using T = typename S::T;
    const int num_rows = num_query_rows(p) - first_row, chunk = threadIdx.x % kLineChunks;
    const T* const query =
        static_cast<const T*>(p.q) + (int64_t{sequence} * num_query_rows(p) + first_row) * kCacheWidth;
    for (int row = threadIdx.x / kLineChunks; row < S::kRows; row += kStageRows) {
        const Word* const source = reinterpret_cast<const Word*>(query + int64_t{row} * kCacheWidth);
        Word words[kNumLines];
        DSC_UNROLL
        for (int line = 0; line < kNumLines; ++line) {
            words[line] = make_uint4(0, 0, 0, 0);
            if (row < num_rows) words[line] = source[line * kLineChunks + chunk];
        }
        DSC_UNROLL
        for (int line = 0; line < kNumLines; ++line) {
            *reinterpret_cast<Word*>(memory.query + place(row, chunk) + line * kLineElements) = words[line];
        }
    }
}

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
