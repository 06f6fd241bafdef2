// What a block of the grid does to a tile of 128 queries on sm_90a, apart from copies and products: which
// tile it takes, where boxes come from, which scores are hidden, the softmax of a thread's scores, what
// becomes of the sums. Nothing here needs a GPU or CuTe, so the host executor can play the rest.
//
// Rows come as strips of 64 columns: a line of 128 bytes for each of 128 rows, swizzled by the copy engine;
// three or two strips of queries and keys, two of values.
#pragma once

#include <limits>

#include "attention/mla_prefill.h"
#include "core/lines_sm90.cuh"
#include "core/math.h"
#include "core/quad_words.cuh"
#include "core/tensor_map.h"

namespace dsc::prefill_sm90 {

constexpr int kRows = 128;  // queries of a tile
constexpr int kKeys = 128;  // of a block
constexpr int kValueWidth = 128;
constexpr int kStages = 2;  // blocks of keys, and of values, at a time
constexpr int kWarpgroups = 2;
constexpr int kWarpgroupRows = kRows / kWarpgroups;
constexpr int kConsumers = kWarpgroups * kWarpgroup;
// Warpgroups that multiply, then one that loads; each divides its registers anew.
constexpr int kThreads = kConsumers + kWarpgroup;
constexpr int kLoadRegisters = 32, kMultiplyRegisters = 240;
static_assert(kWarpgroup * (kLoadRegisters + kWarpgroups * kMultiplyRegisters) <= 65536);
constexpr int kStripBytes = kRows * kLineBytes;  // of queries, keys and values alike
static_assert(kRows == kKeys);
constexpr int kStaticBytes = 1024;  // barriers and what the loader tells, up to the strips

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLag = 8.0f;  // weights up to 2^8 are exact enough in float16, too

// Types and sizes of a kernel. In shared memory: queries, then the keys of all stages, then their values.
template <typename T_, int kWidth_>
struct Shape {
    using T = T_;
    static constexpr int kWidth = kWidth_;
    static constexpr int kKeyStrips = kWidth / kLineElements, kValueStrips = kValueWidth / kLineElements;
    static constexpr int kQueryBytes = kKeyStrips * kStripBytes;
    static constexpr int kKeyBytes = kKeyStrips * kStripBytes, kValueBytes = kValueStrips * kStripBytes;
    static constexpr int kFirstKey = kQueryBytes, kFirstValue = kFirstKey + kStages * kKeyBytes;
    static constexpr int kSharedBytes = kFirstValue + kStages * kValueBytes;
    static_assert(kWidth % kLineElements == 0 and kSharedBytes + kStaticBytes <= 227 * 1024);
};

// How a kernel goes about it; the steps of its bring-up are in docs/mla_prefill_sm90.md.
struct Options {
    int num_stages;     // 1 or 2
    bool keeps_blocks;  // of the grid: a block takes tile after tile
    bool takes_turns;   // the warpgroups issue their products one after the other
};

inline Options options_of(PrefillArch arch) {
    return {.num_stages = arch == PrefillArch::kSm90OneStage ? 1 : kStages,
            .keeps_blocks = arch == PrefillArch::kSm90WithoutTurns or arch == PrefillArch::kSm90,
            .takes_turns = arch == PrefillArch::kSm90};
}

// ---- a tile ----

// What a thread needs to know of a tile. The loader finds it and tells the others.
struct Tile {
    int first_query, num_rows;  // row 0, and how many rows of the sequence follow; 0: there is no tile
    int head, key_head;
    int first_key, num_keys;  // of the sequence
    int num_seen;             // by row 0: the first so many keys
    int num_blocks;           // of keys that some row sees
};

__host__ __device__ constexpr PrefillTiling tiling_of(bool causal) {
    return {.side = PrefillSide::kQueries, .tile_rows = kRows, .block_rows = kKeys, .causal = causal};
}

// Tiles times heads.
inline int64_t most_works(const MlaPrefillParams& p) {
    return most_prefill_tiles(p.num_queries, p.num_sequences, kRows) * p.num_heads;
}

// `index`: as prefill_work counts.
__device__ __forceinline__ Tile find_tile(const MlaPrefillParams& p, int index) {
    const int num_tiles = p.plan[0];
    if (index >= num_tiles * p.num_heads) return {};
    const PrefillWork work = prefill_work(index, num_tiles, p.num_heads);
    const int2 planned = reinterpret_cast<const int2*>(p.plan)[1 + work.tile];
    const PrefillSequence sequence =
        prefill_sequence(p.cu_seqlens_q, p.cu_seqlens_k, planned.x, p.num_queries, p.num_keys);
    const int first_row = planned.y * kRows;
    return {.first_query = sequence.first_query + first_row,
            .num_rows = sequence.num_queries - first_row,
            .head = work.head,
            .key_head = work.head / (p.num_heads / p.num_key_heads),
            .first_key = sequence.first_key,
            .num_keys = sequence.num_keys,
            .num_seen = sequence.num_seen(first_row, p.causal),
            .num_blocks = end_key_block(sequence, planned.y, tiling_of(p.causal))};
}

// The tile behind those that all blocks of the grid begin with: whoever is done first takes the next one.
// The plan's second number, 0 in the beginning, counts how many were taken.
__device__ __forceinline__ int next_index(const MlaPrefillParams& p) {
    return static_cast<int>(gridDim.x) + atomicAdd(p.plan + 1, 1);
}

// Rows of values in a tile's last block of keys, the first that it takes; those behind them are another
// sequence's, or nobody's.
__device__ __forceinline__ int num_values_of_last(const Tile& tile) {
    return tile.num_keys - (tile.num_blocks - 1) * kKeys;
}

// ---- copies ----

// Rows of heads, [T, heads, width], a box one head's strip of 128 rows. Rows behind the last one read as
// zeros, and those behind a sequence as the next one's. A step along a dimension of one may be anything, and
// is not the map's.
inline TensorMapSpec rows_map(const char* name, const HeadRows& rows, FloatType type, int width,
                              int num_heads, int64_t num_rows) {
    const int64_t head_stride = num_heads > 1 ? rows.head_stride : width;
    const int64_t token_stride = num_rows > 1 ? rows.token_stride : num_heads * head_stride;
    return map_spec<3>("mla_prefill", name, rows.data, type, {width, num_heads, num_rows},
                       {head_stride, token_stride}, {kLineElements, 1, kRows});
}

struct MapSpecs {
    TensorMapSpec queries, keys, values;
};

// Where there are no keys at all, nothing is loaded: any map will do.
inline MapSpecs map_specs(const MlaPrefillParams& p) {
    const TensorMapSpec queries = rows_map("q", p.q, p.dtype, p.width, p.num_heads, p.num_queries);
    if (p.num_keys == 0) return {queries, queries, queries};
    return {.queries = queries,
            .keys = rows_map("k", p.k, p.dtype, p.width, p.num_key_heads, p.num_keys),
            .values = rows_map("v", p.v, p.dtype, p.value_width, p.num_key_heads, p.num_keys)};
}

__host__ __device__ constexpr BoxPlace query_place(const Tile& tile, int strip) {
    return {strip * kLineElements, tile.head, tile.first_query};
}

// Of keys and of values.
__host__ __device__ constexpr BoxPlace key_place(const Tile& tile, int block, int strip) {
    return {strip * kLineElements, tile.key_head, tile.first_key + block * kKeys};
}

// ---- a thread's part ----

// A thread's sums: acc[4 * j + 2 * half + i] is row `half` and column i of the j-th block of eight columns.
using Scores = float[4 * (kKeys / 8)];
using Values = float[4 * (kValueWidth / 8)];
// Its weights, two in a word, as wgmma takes them from registers: word 4 * k + 2 * j + half of step k is row
// `half` of block 2 * k + j.
using Weights = uint32_t[2 * (kKeys / 8)];

// The first of a thread's two rows in its tile, the second is eight below; and its first column in each block
// of eight.
struct Lane {
    int row, column;
};

__host__ __device__ constexpr Lane lane_of(int thread) {
    return {.row = 16 * (thread / kWarpSize) + thread % kWarpSize / 4, .column = 2 * (thread % 4)};
}

__device__ __forceinline__ Lane own_lane() {
    return lane_of(static_cast<int>(threadIdx.x));
}

// How many keys the thread's rows see, and how many all rows of its warpgroup do.
struct View {
    int num_seen[2];
    int num_for_all;
};

// Rows behind the sequence see no more than its last one.
__device__ __forceinline__ View view_of(const Tile& tile, bool causal) {
    const int row = own_lane().row, first = row / kWarpgroupRows * kWarpgroupRows;
    const auto seen_by = [&](int i) { return min(tile.num_keys, tile.num_seen + (causal ? i : 0)); };
    return {.num_seen = {seen_by(row), seen_by(row + 8)}, .num_for_all = seen_by(first)};
}

// ---- softmax ----

// What a thread knows of its rows: the reference of their weights, and its own columns' share of their sums.
// Weights are powers of two of a score's distance to the reference, the largest score of the row at some time
// before: sums are scaled anew only where a block's largest score is 2^kLag times above it.
struct RowStates {
    float reference[2] = {-kInfinity, -kInfinity};
    float sum[2] = {0, 0};
};

// Scores of keys that a row does not see become -inf.
__device__ __forceinline__ void hide_scores(Scores& scores, const View& view, int block) {
    const int first_key = block * kKeys;
    if (first_key + kKeys <= view.num_for_all) return;
    DSC_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int num_own = view.num_seen[half] - first_key - own_lane().column;
        DSC_UNROLL
        for (int i = 0; i < kKeys / 4; ++i) {
            if (i / 2 * 8 + i % 2 >= num_own) scores[i / 2 * 4 + 2 * half + i % 2] = -kInfinity;
        }
    }
}

