// What a block of the grid does to a tile of 96 keys on sm_90a, apart from copies and products: which tile it
// takes, which blocks of 64 queries see it, where boxes come from, weights P and their gradient dS of a
// thread's scores, where both lie for the products, and where sums go. Nothing here needs a GPU or CuTe, so
// the host executor can play the rest.
//
// Rows come as strips of 64 columns: a line of 128 bytes for each row, swizzled by the copy engine; three or
// two strips of queries and keys, two of values and of dO. P and dS are a strip each, turned: a line for each
// key holds its 64 queries. So both are a right operand with the queries contiguous (dO^T P, Q^T dS) and dS a
// left one with the queries across (dS K).
#pragma once

#include <limits>

#include "attention/mla_prefill_rows.h"
#include "core/lines_sm90.cuh"
#include "core/math.h"
#include "core/tensor_map.h"
#include "core/turned_sm90.cuh"

namespace dsc::prefill_backward_sm90 {

constexpr int kQueries = 64;  // of a block
constexpr int kKeys = 96;     // of a tile
constexpr int kValueWidth = 128, kValueStrips = kValueWidth / kLineElements;
constexpr int kStages = 2;  // blocks of queries, and of dO, at a time
constexpr int kWarpgroups = 2;
constexpr int kOwnKeys = kKeys / kWarpgroups;  // whose scores, dK and dV a warpgroup has
constexpr int kConsumers = kWarpgroups * kWarpgroup;
// Warpgroups that multiply, then one that loads and adds; each divides its registers anew.
constexpr int kThreads = kConsumers + kWarpgroup;
constexpr int kLoadRegisters = 32, kMultiplyRegisters = 240;
static_assert(kWarpgroup * (kLoadRegisters + kWarpgroups * kMultiplyRegisters) <= 65536);
constexpr int kQueryStripBytes = kQueries * kLineBytes, kKeyStripBytes = kKeys * kLineBytes;
constexpr int kStaticBytes = 1024;  // barriers, up to the strips

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.4426950408889634f;

// Types and sizes of a kernel, and where things lie in shared memory: keys, values, the queries of all
// stages, their dO, P, dS, and a block's sums of dQ.
template <typename T_, int kWidth_>
struct Shape {
    using T = T_;
    static constexpr int kWidth = kWidth_, kStrips = kWidth / kLineElements;
    static constexpr int kKeyBytes = kStrips * kKeyStripBytes, kValueBytes = kValueStrips * kKeyStripBytes;
    static constexpr int kQueryBytes = kStrips * kQueryStripBytes;
    static constexpr int kGradOutBytes = kValueStrips * kQueryStripBytes;
    static constexpr int kFirstValue = kKeyBytes, kFirstQuery = kFirstValue + kValueBytes;
    static constexpr int kFirstGradOut = kFirstQuery + kStages * kQueryBytes;
    static constexpr int kFirstWeight = kFirstGradOut + kStages * kGradOutBytes;
    static constexpr int kFirstGradScore = kFirstWeight + kKeyStripBytes;
    static constexpr int kFirstSum = kFirstGradScore + kKeyStripBytes;
    static constexpr int kSumBytes = kSumRows * kWidth * static_cast<int>(sizeof(float));  // of 16 queries
    static constexpr int kSharedBytes = kFirstSum + kQueries / kSumRows * kSumBytes;
    static_assert(kWidth % kLineElements == 0 and kSharedBytes + kStaticBytes <= 227 * 1024);
};

// How a kernel goes about it.
struct Options {
    int num_stages;  // 1 or 2
};

inline Options options_of(PrefillArch arch) {
    return {.num_stages = arch == PrefillArch::kSm90OneStage ? 1 : kStages};
}

// ---- a tile, and the queries that see it ----

struct Tile {
    bool is_there;
    PrefillSequence sequence;
    int sequence_idx, first_key;  // of the sequence
    int key_head;
};

constexpr PrefillTiling tiling_of(bool causal) {
    return {.side = PrefillSide::kKeys, .tile_rows = kKeys, .block_rows = kQueries, .causal = causal};
}

// `index`: as prefill_work counts.
__device__ __forceinline__ Tile find_tile(const MlaPrefillBackwardParams& p, int index) {
    const int num_tiles = p.plan[0];
    if (index >= int64_t{num_tiles} * p.num_key_heads) return {};
    const PrefillWork work = prefill_work(index, num_tiles, p.num_key_heads);
    const int2 planned = reinterpret_cast<const int2*>(p.plan)[1 + work.tile];
    return {
        .is_there = true,
        .sequence = prefill_sequence(p.cu_seqlens_q, p.cu_seqlens_k, planned.x, p.num_queries, p.num_keys),
        .sequence_idx = planned.x,
        .first_key = planned.y * kKeys,
        .key_head = work.head};
}

// Keys of the sequence in the tile and behind it.
__device__ __forceinline__ int num_keys_of(const Tile& tile) {
    return tile.sequence.num_keys - tile.first_key;
}

// Blocks of one query head after the other. They begin with the first 16 queries that see a key of the tile:
// sums of dQ are kept by 16.
struct Walk {
    int head, end_head;
    int first_query, begin, end;  // of the block, and of a head's blocks, in the sequence

