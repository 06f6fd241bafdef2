// What a block of the grid does to 64 rows of the cache on sm_90a, apart from copies and products: where
// boxes come from and land, the softmax of a thread's scores, where probabilities lie, what becomes of the
// sums. Nothing here needs a GPU or CuTe, so the host executor can play the rest.
//
// Rows of 576 elements come as nine strips of 64 columns: a line of 128 bytes for each of 64 rows, swizzled
// by the copy engine. Strips 0 to 7 are the latent: keys and values both. Strip 8, the rotated key, is read
// by the scores alone; the probabilities of the same block take its place.
#pragma once

#include "attention/mla_decode_pieces.cuh"
#include "core/lines_sm90.cuh"
#include "core/math.h"
#include "core/quad_words.cuh"
#include "core/tensor_map.h"

namespace dsc {

constexpr int kStripBytes = kDecodeBlock * kLineBytes;
constexpr int kNumStrips = kCacheWidth / kLineElements;
constexpr int kRopeStrip = kLatentWidth / kLineElements;
constexpr int kHalfStrips = kRopeStrip / 2;  // of the values, a warpgroup's
constexpr int kHalfColumns = kLatentWidth / 2;
constexpr int kBufferBytes = kNumStrips * kStripBytes;  // a block of the cache, or a tile of queries
constexpr int kDecodeBuffers = 2;
constexpr int kDecodeSm90SharedBytes = (1 + kDecodeBuffers) * kBufferBytes;  // the queries come first
constexpr int kDecodeWarpgroups = 2;
constexpr int kDecodeConsumers = kDecodeWarpgroups * kWarpgroup;
// Warpgroups that multiply, then one that loads; each divides its registers anew.
constexpr int kDecodeSm90Threads = kDecodeConsumers + kWarpgroup;
constexpr int kDecodeLoadRegisters = 56, kDecodeMultiplyRegisters = 224;
static_assert(kWarpgroup * (kDecodeLoadRegisters + kDecodeWarpgroups * kDecodeMultiplyRegisters) <= 65536);
constexpr int kDecodeSm90StaticBytes =
    2048;  // barriers and what warpgroups tell each other, up to the strips
static_assert(kDecodeSm90SharedBytes + kDecodeSm90StaticBytes <= 227 * 1024);
static_assert(kDecodeRows == kDecodeBlock and kNumStrips == kRopeStrip + 1);

// How a kernel goes about it; the steps of its bring-up are in docs/mla_decode_sm90.md.
struct DecodeOptions {
    int num_buffers;    // 1 or 2
    bool scores_first;  // ahead of the products on the weights of the block before
    uint64_t hint;      // what L2 is told of the cache
};

// Several tiles of rows read a page one after the other, and the tensor cores are their limit; memory is that
// of one tile alone.
inline DecodeOptions decode_options(const MlaDecodeParams& p, DecodeArch arch) {
    const bool is_shared = p.num_new * p.num_heads > kDecodeRows;
    return {.num_buffers = arch == DecodeArch::kSm90OneBuffer ? 1 : kDecodeBuffers,
            .scores_first = arch == DecodeArch::kSm90ScoresFirst or (arch == DecodeArch::kSm90 and is_shared),
            .hint = is_shared ? kNormalHint : kOnceHint};
}

// A thread's sums: acc[4 * j + 2 * half + i] is row `half` and column i of the j-th block of eight columns.
using DecodeScores = float[4 * (kDecodeBlock / 8)];
using DecodeValues = float[4 * (kHalfColumns / 8)];
// Its probabilities, two in a word, as wgmma takes them from registers: word 4 * k + 2 * j + half of step k
// is row `half` of block 2 * k + j.
using DecodeWeights = uint32_t[2 * (kDecodeBlock / 8)];

// The first of a thread's two rows, the second is eight below; and its first column in each block of eight.
struct DecodeLane {
    int row, column;
};

__host__ __device__ constexpr DecodeLane decode_lane_of(int thread) {
    const int in_group = thread % kWarpgroup;
    return {.row = 16 * (in_group / kWarpSize) + in_group % kWarpSize / 4, .column = 2 * (in_group % 4)};
}

__device__ __forceinline__ DecodeLane decode_lane() {
    return decode_lane_of(static_cast<int>(threadIdx.x));
}

// Where word i of a thread's weights lies in a strip: a line per row, k contiguous. A warp's words lie in all
// banks at once.
__host__ __device__ constexpr int weights_byte(const DecodeLane& lane, int i) {
    return swizzled((lane.row + 8 * (i % 2)) * kLineBytes + i / 2 * kWordBytes) + 2 * lane.column;
}

// One tile of query rows against one part of the plan: what a block of the grid works on.
struct DecodeTile {
    int part;
    int first_row;  // of a sequence's S * H
};

__device__ __forceinline__ DecodeTile decode_tile() {
    return {.part = static_cast<int>(blockIdx.y), .first_row = static_cast<int>(blockIdx.x) * kDecodeRows};
}

// use(piece) for each piece that has blocks, or is a whole sequence without any.
template <typename Use>
__device__ __forceinline__ void for_each_piece(const MlaDecodeParams& p, const DecodeTile& tile,
                                               const Use& use) {
    for (decode::PieceWalk walk(p, tile.part); walk.has_piece(p); ++walk.sequence) {
        const DecodePiece piece = walk.piece(p);
        if (piece.is_whole or not piece.is_empty()) use(piece);
    }
}

// ---- copies ----

// The queries, [B, S * H, 576]: rows behind the last one read as zeros.
inline TensorMapSpec decode_query_map(const MlaDecodeParams& p) {
    const int64_t num_rows = int64_t{p.num_new} * p.num_heads;
    return map_spec<3>("mla_decode", "q", p.q, p.dtype, {kCacheWidth, num_rows, p.num_sequences},
                       {kCacheWidth, num_rows * kCacheWidth}, {kLineElements, kDecodeRows, 1});
}

__host__ __device__ constexpr BoxPlace decode_query_place(const DecodeTile& tile, int sequence, int strip) {
    return {strip * kLineElements, tile.first_row, sequence};
}

// Rows of a box: of one page.
__host__ __device__ constexpr int decode_box_rows(int page_size) {
    return page_size < kDecodeBlock ? page_size : kDecodeBlock;
}

// The cache, [P, L, 576], pages apart by their stride. Page P reads as zeros.
inline TensorMapSpec decode_cache_map(const MlaDecodeParams& p) {
    return map_spec<3>("mla_decode", "cache", p.cache, p.dtype, {kCacheWidth, p.page_size, p.num_pages},
                       {kCacheWidth, p.page_stride}, {kLineElements, decode_box_rows(p.page_size), 1});
}

// What the table says of a block's boxes, at most four; -1 for one that begins behind the sequence, where a
// slot may hold anything and is not read.
constexpr int kMostBoxes = 4;
struct DecodePages {
    int at[kMostBoxes];
};

__device__ __forceinline__ DecodePages decode_pages(const MlaDecodeParams& p, const DecodePiece& piece,
                                                    int block) {
    const int32_t* const pages = p.page_table + piece.sequence * p.table_stride;
    const int box_rows = decode_box_rows(p.page_size);
    DecodePages found;
    DSC_UNROLL
    for (int box = 0; box < kMostBoxes; ++box) {
        const int row = block * kDecodeBlock + box * box_rows;
        const bool is_there = box * box_rows < kDecodeBlock and row < piece.length;
        found.at[box] = is_there ? pages[row / p.page_size] : -1;
    }
    return found;
}

// A page that is not there is page P. Numbers are looked at here, not where they are read: nothing waits for
// those of the coming block.
__host__ __device__ constexpr BoxPlace decode_box_place(const MlaDecodeParams& p, const DecodePages& pages,
                                                        int block, int strip, int box) {
    const int page = pages.at[box];
    return {strip * kLineElements, block * kDecodeBlock % p.page_size,
            page >= 0 and page < p.num_pages ? page : p.num_pages};
}

// The n-th strip to come of a block whose scores warpgroup `owner` takes: its own values first, since it is
// the first to release them.
__host__ __device__ constexpr int strip_in_turn(int owner, int n) {
    if (n == kRopeStrip) return kRopeStrip;
    return (n + owner * kHalfStrips) % kRopeStrip;
}

// ---- softmax ----

// Scores are in units of log2. Finite, so that no difference is of infinities: a row of nothing but masked
// scores keeps the least maximum and no weight.
constexpr float kLeastMax = -1e30f, kMaskedScore = -1e33f;

// Of a thread's two rows: the largest score of all blocks so far, and the sum of weights of those whose
// scores this warpgroup took, in this thread's columns.
struct DecodeSoftmax {
    float max[2] = {kLeastMax, kLeastMax};
    float sum[2] = {0, 0};
};

// How many rows of the cache the thread's rows see, and how many all rows do.
struct DecodeView {
    int num_seen[2];
    int num_for_all;
};

__device__ __forceinline__ DecodeView decode_view(const MlaDecodeParams& p, const DecodePiece& piece,
                                                  const DecodeTile& tile) {
    const int row = tile.first_row + decode_lane().row;
    return {.num_seen = {decode::num_seen_rows(p, row, piece.length),
                         decode::num_seen_rows(p, row + 8, piece.length)},
            .num_for_all = decode::num_seen_rows(p, 0, piece.length)};
}

// Scores of block `block` into weights; `factor` is what older sums must be multiplied by.
__device__ __forceinline__ void weigh_scores(DecodeScores& scores, DecodeSoftmax& rows, float (&factor)[2],
                                             const DecodeView& view, int block, float scale_log2) {
    const int column = block * kDecodeBlock + decode_lane().column;
    const bool masks = block * kDecodeBlock > view.num_for_all - kDecodeBlock;
    DSC_UNROLL
    for (int half = 0; half < 2; ++half) {
        float best = rows.max[half];
        DSC_UNROLL
        for (int i = 0; i < 16; ++i) {
            float& score = scores[i / 2 * 4 + 2 * half + i % 2];
            score *= scale_log2;
            if (masks and column + i / 2 * 8 + i % 2 >= view.num_seen[half]) score = kMaskedScore;
            best = max(best, score);
        }
        best = row_max<4>(best);
        float sum = 0;
        DSC_UNROLL
        for (int i = 0; i < 16; ++i) {
            float& score = scores[i / 2 * 4 + 2 * half + i % 2];
            score = exp2_fast(score - best);
            sum += score;
        }
        factor[half] = exp2_fast(rows.max[half] - best);
        rows.max[half] = best;
        rows.sum[half] = rows.sum[half] * factor[half] + sum;
    }
}

// The same for a block whose scores the other warpgroup took: `maxima` [64] are what it found.
__device__ __forceinline__ void follow_maxima(DecodeSoftmax& rows, float (&factor)[2], const float* maxima) {
    DSC_UNROLL
    for (int half = 0; half < 2; ++half) {
        const float best = maxima[decode_lane().row + 8 * half];
        factor[half] = exp2_fast(rows.max[half] - best);
        rows.max[half] = best;
        rows.sum[half] *= factor[half];
    }
}

// A maximum seldom grows after the first blocks.
__device__ __forceinline__ void rescale(DecodeValues& values, const float (&factor)[2]) {
    if (not __any_sync(kAllLanes, factor[0] != 1 or factor[1] != 1)) return;
    DSC_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(DecodeValues) / sizeof(float)); ++i) {
        values[i] *= factor[i / 2 % 2];
    }
}

