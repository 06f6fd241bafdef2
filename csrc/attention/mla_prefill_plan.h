// How prefill attention is dealt out: tiles of rows of one sequence, those with the most work first, so that
// what runs last is short. Pure functions of cu_seqlens, the same on the host and in the plan kernel
// (mla_prefill_plan.cu). Forward and grad_q take tiles of queries, grad_k and grad_v tiles of keys.
//
// A tile costs the blocks of the other side that it meets: those that its queries see, or that see its keys.
// Costs fall into kPrefillClasses classes, exact below kPrefillExactCosts blocks and within 1 / 16 above; a
// plan has the classes in descending order, within a class sequences and then blocks in ascending order.
// A tile without work is in it too: its zeros must be written.
//
// Whatever cu_seqlens hold, rows are rows that exist: an end is taken as 0 to the number of rows, and as no
// less than the sequence's begin. Where sequences overlap, which they must not, a plan that is full leaves
// out the sequences behind.
//
// A plan is int32 [2 * (1 + most tiles) + B]: the number of tiles and 0, from which on the forward kernel of
// sm_90a counts those that blocks of its grid have taken; then (sequence, block) of each tile,
// up to ceil(T / rows of a tile) + B; behind these B numbers that the plan kernel works with.
#pragma once

#include <array>
#include <cstdint>
#include <limits>

#include "core/check.h"
#include "core/host_device.h"

namespace dsc {

constexpr int kPrefillFewestTileRows = 64;  // of any kernel: what scratch is allocated for
constexpr int kPrefillClasses = 512, kPrefillExactCosts = 256, kPrefillClassesOfOctave = 16;
constexpr int kPrefillHeadGroup = 16;  // heads of a tile that run side by side

// ---- sequences ----

// Rows of one sequence, and which of them see each other.
struct PrefillSequence {
    int first_query, num_queries, first_key, num_keys;

    // Keys that query i of the sequence sees: the first so many, none where <= 0.
    DSC_HOST_DEVICE constexpr int num_seen(int query, bool causal) const {
        return causal ? num_keys - num_queries + query + 1 : num_keys;
    }
    // The first query that sees key j, and all behind it do; num_queries at the most.
    DSC_HOST_DEVICE constexpr int first_seeing(int key, bool causal) const {
        if (not causal or key + 1 <= num_keys - num_queries) return 0;
        const int query = key - (num_keys - num_queries);
        return query < num_queries ? query : num_queries;
    }
};

// An end that cu_seqlens hold, at least `least`, at most num_rows.
DSC_HOST_DEVICE constexpr int prefill_end(int32_t end, int least, int64_t num_rows) {
    const int64_t bounded = end < num_rows ? end : num_rows;
    return bounded > least ? static_cast<int>(bounded) : least;
}

template <typename Ends>
DSC_HOST_DEVICE constexpr PrefillSequence prefill_sequence(const Ends& cu_seqlens_q, const Ends& cu_seqlens_k,
                                                           int sequence, int64_t num_queries,
                                                           int64_t num_keys) {
    const int query = prefill_end(cu_seqlens_q[sequence], 0, num_queries);
    const int key = prefill_end(cu_seqlens_k[sequence], 0, num_keys);
    return {.first_query = query,
            .num_queries = prefill_end(cu_seqlens_q[sequence + 1], query, num_queries) - query,
            .first_key = key,
            .num_keys = prefill_end(cu_seqlens_k[sequence + 1], key, num_keys) - key};
}

// ---- tiles ----

enum class PrefillSide { kQueries, kKeys };

// Which tiles a kernel takes.
struct PrefillTiling {
    PrefillSide side;  // whose rows a tile has
    int tile_rows;     // of it
    int block_rows;    // of the other side, in the blocks that it is multiplied with
    bool causal;
};

// Without an overflow for up to 2^31 - 1 rows.
DSC_HOST_DEVICE constexpr int num_prefill_blocks(int num_rows, int block_rows) {
    return num_rows / block_rows + (num_rows % block_rows != 0 ? 1 : 0);
}

DSC_HOST_DEVICE constexpr int num_prefill_tiles(const PrefillSequence& sequence,
                                                const PrefillTiling& tiling) {
    const bool has_queries = tiling.side == PrefillSide::kQueries;
    return num_prefill_blocks(has_queries ? sequence.num_queries : sequence.num_keys, tiling.tile_rows);
}

// Blocks of keys 0 up to the result meet a tile of queries.
DSC_HOST_DEVICE constexpr int end_key_block(const PrefillSequence& sequence, int tile,
                                            const PrefillTiling& tiling) {
    const int first = tile * tiling.tile_rows, left = sequence.num_queries - first;
    const int last = first + (left < tiling.tile_rows ? left : tiling.tile_rows) - 1;
    const int num_seen = sequence.num_seen(last, tiling.causal);
    return num_seen > 0 ? num_prefill_blocks(num_seen, tiling.block_rows) : 0;
}

// Blocks of queries from the result on meet a tile of keys.
DSC_HOST_DEVICE constexpr int first_query_block(const PrefillSequence& sequence, int tile,
                                                const PrefillTiling& tiling) {
    return sequence.first_seeing(tile * tiling.tile_rows, tiling.causal) / tiling.block_rows;
}

DSC_HOST_DEVICE constexpr int prefill_cost(const PrefillSequence& sequence, int tile,
                                           const PrefillTiling& tiling) {
    if (tiling.side == PrefillSide::kQueries) return end_key_block(sequence, tile, tiling);
    return num_prefill_blocks(sequence.num_queries, tiling.block_rows) -
           first_query_block(sequence, tile, tiling);
}

// Ascends with the cost.
DSC_HOST_DEVICE constexpr int prefill_class(int cost) {
    if (cost < kPrefillExactCosts) return cost;
    int octave = 0;  // cost is 256 to 511 times 2^octave
    while (cost >> octave >= 2 * kPrefillExactCosts) ++octave;
    const int step = (cost >> octave) / (kPrefillExactCosts / kPrefillClassesOfOctave);  // 16 to 31
    const int all = kPrefillExactCosts + (octave - 1) * kPrefillClassesOfOctave + step;
    return all < kPrefillClasses ? all : kPrefillClasses - 1;
}

// ---- a plan ----

struct PrefillTile {
    int sequence, block;