    __device__ __forceinline__ bool has_block() const { return head < end_head and begin < end; }
    __device__ __forceinline__ int num_rows() const { return end - first_query; }  // in it and behind it
    __device__ __forceinline__ void advance() {
        first_query += kQueries;
        if (first_query < end) return;
        first_query = begin;
        ++head;
    }
};

__device__ __forceinline__ Walk walk_of(const MlaPrefillBackwardParams& p, const Tile& tile) {
    const int group = p.num_heads / p.num_key_heads;
    const int begin = tile.sequence.first_seeing(tile.first_key, p.causal) / kSumRows * kSumRows;
    return {tile.key_head * group, (tile.key_head + 1) * group, begin, begin, tile.sequence.num_queries};
}

// ---- copies ----

// Rows of heads, sizes as [width, heads, T], a box one head's strip of so many rows. Rows behind the last one
// read as zeros, and those behind a sequence as the next one's. A step along a dimension of one may be
// anything, and is not the map's.
inline TensorMapSpec rows_map(const char* name, const HeadRows& rows, FloatType type,
                              const std::array<int64_t, 3>& sizes, int box_rows) {
    const int64_t head_stride = sizes[1] > 1 ? rows.head_stride : sizes[0];
    const int64_t token_stride = sizes[2] > 1 ? rows.token_stride : sizes[1] * head_stride;
    return map_spec<3>("mla_prefill backward", name, rows.data, type, sizes, {head_stride, token_stride},
                       {kLineElements, 1, box_rows});
}

struct MapSpecs {
    TensorMapSpec keys, values, queries, grad_out;
};

// Where there are no queries at all, nothing is loaded: any map will do.
inline MapSpecs map_specs(const MlaPrefillBackwardParams& p) {
    const TensorMapSpec keys = rows_map("k", p.k, p.dtype, {p.width, p.num_key_heads, p.num_keys}, kKeys);
    const TensorMapSpec values =
        rows_map("v", p.v, p.dtype, {p.value_width, p.num_key_heads, p.num_keys}, kKeys);
    if (p.num_queries == 0) return {keys, values, keys, values};
    return {.keys = keys,
            .values = values,
            .queries = rows_map("q", p.q, p.dtype, {p.width, p.num_heads, p.num_queries}, kQueries),
            .grad_out = rows_map("grad_out", p.grad_out, p.dtype, {p.value_width, p.num_heads, p.num_queries},
                                 kQueries)};
}

// Of keys and of values.
__host__ __device__ constexpr BoxPlace key_place(const Tile& tile, int strip) {
    return {strip * kLineElements, tile.key_head, tile.sequence.first_key + tile.first_key};
}

// Of queries and of dO.
__host__ __device__ constexpr BoxPlace query_place(const Tile& tile, const Walk& walk, int strip) {
    return {strip * kLineElements, walk.head, tile.sequence.first_query + walk.first_query};
}

// ---- a thread's part ----

// A thread's sums of a product of 64 rows, its warpgroup's 48 keys: acc[4 * j + 2 * half + i] is row `half`
// and column i of the j-th block of eight keys. Rows of scores are queries; of dV and dK, columns of values
// and keys.
using Sums = float[4 * (kOwnKeys / 8)];

// The first of a thread's two rows of 64, the second is eight below; and its first key in each block of
// eight, of the tile.
struct Lane {
    int row, key;
};

__host__ __device__ constexpr Lane lane_of(int thread) {
    return {.row = thread % kWarpgroup / kWarpSize * 16 + thread % kWarpSize / 4,
            .key = thread / kWarpgroup * kOwnKeys + thread % 4 * 2};
}

__device__ __forceinline__ Lane own_lane() {
    return lane_of(static_cast<int>(threadIdx.x));
}

// Of a thread's two queries: log2(e) * lse, and delta. Those behind the sequence have no weights at all.
struct Rows {
    float lse[2], delta[2];
};

__device__ __forceinline__ Rows load_rows(const MlaPrefillBackwardParams& p, const Tile& tile,
                                          const Walk& walk) {
    const int64_t first = walk.head * p.num_queries + tile.sequence.first_query + walk.first_query;
    const int num_rows = walk.num_rows();
    Rows rows;
    DSC_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int row = own_lane().row + 8 * half;
        const float* const values = p.row_values + first + row;
        rows.lse[half] = row < num_rows ? values[0] : kInfinity;
        rows.delta[half] = row < num_rows ? values[p.num_heads * p.num_queries] : 0.0f;
    }
    return rows;
}

