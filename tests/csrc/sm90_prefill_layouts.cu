// Where things lie in prefill attention on sm_90a, without a GPU: the copy engine is played on the CPU from
// the kernel's maps and boxes, and the strips are read back through CuTe's layouts, from which wgmma's
// descriptors are made; likewise the weights in registers, and the sums. Prints what is wrong, and how much
// was compared. An argument plants a wrong swizzle.
#include <vector>

#include "attention/mla_prefill_sm90.cuh"
#include "played_copies.h"
#include "played_layouts.h"

namespace dsc::prefill_sm90 {
namespace {

using tests::bits_at;
using tests::compare;
using tests::swizzle_lines;
using tests::value_at;

// The kernel's shared memory, at a multiple of what the swizzle repeats after.
template <typename S>
struct Memory {
    std::vector<char> bytes;
    char* at;

    Memory() : bytes(S::kSharedBytes + kRingAlignment) {
        at = bytes.data() + (kRingAlignment - reinterpret_cast<uintptr_t>(bytes.data()) % kRingAlignment);
    }
};

// ---- operands ----

constexpr int kTokens = 300, kHeads = 3, kPadding = 8;

// Rows [T, heads, width] that lie apart.
struct Rows {
    int head_stride, token_stride;
    std::vector<uint16_t> memory;
    uint16_t* base;