// Moves the references that lag too far behind the block's largest scores; `scale` is what older sums must be
// multiplied by. Whether any of the warp moved.
__device__ __forceinline__ bool move_references(const Scores& scores, float factor, RowStates& rows,
                                                float (&scale)[2]) {
    float largest[2];
    bool moves = false;
    DSC_UNROLL
    for (int half = 0; half < 2; ++half) {
        largest[half] = -kInfinity;
        DSC_UNROLL
        for (int i = 0; i < kKeys / 4; ++i) {
            largest[half] = max(largest[half], scores[i / 2 * 4 + 2 * half + i % 2]);
        }
        largest[half] = row_max<4>(largest[half]);
        // Not where both are -inf: no comparison with NaN is true.
        const bool lags = (largest[half] - rows.reference[half]) * factor > kLag;
        if (not lags) largest[half] = rows.reference[half];
        moves = moves or lags;
    }
    if (not __any_sync(kAllLanes, moves)) return false;
    DSC_UNROLL
    for (int half = 0; half < 2; ++half) {
        const bool stays = largest[half] == rows.reference[half];
        scale[half] = stays ? 1.0f : exp2_fast((rows.reference[half] - largest[half]) * factor);
        rows.reference[half] = largest[half];
        rows.sum[half] *= scale[half];
    }
    return true;
}