// Scores of keys that a query does not see, or that lie behind the sequence, become -inf.
__device__ __forceinline__ void hide_scores(Sums& scores, const Tile& tile, const Walk& walk, bool causal) {
    const int num_keys = num_keys_of(tile);
    const int of_first = causal ? tile.sequence.num_seen(walk.first_query, true) - tile.first_key : num_keys;
    if (min(num_keys, of_first) >= kKeys) return;
    const Lane lane = own_lane();
    DSC_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int num_seen = min(num_keys, of_first + (causal ? lane.row + 8 * half : 0)) - lane.key;
        DSC_UNROLL
        for (int i = 0; i < kOwnKeys / 4; ++i) {
            if (i / 2 * 8 + i % 2 >= num_seen) scores[i / 2 * 4 + 2 * half + i % 2] = -kInfinity;
        }
    }
}

// Scores into weights P.
__device__ __forceinline__ void weigh_scores(Sums& scores, const Rows& rows, float factor) {
    DSC_UNROLL
    for (int i = 0; i < 4 * (kOwnKeys / 8); ++i) {
        scores[i] = exp2_fast(scores[i] * factor - rows.lse[i / 2 % 2]);
    }
}

// dP into dS.
__device__ __forceinline__ void make_grad_scores(Sums& grads, const Sums& weights, const Rows& rows) {
    DSC_UNROLL
    for (int i = 0; i < 4 * (kOwnKeys / 8); ++i) grads[i] = weights[i] * (grads[i] - rows.delta[i / 2 % 2]);
}

// The sums of 64 rows, rounded, into a strip of the keys' lines: row r is element r of each line.
template <typename T>
__device__ __forceinline__ void keep_turned(char* strip, const Sums& sums, float factor) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
    // Lane l tells where row l % 8 of block l / 8 goes: two blocks of eight rows, for two of eight keys.
    const int key = thread / kWarpgroup * kOwnKeys + lane / 16 * 8 + lane % 8;
    const int row = thread % kWarpgroup / kWarpSize * 16 + lane / 8 % 2 * 8;
    const int at = swizzled(key * kLineBytes + 2 * row);
    DSC_UNROLL
    for (int j = 0; j < kOwnKeys / 8; j += 2) {
        uint32_t words[4];
        DSC_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int first = 4 * j + 2 * i;
            words[i] = rounded_pair<T>(sums[first] * factor, sums[first + 1] * factor);
        }
        store_turned(strip, at + j * 8 * kLineBytes, words);
    }
}