    explicit Rows(int width)
        : head_stride(width + kPadding),
          token_stride(kHeads * head_stride + kPadding),
          memory(size_t{kTokens} * token_stride + 8),
          base(memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16 / 2) {
        for (int i = 0; i < kTokens * token_stride; ++i) base[i] = value_at(i);
    }
    // Zeros behind the last row.
    uint16_t wanted(int token, int head, int column) const {
        return token < kTokens ? value_at(int64_t{token} * token_stride + head * head_stride + column) : 0;
    }
    TensorMapSpec map(const char* name, int width) const {
        const HeadRows rows{.data = base, .token_stride = token_stride, .head_stride = head_stride};
        const TensorMapSpec found = rows_map(name, rows, FloatType::kBfloat16, width, kHeads, kTokens);
        check_tensor_map(found);
        return found;
    }
};

template <typename Find>
void play_strips(const TensorMapSpec& map, int num_strips, char* memory, size_t target,
                 const Find& place_of) {
    for (int strip = 0; strip < num_strips; ++strip) {
        tests::play_box(map, place_of(strip), memory, target + static_cast<size_t>(strip) * kStripBytes,
                        swizzle_lines);
    }
}

template <typename S>
void check_queries(const Tile& tile) {
    const Rows rows(S::kWidth);
    const Memory<S> memory;
    play_strips(rows.map("q", S::kWidth), S::kKeyStrips, memory.at, 0,
                [&](int strip) { return query_place(tile, strip); });
    const auto queries = Mma<S>::tensor(memory.at, typename Mma<S>::template Strips<1>{});
    for (int row = 0; row < kRows; ++row) {
        for (int c = 0; c < S::kWidth; ++c) {
            compare("query", bits_at(queries, row, c, 0), rows.wanted(tile.first_query + row, tile.head, c),
                    row, c);
        }
    }
}

template <typename S>
void check_keys(const Tile& tile, int block, int stage) {
    const Rows rows(S::kWidth), values(kValueWidth);
    const Memory<S> memory;
    const auto from = [&](int strip) { return key_place(tile, block, strip); };
    play_strips(rows.map("k", S::kWidth), S::kKeyStrips, memory.at, S::kFirstKey + stage * S::kKeyBytes,
                from);
    play_strips(values.map("v", kValueWidth), S::kValueStrips, memory.at,
                S::kFirstValue + stage * S::kValueBytes, from);
    const auto keys = Mma<S>::tensor(memory.at + S::kFirstKey, typename Mma<S>::template Strips<kStages>{});
    const auto columns = Mma<S>::tensor(memory.at + S::kFirstValue, typename Mma<S>::ValueStrips{});
    for (int row = 0; row < kKeys; ++row) {
        const int token = tile.first_key + block * kKeys + row;
        for (int c = 0; c < S::kWidth; ++c) {
            compare("key", bits_at(keys, row, c, stage), rows.wanted(token, tile.key_head, c), row, c);
        }
        for (int c = 0; c < kValueWidth; ++c) {
            compare("value", bits_at(columns, c, row, stage), values.wanted(token, tile.key_head, c), row, c);
        }
    }
}

// ---- registers ----

// A warpgroup's part of an operand of the instruction begins at its own rows.
template <typename S>
void check_rows_of_warpgroups() {
    const Memory<S> memory;
    auto* const elements = reinterpret_cast<uint16_t*>(memory.at);
    for (int i = 0; i < kRows * S::kWidth; ++i) elements[i] = value_at(i);
    const auto queries = Mma<S>::tensor(memory.at, typename Mma<S>::template Strips<1>{});
    for (int warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup) {
        const auto part = typename Mma<S>::ForScores{}.get_slice(warpgroup * kWarpgroup).partition_A(queries);
        for (int k = 0; k < S::kWidth / 16; ++k) {
            compare("first query of a warpgroup", bits_at(part, 0, 0, k, 0),
                    bits_at(queries, warpgroup * kWarpgroupRows, 16 * k, 0), warpgroup, k);
        }
    }
}

template <typename S>
void check_weights() {
    for (int thread = 0; thread < kConsumers; ++thread) {
        const Lane lane = lane_of(thread);
        const auto held = typename Mma<S>::ForValues{}.get_slice(thread).partition_A(
            cute::make_identity_tensor(cute::Shape<cute::Int<kRows>, cute::Int<kKeys>>{}));
        for (int i = 0; i < static_cast<int>(sizeof(Weights) / 4); ++i) {
            for (int n = 0; n < 2; ++n) {
                const auto at = held(2 * i + n);
                compare("row of a weight", cute::get<0>(at), lane.row + 8 * (i % 2), thread, i);
                compare("column of a weight", cute::get<1>(at), lane.column + i / 2 * 8 + n, thread, i);
            }
        }
    }
}

template <typename TiledMma, int kColumns>
void check_sums(const char* name) {
    const auto tile = cute::make_identity_tensor(cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>{});
    for (int thread = 0; thread < kConsumers; ++thread) {
        const auto part = TiledMma{}.get_slice(thread).partition_C(tile);
        const Lane lane = lane_of(thread);
        for (int i = 0; i < kColumns / 2; ++i) {
            compare(name, cute::get<0>(part(i)), lane.row + 8 * (i / 2 % 2), thread, i);
            compare(name, cute::get<1>(part(i)), lane.column + i / 4 * 8 + i % 2, thread, i);
        }
    }
}

template <int kWidth>
void check_width() {
    using S = Shape<__nv_bfloat16, kWidth>;
    const Tile tile{.first_query = 40,
                    .num_rows = 200,
                    .head = 2,
                    .key_head = 1,
                    .first_key = 7,
                    .num_keys = 280,
                    .num_seen = 1,
                    .num_blocks = 3};
    check_queries<S>(tile);
    Tile last = tile;
    last.first_query = 290;  // most of its box lies behind the last row
    check_queries<S>(last);
    for (const int block : {0, 1, 2}) check_keys<S>(tile, block, block % kStages);
    check_rows_of_warpgroups<S>();
    check_weights<S>();
    check_sums<typename Mma<S>::ForScores, kKeys>("score");
    check_sums<typename Mma<S>::ForValues, kValueWidth>("sum");
}

void check_all() {
    check_width<192>();
    check_width<128>();
}

}  // namespace
}  // namespace dsc::prefill_sm90

int main(int argc, char**) {
    return dsc::tests::main_of(argc > 1, dsc::prefill_sm90::check_all);
}