    DSC_HOST_DEVICE constexpr bool operator==(const PrefillTile& other) const {
        return sequence == other.sequence and block == other.block;
    }
};

constexpr int64_t most_prefill_tiles(int64_t num_rows, int num_sequences, int tile_rows) {
    return (num_rows + tile_rows - 1) / tile_rows + num_sequences;
}

// Elements of a plan for tiles of any size that kernels have.
constexpr int64_t prefill_plan_size(int64_t num_rows, int num_sequences) {
    return 2 * (1 + most_prefill_tiles(num_rows, num_sequences, kPrefillFewestTileRows)) + num_sequences;
}

// What block `index` of a grid of tiles times heads does: heads of a tile next to each other, up to
// kPrefillHeadGroup, whose tiles all come before the next heads'. So the blocks that run at once share few
// heads' rows through L2, and the last ones are still those with the least work.
struct PrefillWork {
    int tile, head;
};

DSC_HOST_DEVICE constexpr PrefillWork prefill_work(int index, int num_tiles, int num_heads) {
    const int group_size = num_heads < kPrefillHeadGroup ? num_heads : kPrefillHeadGroup;
    const int first_head = index / (num_tiles * group_size) * group_size;
    const int rest = index - first_head * num_tiles, left = num_heads - first_head;
    const int num_here = left < group_size ? left : group_size;
    return {rest / num_here, first_head + rest % num_here};
}

// The tiles of a plan, in order: tiles[i] is assigned to, for i up to the result. `most` bounds it.
template <typename Ends, typename Tiles>
int fill_prefill_plan(const Ends& cu_seqlens_q, const Ends& cu_seqlens_k, int num_sequences,
                      int64_t num_queries, int64_t num_keys, const PrefillTiling& tiling, int64_t most,
                      Tiles& tiles) {
    const auto visit_tiles = [&](const auto& visit) {
        int64_t num_tiles = 0;
        for (int b = 0; b < num_sequences; ++b) {
            const PrefillSequence sequence =
                prefill_sequence(cu_seqlens_q, cu_seqlens_k, b, num_queries, num_keys);
            const int num_here = num_prefill_tiles(sequence, tiling);
            for (int j = 0; j < num_here and num_tiles < most; ++j, ++num_tiles) {
                visit(PrefillTile{b, j}, prefill_class(prefill_cost(sequence, j, tiling)));
            }
        }
        return static_cast<int>(num_tiles);
    };
    std::array<int, kPrefillClasses> place{};  // of the next tile of each class
    visit_tiles([&](const PrefillTile&, int cost_class) { ++place[cost_class]; });
    int before = 0;
    for (int i = kPrefillClasses - 1; i >= 0; --i) {
        const int num_here = place[i];
        place[i] = before;
        before += num_here;
    }
    return visit_tiles([&](const PrefillTile& tile, int cost_class) { tiles[place[cost_class]++] = tile; });
}

// ---- the resources of the kernel of sm_80 ----

// 64 keys in a block share the queries' way through shared memory twice as often as 32, and take more of it;
// two blocks of the grid on an SM, of which one multiplies while the other waits or weighs, come first.
constexpr int kPrefillSm80Threads = 128;
constexpr int kPrefillSm80TileRows = 128;
constexpr int kPrefillSm80BlocksPerSm = 2;
constexpr int kPrefillSm80FixedBytes =
    1024 + 128;  // that the system takes for a block of the grid, and its tile

// Queries, two blocks of keys, one of values.
constexpr int prefill_sm80_bytes(int width, int value_width, int num_keys) {
    return 2 * (kPrefillSm80TileRows * width + 2 * num_keys * width + num_keys * value_width);
}

struct PrefillSm80Plan {
    int num_keys;  // of a block, 32 or 64
    int shared_bytes;
};

inline PrefillSm80Plan plan_prefill_sm80(int width, int value_width, int shared_per_sm,
                                         int most_shared_bytes) {
    const int wide = prefill_sm80_bytes(width, value_width, 64);
    const int narrow = prefill_sm80_bytes(width, value_width, 32);
    const bool has_room = kPrefillSm80BlocksPerSm * (wide + kPrefillSm80FixedBytes) <= shared_per_sm;
    DSC_CHECK(narrow <= most_shared_bytes, "mla_prefill: a block needs ", narrow,
              " bytes of shared memory, the device has ", most_shared_bytes);
    return has_room ? PrefillSm80Plan{64, wide} : PrefillSm80Plan{32, narrow};
}

}  // namespace dsc