// ---- sums of dQ ----

// The strips of dQ that a warpgroup multiplies: one of two; of three, two in every second block.
struct OwnStrips {
    int first, count;
};

__host__ __device__ constexpr OwnStrips own_strips(int num_strips, int warpgroup, int block) {
    if (num_strips == 2) return {warpgroup, 1};
    const int border = 1 + (block + 1) % 2;
    return warpgroup == 0 ? OwnStrips{0, border} : OwnStrips{border, 3 - border};
}

// A warpgroup's kCount strips of a block's dQ, to where the copy engine takes them from: 16 queries after the
// other, as they lie in sums_q.
template <int kWidth, int kCount>
__device__ __forceinline__ void keep_sums(char* sums, const float (&acc)[32 * kCount], int first_strip) {
    const int thread = static_cast<int>(threadIdx.x);
    float* const rows = reinterpret_cast<float*>(sums) + thread % kWarpgroup / kWarpSize * kSumRows * kWidth;
    DSC_UNROLL
    for (int i = 0; i < 32 * kCount; ++i) {
        rows[sum_place(first_strip * 4 + i / 8, i % 8, thread % kWarpSize)] = acc[i];
    }
}

// One thread starts to add a block's sums to those in global memory. Of rows behind the sequence only those
// go along that lie in its last 16: these are its own, and nobody reads them.
template <int kWidth>
__device__ __forceinline__ void start_adding_sums(const MlaPrefillBackwardParams& p, const Tile& tile,
                                                  const Walk& walk, const char* sums) {
    constexpr int kElements = kSumRows * kWidth;
    const int64_t first_block = first_sum_block(tile.sequence.first_query, tile.sequence_idx);
    for (int row = 0; row < min(kQueries, walk.num_rows()); row += kSumRows) {
        const int64_t block = first_block + (walk.first_query + row) / kSumRows;
        start_adding(p.sums_q + (block * p.num_heads + walk.head) * kElements,
                     reinterpret_cast<const float*>(sums) + row * kWidth,
                     kElements * static_cast<int>(sizeof(float)));
    }
}

// ---- results ----

// A warpgroup's keys of a gradient [.., heads, width], out of their lines; `rows` is the tile's first, of
// which num_rows exist.
template <int kStrips, typename T>
__device__ __forceinline__ void store_lines(T* rows, int num_heads, int num_rows, const char* strips) {
    constexpr int kWords = kStrips * kLineBytes / kWordBytes;  // of a row
    const int thread = static_cast<int>(threadIdx.x), first = thread / kWarpgroup * kOwnKeys;
    DSC_UNROLL
    for (int i = 0; i < kOwnKeys * kWords; i += kWarpgroup) {
        const int line = first + (i + thread % kWarpgroup) / kWords;
        const int byte = (i + thread % kWarpgroup) % kWords * kWordBytes;
        const char* const strip = strips + byte / kLineBytes * kKeyStripBytes;
        const Word& word =
            *reinterpret_cast<const Word*>(strip + swizzled(line * kLineBytes + byte % kLineBytes));
        if (line >= num_rows) continue;
        store_whole(rows + int64_t{line} * num_heads * kStrips * kLineElements + byte / 2, word);
    }
}

// dK and dV, which lie in the places of K and V.
template <typename S>
__device__ __forceinline__ void store_gradients(const MlaPrefillBackwardParams& p, const Tile& tile,
                                                const char* memory) {
    using T = typename S::T;
    const int64_t first_key = int64_t{tile.sequence.first_key} + tile.first_key;
    const int64_t first = first_key * p.num_key_heads + tile.key_head;
    store_lines<S::kStrips>(static_cast<T*>(p.grad_k) + first * S::kWidth, p.num_key_heads, num_keys_of(tile),
                            memory);
    store_lines<kValueStrips>(static_cast<T*>(p.grad_v) + first * kValueWidth, p.num_key_heads,
                              num_keys_of(tile), memory + S::kFirstValue);
}

}  // namespace dsc::prefill_backward_sm90