// Scores into weights: 2^(factor * (score - reference)).
__device__ __forceinline__ void weigh_scores(Scores& scores, float factor, RowStates& rows) {
    DSC_UNROLL
    for (int half = 0; half < 2; ++half) {
        const float reference = rows.reference[half] == -kInfinity ? 0.0f : rows.reference[half] * factor;
        DSC_UNROLL
        for (int i = 0; i < kKeys / 4; ++i) {
            float& score = scores[i / 2 * 4 + 2 * half + i % 2];
            score = exp2_fast(score * factor - reference);
            rows.sum[half] += score;
        }
    }
}

template <typename T>
__device__ __forceinline__ void round_weights(Weights& weights, const Scores& scores) {
    DSC_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(Weights) / sizeof(uint32_t)); ++i) {
        weights[i] = rounded_pair<T>(scores[2 * i], scores[2 * i + 1]);
    }
}

__device__ __forceinline__ void rescale(Values& values, const float (&scale)[2]) {
    DSC_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(Values) / sizeof(float)); ++i) values[i] *= scale[i / 2 % 2];
}

// ---- results ----

// Of the thread's rows that exist: the output and the log-sum-exp.
template <typename T>
__device__ __forceinline__ void store_rows(const MlaPrefillParams& p, const Tile& tile, const RowStates& rows,
                                           Values& values) {
    const Lane lane = own_lane();
    DSC_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int row = lane.row + 8 * half;
        const bool is_there = row < tile.num_rows;
        const int64_t at = (int64_t{tile.first_query} + row) * p.num_heads + tile.head;
        const float sum = row_sum<4>(rows.sum[half]), inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        if (is_there and lane.column == 0) {
            p.lse[at] = sum == 0.0f ? -kInfinity : rows.reference[half] * p.scale + logf(sum);
        }
        DSC_UNROLL
        for (int i = 0; i < kValueWidth / 4; ++i) values[i / 2 * 4 + 2 * half + i % 2] *= inverse;
        DSC_UNROLL
        for (int block = 0; block < kValueWidth / 8; block += 4) {
            const Word word = rounded_word<T, 1>(values, block, half);
            T* const to = static_cast<T*>(p.out) + at * kValueWidth + 8 * block + 4 * lane.column;
            if (is_there) store_whole(to, word);
        }
    }
}

}  // namespace dsc::prefill_sm90