template <typename T>
__device__ __forceinline__ void round_weights(DecodeWeights& weights, const DecodeScores& scores) {
    DSC_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(DecodeWeights) / 4); ++i) {
        const int at = 4 * (i / 2) + 2 * (i % 2);
        weights[i] = rounded_pair<T>(scores[at], scores[at + 1]);
    }
}

// Into a strip, for the other warpgroup.
__device__ __forceinline__ void keep_weights(char* strip, const DecodeWeights& weights) {
    const DecodeLane lane = decode_lane();
    DSC_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(DecodeWeights) / 4); ++i) {
        *reinterpret_cast<uint32_t*>(strip + weights_byte(lane, i)) = weights[i];
    }
}

// One value for each row of a tile, the same in the four threads that hold it.
__device__ __forceinline__ void keep_rows(float* kept, const float (&values)[2]) {
    if (threadIdx.x % 4 > 0) return;
    kept[decode_lane().row] = values[0];
    kept[decode_lane().row + 8] = values[1];
}

// ---- results ----

// Of one warpgroup: its half of the columns, and of the first one the log-sum-exp. rows.sum holds the sum of
// all weights.
template <typename T>
__device__ __forceinline__ void store_result(const MlaDecodeParams& p, const DecodePiece& piece,
                                             const DecodeTile& tile, DecodeValues& values,
                                             const DecodeSoftmax& rows, int warpgroup) {
    constexpr float kLn2 = 0.6931471805599453f;
    const int64_t first_result = decode::first_result_row(p, piece, tile.part);
    const DecodeLane lane = decode_lane();
    DSC_UNROLL
    for (int half = 0; half < 2; ++half) {
        const float sum = rows.sum[half], inverse = sum == 0 ? 0.0f : 1 / sum;
        const int row = tile.first_row + lane.row + 8 * half;
        const bool is_row = row < decode::num_query_rows(p);
        const int64_t at = first_result + row;
        if (is_row and warpgroup == 0 and lane.column == 0) {
            float* const lse = piece.is_whole ? p.lse : p.partial_lse;
            lse[at] = sum == 0 ? -INFINITY : (rows.max[half] + log2f(sum)) * kLn2;
        }
        DSC_UNROLL
        for (int i = 0; i < static_cast<int>(sizeof(DecodeValues) / sizeof(float)); i += 4) {
            values[i + 2 * half] *= inverse;
            values[i + 2 * half + 1] *= inverse;
        }
        const int64_t first = at * kLatentWidth + warpgroup * kHalfColumns;
        if (not piece.is_whole) {
            DSC_UNROLL
            for (int block = 0; block < kHalfColumns / 8; ++block) {
                const float* const two = values + 4 * block + 2 * half;
                float* const to = p.partial_out + first + 8 * block + lane.column;
                if (is_row) *reinterpret_cast<float2*>(to) = make_float2(two[0], two[1]);
            }
        } else {
            DSC_UNROLL
            for (int block = 0; block < kHalfColumns / 8; block += 4) {
                const Word word = rounded_word<T, 1>(values, block, half);
                T* const to = static_cast<T*>(p.out) + first + 8 * block + 4 * lane.column;
                if (is_row) store_whole(to, word);
            }
        }
    }
}

}  // namespace dsc
