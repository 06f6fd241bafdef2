// Where things lie in the gradients of prefill attention on sm_90a, without a GPU: the copy engine is played
// on the CPU from the kernel's maps and boxes, and the strips are read back through CuTe's layouts, from
// which wgmma's descriptors are made, as rows and as columns; likewise P and dS; and the place of every sum.
// Prints what is wrong, and how much was compared. An argument plants a wrong swizzle.
#include <vector>

#include "attention/mla_prefill_backward_sm90.cuh"
#include "played_copies.h"
#include "played_layouts.h"

namespace dsc::prefill_backward_sm90 {
namespace {

using S = Shape<__nv_bfloat16, 192>;
using M = Mma<S>;
using tests::bits_at;
using tests::compare;
using tests::swizzle_lines;
using tests::value_at;

// Shared memory, at a multiple of what the swizzle repeats after.
struct Memory {
    std::vector<char> bytes;
    char* at;

    Memory() : bytes(S::kSharedBytes + kRingAlignment) {
        at = bytes.data() + (kRingAlignment - reinterpret_cast<uintptr_t>(bytes.data()) % kRingAlignment);
    }
};

// ---- operands ----

// An operand of kRows rows in stage `stage`, as rows by columns and as columns by rows.
template <int kRows, int kColumns, int kCount, typename Find>
void check_operand(const char* name, const TensorMapSpec& map, int first, int stage, const Find& place_of,
                   const auto& wanted) {
    check_tensor_map(map);
    const Memory memory;
    const int strip_bytes = kRows * kLineBytes;
    for (int strip = 0; strip < kColumns / kLineElements; ++strip) {
        const int target = first + stage * kColumns * kRows * 2 + strip * strip_bytes;
        tests::play_box(map, place_of(strip), memory.at, static_cast<size_t>(target), swizzle_lines);
    }
    const auto rows = M::tensor(memory.at + first, typename M::template Strips<kRows, kColumns, kCount>{});
    const auto columns = M::tensor(memory.at + first, typename M::template Turned<kRows, kColumns, kCount>{});
    for (int row = 0; row < kRows; ++row) {
        for (int c = 0; c < kColumns; ++c) {
            compare(name, bits_at(rows, row, c, stage), wanted(row, c), row, c);
            compare(name, bits_at(columns, c, row, stage), wanted(row, c), row, c);
        }
    }
}

void check_operands() {
    constexpr int kTokens = 300, kHeads = 3, kPadding = 8;
    constexpr int kHead = S::kWidth + kPadding, kToken = kHeads * kHead;
    std::vector<uint16_t> storage(size_t{kTokens} * kToken + 8);
    uint16_t* const base = storage.data() + (16 - reinterpret_cast<uintptr_t>(storage.data()) % 16) % 16 / 2;
    for (int i = 0; i < kTokens * kToken; ++i) base[i] = value_at(i);
    const HeadRows rows{base, kToken, kHead};
    MlaPrefillBackwardParams p{};
    p.q = p.k = p.v = p.grad_out = rows;
    p.num_queries = p.num_keys = kTokens;
    p.num_heads = p.num_key_heads = kHeads;
    p.width = S::kWidth;
    p.value_width = kValueWidth;
    p.dtype = FloatType::kBfloat16;
    const MapSpecs maps = map_specs(p);
    const Tile tile{.is_there = true,
                    .sequence = {.first_query = 30, .num_queries = 270, .first_key = 20, .num_keys = 280},
                    .sequence_idx = 1,
                    .first_key = 192,
                    .key_head = 1};
    const Walk walk{.head = 2, .end_head = 3, .first_query = 208, .begin = 16, .end = 270};
    const auto from_keys = [&](int strip) { return key_place(tile, strip); };
    const auto from_queries = [&](int strip) { return query_place(tile, walk, strip); };
    const auto element = [&](int token, int head, int column) -> uint16_t {
        return token < kTokens ? value_at(int64_t{token} * kToken + head * kHead + column) : 0;
    };
    const auto key = [&](int row, int column) { return element(212 + row, 1, column); };
    const auto query = [&](int row, int column) { return element(238 + row, 2, column); };
    check_operand<kKeys, S::kWidth, 1>("key", maps.keys, 0, 0, from_keys, key);
    check_operand<kKeys, kValueWidth, 1>("value", maps.values, S::kFirstValue, 0, from_keys, key);
    for (const int stage : {0, 1}) {
        check_operand<kQueries, S::kWidth, kStages>("query", maps.queries, S::kFirstQuery, stage,
                                                    from_queries, query);
        check_operand<kQueries, kValueWidth, kStages>("dO", maps.grad_out, S::kFirstGradOut, stage,
                                                      from_queries, query);
    }
}

// P and dS: element (query, key) where keep_turned puts it; and two strips of the keys that do not begin with
// the first.
void check_turned() {
    const Memory memory;
    for (int byte = 0; byte < S::kSharedBytes; byte += 2) {
        *reinterpret_cast<uint16_t*>(memory.at + byte) = value_at(byte);
    }
    const auto by_keys = M::tensor(memory.at + S::kFirstWeight, M::Strips<kKeys, kQueries, 1>{});
    const auto by_queries = M::tensor(memory.at + S::kFirstWeight, M::Turned<kKeys, kQueries, 1>{});
    const auto two_strips = M::tensor(memory.at + kKeyStripBytes, M::Turned<kKeys, 2 * kLineElements, 1>{});
    for (int key = 0; key < kKeys; ++key) {
        for (int i = 0; i < 2 * kLineElements; ++i) {
            const int at = swizzled(key * kLineBytes + 2 * (i % kLineElements));
            const int strip = kKeyStripBytes * (1 + i / kLineElements);
            compare("two strips", bits_at(two_strips, i, key, 0), value_at(strip + at), key, i);
            if (i >= kQueries) continue;
            compare("weight", bits_at(by_keys, key, i, 0), value_at(S::kFirstWeight + at), key, i);
            compare("turned weight", bits_at(by_queries, i, key, 0), value_at(S::kFirstWeight + at), key, i);
        }
    }
}

// ---- sums ----

// kRows rows by the keys of both warpgroups: sum i of rows 64 * m and on is element 24 * m + i.
template <typename TiledMma, int kRows>
void check_sums(const char* name) {
    const auto tile = cute::make_identity_tensor(cute::Shape<cute::Int<kRows>, cute::Int<kKeys>>{});
    constexpr int kNumSums = sizeof(Sums) / sizeof(float);
    for (int thread = 0; thread < kConsumers; ++thread) {
        const auto part = TiledMma{}.get_slice(thread).partition_C(tile);
        const Lane lane = lane_of(thread);
        compare(name, cute::size(part), kRows / 64 * kNumSums, thread, 0);
        for (int i = 0; i < static_cast<int>(cute::size(part)); ++i) {
            const int row = i / kNumSums * 64 + lane.row + 8 * (i / 2 % 2);
            compare(name, cute::get<0>(part(i)), row, thread, i);
            compare(name, cute::get<1>(part(i)), lane.key + i % kNumSums / 4 * 8 + i % 2, thread, i);
        }
    }
}

// dQ of kCount strips, and where round_sums finds it.
template <int kCount>
void check_queries() {
    const auto tile = cute::make_identity_tensor(cute::Shape<cute::_64, cute::Int<64 * kCount>>{});
    for (int thread = 0; thread < kWarpgroup; ++thread) {
        const auto part = M::ForQueries<kCount>{}.get_slice(thread).partition_C(tile);
        const int lane = thread % kWarpSize;
        compare("sums of dQ", cute::size(part), 32 * kCount, thread, 0);
        for (int i = 0; i < 32 * kCount; ++i) {
            const int element = i % 8;  // of a block of 16 x 16, as mla_prefill_rows.h says
            const int row = thread / kWarpSize * kSumRows + lane / 4 + element / 2 % 2 * 8;
            const int column = i / 8 * 16 + element / 4 * 8 + lane % 4 * 2 + element % 2;
            compare("row of dQ", cute::get<0>(part(i)), row, thread, i);
            compare("column of dQ", cute::get<1>(part(i)), column, thread, i);
        }
    }
}

void check_all() {
    check_operands();
    check_turned();
    check_sums<M::ForScores, 64>("score");
    check_sums<M::ForKeys, 128>("sum of dV");
    check_sums<M::ForKeys, 192>("sum of dK");
    check_queries<1>();
    check_queries<2>();
}

}  // namespace
}  // namespace dsc::prefill_backward_sm90

int main(int argc, char**) {
    return dsc::tests::main_of(argc > 1, dsc::prefill_backward_sm90::check_all);
}
