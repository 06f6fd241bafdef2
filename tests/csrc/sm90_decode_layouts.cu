// Where things lie in latent decoding on sm_90a, without a GPU: the copy engine is played on the CPU from the
// kernel's maps and boxes, and the strips are read back through CuTe's layouts, from which wgmma's
// descriptors are made; likewise the weights in shared memory and in registers, and the sums. Prints what is
// wrong, and how much was compared. An argument plants a wrong swizzle.
#include <vector>

#include "attention/mla_decode_sm90.cuh"
#include "played_copies.h"
#include "played_layouts.h"

namespace dsc {
namespace {

using T = __nv_bfloat16;
using Mma = DecodeMma<T>;
using tests::bits_at;
using tests::compare;
using tests::swizzle_lines;
using tests::value_at;

// Strips, at a multiple of what the swizzle repeats after.
struct Strips {
    std::vector<char> bytes;
    char* at;

    Strips() : bytes(kBufferBytes + kRingAlignment) {
        at = bytes.data() + (kRingAlignment - reinterpret_cast<uintptr_t>(bytes.data()) % kRingAlignment);
    }
    template <typename Layout>
    auto tensor(int strip, Layout layout) const {
        return Mma::tensor(at + strip * kStripBytes, layout);
    }
};

// ---- operands ----

void check_queries() {
    constexpr int kSequences = 2, kHeads = 100;
    std::vector<uint16_t> memory(size_t{kSequences} * kHeads * kCacheWidth + 8);
    uint16_t* const base = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16 / 2;
    for (int i = 0; i < kSequences * kHeads * kCacheWidth; ++i) base[i] = value_at(i);
    MlaDecodeParams p{};
    p.q = base;
    p.num_sequences = kSequences;
    p.num_new = 1;
    p.num_heads = kHeads;
    p.dtype = FloatType::kBfloat16;
    const TensorMapSpec map = decode_query_map(p);
    check_tensor_map(map);
    for (const int first_row : {0, kDecodeRows}) {
        const Strips strips;
        const DecodeTile tile{.part = 0, .first_row = first_row};
        for (int strip = 0; strip < kNumStrips; ++strip) {
            tests::play_box(map, decode_query_place(tile, 1, strip), strips.at,
                            static_cast<size_t>(strip) * kStripBytes, swizzle_lines);
        }
        const auto queries = strips.tensor(0, typename Mma::template Strips<kNumStrips>{});
        for (int row = 0; row < kDecodeRows; ++row) {
            for (int c = 0; c < kCacheWidth; ++c) {
                const int at = first_row + row;
                compare("query", bits_at(queries, row, c % kLineElements, c / kLineElements),
                        at < kHeads ? value_at((int64_t{kHeads} + at) * kCacheWidth + c) : 0, row, c);
            }
        }
    }
}

// Keys, and both halves of the values, of pages that lie apart; one of them is not there.
void check_block(int page_size) {
    constexpr int kPages = 6, kPadding = 8;
    const int stride = page_size * kCacheWidth + kPadding, box_rows = decode_box_rows(page_size);
    std::vector<uint16_t> memory(size_t{kPages} * stride + 8);
    uint16_t* const base = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16 / 2;
    for (int i = 0; i < kPages * stride; ++i) base[i] = value_at(i);
    MlaDecodeParams p{};
    p.cache = base;
    p.page_stride = stride;
    p.num_pages = kPages;
    p.page_size = page_size;
    p.dtype = FloatType::kBfloat16;
    const TensorMapSpec map = decode_cache_map(p);
    check_tensor_map(map);
    const DecodePages pages{{3, kPages, 0, 5}};
    for (const int block : {0, 1}) {
        const Strips strips;
        for (int strip = 0; strip < kNumStrips; ++strip) {
            for (int box = 0; box * box_rows < kDecodeBlock; ++box) {
                tests::play_box(map, decode_box_place(p, pages, block, strip, box), strips.at,
                                static_cast<size_t>(strip * kStripBytes + box * box_rows * kLineBytes),
                                swizzle_lines);
            }
        }
        const auto keys = strips.tensor(0, typename Mma::template Strips<kNumStrips>{});
        for (int row = 0; row < kDecodeBlock; ++row) {
            const int page = pages.at[row / box_rows], in_page = (block * kDecodeBlock + row) % page_size;
            for (int c = 0; c < kCacheWidth; ++c) {
                const uint16_t wanted =
                    page < kPages ? value_at(int64_t{page} * stride + in_page * kCacheWidth + c) : 0;
                compare("key", bits_at(keys, row, c % kLineElements, c / kLineElements), wanted, row, c);
                if (c >= kLatentWidth) continue;
                const auto values = strips.tensor(c / kHalfColumns * kHalfStrips, Mma::ValueStrips{});
                compare("value", bits_at(values, c % kHalfColumns, row), wanted, row, c);
            }
        }
    }
}

// ---- weights and sums ----

// Those in shared memory by their layout there, those in registers by the instruction's.
void check_weights() {
    const Strips strips;
    const auto kept = strips.tensor(kRopeStrip, typename Mma::template Strips<1>{});
    for (int thread = 0; thread < kWarpgroup; ++thread) {
        const DecodeLane lane = decode_lane_of(thread);
        const auto held = typename Mma::Held{}.get_slice(thread).partition_A(
            cute::make_identity_tensor(cute::Shape<cute::_64, cute::_64>{}));
        for (int i = 0; i < 2 * (kDecodeBlock / 8); ++i) {
            for (int n = 0; n < 2; ++n) {
                const int row = lane.row + 8 * (i % 2), key = lane.column + i / 2 * 8 + n;
                const int byte = kRopeStrip * kStripBytes + weights_byte(lane, i) + 2 * n;
                *reinterpret_cast<uint16_t*>(strips.at + byte) = value_at(row * kDecodeBlock + key);
                const auto at = held(2 * i + n);
                compare("row of a weight", cute::get<0>(at), row, thread, i);
                compare("column of a weight", cute::get<1>(at), key, thread, i);
            }
        }
    }
    for (int row = 0; row < kDecodeRows; ++row) {
        for (int key = 0; key < kDecodeBlock; ++key) {
            compare("weight", bits_at(kept, row, key, 0), value_at(row * kDecodeBlock + key), row, key);
        }
    }
}

template <typename TiledMma, int kColumns>
void check_sums(const char* name) {
    const auto tile = cute::make_identity_tensor(cute::Shape<cute::_64, cute::Int<kColumns>>{});
    for (int thread = 0; thread < kWarpgroup; ++thread) {
        const auto part = TiledMma{}.get_slice(thread).partition_C(tile);
        const DecodeLane lane = decode_lane_of(thread);
        for (int i = 0; i < kColumns / 2; ++i) {
            compare(name, cute::get<0>(part(i)), lane.row + 8 * (i / 2 % 2), thread, i);
            compare(name, cute::get<1>(part(i)), lane.column + i / 4 * 8 + i % 2, thread, i);
        }
    }
}

void check_all() {
    check_queries();
    for (const int page_size : {16, 32, 64, 128}) check_block(page_size);
    check_weights();
    check_sums<Mma::Scores, kDecodeBlock>("score");
    check_sums<Mma::Kept, kHalfColumns>("sum");
    check_sums<Mma::Held, kHalfColumns>("sum of held weights");
}

}  // namespace
}  // namespace dsc

int main(int argc, char**) {
    return dsc::tests::main_of(argc > 1, dsc::check_all);
}
