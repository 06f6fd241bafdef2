// Latent decoding of sm_90a in the host executor: the walk over pieces, boxes, softmax, blanked rows, weights
// in shared memory and results are the kernel's own; the copy engine and wgmma are played, the two warpgroups
// take turns. The kernel that adds up partial results runs as it is. Every case is compared with float64;
// prints a line for each: its name, the squared distance of the outputs relative to their size, the largest
// error of a log-sum-exp, and whether all is right and nothing round the outputs was touched.
//
// An argument plants a mistake: "unblanked" leaves rows behind a sequence's end, "unfollowed" does not
// follow the other warpgroup's maxima, "late" takes the weights of a block ahead.
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <string_view>

#include "attention/mla_decode_blocks_sm90.cuh"
#include "attention/mla_decode_combine.cuh"
#include "core/launch.h"
#include "played_copies.h"
#include "played_values.h"

namespace dsc {
namespace {

using T = __nv_bfloat16;
using tests::Bits;
using tests::float_of;

bool is_unblanked = false, is_unfollowed = false, is_late = false;

// ---- what the hardware does ----

// Element `column` of line `line` of a run of strips.
float element_at(const char* strips, int line, int column) {
    const int byte = line * kLineBytes + 2 * (column % kLineElements);
    const char* const strip = strips + column / kLineElements * kStripBytes;
    return float_of(*reinterpret_cast<const uint16_t*>(strip + swizzled(byte)));
}

void play_query_copies(const TensorMapSpec& map, const DecodeTile& tile, int sequence, char* memory) {
    for (int strip = 0; strip < kNumStrips; ++strip) {
        tests::play_box(map, decode_query_place(tile, sequence, strip), memory,
                        static_cast<size_t>(strip) * kStripBytes);
    }
}

void play_block_copies(const MlaDecodeParams& p, const TensorMapSpec& map, const DecodePiece& piece,
                       int block, char* buffer) {
    const DecodePages pages = decode_pages(p, piece, block);
    const int box_rows = decode_box_rows(p.page_size);
    for (int strip = 0; strip < kNumStrips; ++strip) {
        for (int box = 0; box * box_rows < kDecodeBlock; ++box) {
            tests::play_box(map, decode_box_place(p, pages, block, strip, box), buffer,
                            static_cast<size_t>(strip * kStripBytes + box * box_rows * kLineBytes));
        }
    }
}

void play_scores(DecodeScores& scores, const char* queries, const char* buffer) {
    const DecodeLane lane = decode_lane();
    for (int i = 0; i < 4 * kDecodeBlock / 8; ++i) {
        const int row = lane.row + 8 * (i / 2 % 2), key = lane.column + i / 4 * 8 + i % 2;
        scores[i] = 0;
        for (int c = 0; c < kCacheWidth; ++c) {
            scores[i] += element_at(queries, row, c) * element_at(buffer, key, c);
        }
    }
}

void play_values(DecodeValues& values, const char* buffer, int warpgroup) {
    const DecodeLane lane = decode_lane();
    for (int i = 0; i < 4 * kHalfColumns / 8; ++i) {
        const int row = lane.row + 8 * (i / 2 % 2);
        const int column = warpgroup * kHalfColumns + lane.column + i / 4 * 8 + i % 2;
        for (int key = 0; key < kDecodeBlock; ++key) {
            values[i] +=
                element_at(buffer + kRopeStrip * kStripBytes, row, key) * element_at(buffer, key, column);
        }
    }
}

struct PlayedShared {
    float maxima[kDecodeWarpgroups][kDecodeRows];
    float sums[kDecodeWarpgroups][kDecodeRows];
};

// The kernel of mla_decode_sm90.cuh, one role after the other.
__global__ void played_kernel(const TensorMapSpec queries_map, const TensorMapSpec cache_map,
                              const MlaDecodeParams p) {
    DSC_SHARED(PlayedShared, shared);
    DSC_SHARED_DYNAMIC(char, unaligned);
    char* const queries =
        unaligned +
        (kRingAlignment - reinterpret_cast<uintptr_t>(unaligned) % kRingAlignment) % kRingAlignment;
    wait_for_previous_kernel();
    const DecodeTile tile = decode_tile();
    const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
    int n = 0;
    for_each_piece(p, tile, [&](const DecodePiece& piece) {
        DecodeValues values{};
        DecodeSoftmax rows;
        const DecodeView view = decode_view(p, piece, tile);
        if (threadIdx.x == 0 and not piece.is_empty()) {
            play_query_copies(queries_map, tile, piece.sequence, queries);
        }
        for (int block = piece.begin; block < piece.end; ++block, ++n) {
            char* const buffer = queries + (1 + n % kDecodeBuffers) * kBufferBytes;
            const bool is_owner = n % kDecodeWarpgroups == warpgroup;
            if (threadIdx.x == 0) play_block_copies(p, cache_map, piece, block, buffer);
            __syncthreads();
            float factor[2] = {1, 1};
            DecodeWeights weights;
            if (is_owner) {
                DecodeScores scores;
                play_scores(scores, queries, buffer);
                weigh_scores(scores, rows, factor, view, block, p.scale * 1.4426950408889634f);
                round_weights<T>(weights, scores);
                keep_rows(shared.maxima[warpgroup], rows.max);
            }
            __syncthreads();
            if (is_owner) keep_weights(buffer + kRopeStrip * kStripBytes, weights);
            __syncthreads();
            if (not is_owner and not is_unfollowed) follow_maxima(rows, factor, shared.maxima[warpgroup ^ 1]);
            rescale(values, factor);
            const int num_rows = piece.length - block * kDecodeBlock;
            if (num_rows < kDecodeBlock and not is_unblanked) {
                blank_lines<kHalfStrips, kDecodeBlock>(buffer + warpgroup * kHalfStrips * kStripBytes,
                                                       num_rows);
            }
            __syncthreads();
            char* const multiplied =
                is_late ? queries + (1 + (n ^ 1) % kDecodeBuffers) * kBufferBytes : buffer;
            play_values(values, multiplied, warpgroup);
            __syncthreads();
        }
        for (float& sum : rows.sum) sum = row_sum<4>(sum);
        keep_rows(shared.sums[warpgroup], rows.sum);
        __syncthreads();
        const float* const others = shared.sums[warpgroup ^ 1] + decode_lane().row;
        rows.sum[0] += others[0];
        rows.sum[1] += others[8];
        __syncthreads();
        store_result<T>(p, piece, tile, values, rows, warpgroup);
    });
}

// ---- cases ----

std::mt19937 rng(1);
int num_wrong = 0;

struct Case {
    const char* name;
    std::vector<int> seq_lens;
    int num_new, num_heads, page_size, num_parts;
    std::vector<int> planned = {};  // lengths that the plan was made for, where they are others
};

uint16_t random_bits(float scale) {
    std::normal_distribution<float> normal(0, scale);
    const T value = __float2bfloat16_rn(normal(rng));
    uint16_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

constexpr int kGuard = 8, kPagePadding = 16, kTablePadding = 3;
constexpr int kWild = 0x7fffffff;

// All tensors of a call: pages and rows of the table lie apart, what is not in use is NaN or wild.
struct Call {
    int num_sequences, num_rows, table_width, num_pages;
    Bits queries, cache, out;
    std::vector<int32_t> table, seq_lens;
    std::vector<std::array<int32_t, 2>> plan;
    std::vector<float> lse, partial_out, partial_lse;
    MlaDecodeParams p{};

    explicit Call(const Case& c)
        : num_sequences(static_cast<int>(c.seq_lens.size())),
          num_rows(c.num_new * c.num_heads),
          table_width(1),
          num_pages(1),
          seq_lens(c.seq_lens.begin(), c.seq_lens.end()) {
        std::vector<int> num_used;
        for (const int length : c.seq_lens) {
            num_used.push_back(ceil_div(std::max(length, 0), c.page_size));
            table_width = std::max(table_width, num_used.back());
            num_pages += num_used.back();
        }
        const int page_stride = c.page_size * kCacheWidth + kPagePadding;
        cache.assign(static_cast<size_t>(num_pages) * page_stride, tests::kPoison);
        table.assign(static_cast<size_t>(num_sequences) * (table_width + kTablePadding), kWild);
        std::vector<int> free_pages(num_pages);
        for (int i = 0; i < num_pages; ++i) free_pages[i] = i;
        std::shuffle(free_pages.begin(), free_pages.end(), rng);
        for (int b = 0; b < num_sequences; ++b) {
            for (int slot = 0; slot < num_used[b]; ++slot) {
                const int page = free_pages.back();
                free_pages.pop_back();
                table[static_cast<size_t>(b) * (table_width + kTablePadding) + slot] = page;
                const int count = std::min(c.page_size, c.seq_lens[b] - slot * c.page_size) * kCacheWidth;
                for (int i = 0; i < count; ++i) {
                    cache[static_cast<size_t>(page) * page_stride + i] = random_bits(1);
                }
            }
        }
        queries.resize(static_cast<size_t>(num_sequences) * num_rows * kCacheWidth);
        for (uint16_t& element : queries) element = random_bits(1);
        const std::vector<int>& planned = c.planned.empty() ? c.seq_lens : c.planned;
        plan.resize(static_cast<size_t>(c.num_parts + 1 + num_sequences));
        fill_mla_decode_plan(planned, num_sequences, c.num_parts, int64_t{table_width} * c.page_size, plan);
        const size_t num_results = static_cast<size_t>(num_sequences) * num_rows;
        const size_t num_partial = size_t{2} * c.num_parts * num_rows;
        out.assign(num_results * kLatentWidth + 2 * kGuard, tests::kPoison);
        lse.assign(num_results + 2 * kGuard, NAN);
        partial_out.assign(num_partial * kLatentWidth + 2 * kGuard, NAN);
        partial_lse.assign(num_partial + 2 * kGuard, NAN);
        p = {.q = queries.data(),
             .cache = cache.data(),
             .page_table = table.data(),
             .seq_lens = seq_lens.data(),
             .plan = plan.data()->data(),
             .out = out.data() + kGuard,
             .lse = lse.data() + kGuard,
             .partial_out = partial_out.data() + kGuard,
             .partial_lse = partial_lse.data() + kGuard,
             .page_stride = page_stride,
             .table_stride = table_width + kTablePadding,
             .num_sequences = num_sequences,
             .num_new = c.num_new,
             .num_heads = c.num_heads,
             .num_pages = num_pages,
             .page_size = c.page_size,
             .table_width = table_width,
             .num_parts = c.num_parts,
             .scale = 0.08f,
             .dtype = FloatType::kBfloat16};
    }

    bool is_guarded() const {
        bool is_whole = true;
        const auto check = [&](const auto& memory, const auto& is_nan) {
            for (int i = 0; i < kGuard; ++i) {
                is_whole = is_whole and is_nan(memory[i]) and is_nan(memory[memory.size() - 1 - i]);
            }
        };
        check(out, [](uint16_t bits) { return bits == tests::kPoison; });
        for (const auto* memory : {&lse, &partial_out, &partial_lse}) {
            check(*memory, [](float value) { return std::isnan(value); });
        }
        return is_whole;
    }

    // Row `row` of a sequence in float64: its output, and the log-sum-exp behind it.
    std::vector<double> wanted(int sequence, int row) const {
        const int length = std::max(seq_lens[sequence], 0);
        const int num_seen = std::min(length, length - p.num_new + row / p.num_heads + 1);
        const uint16_t* const query =
            &queries[(static_cast<size_t>(sequence) * num_rows + row) * kCacheWidth];
        std::vector<double> result(kLatentWidth + 1);
        double sum = 0, largest = -std::numeric_limits<double>::infinity();
        std::vector<double> scores;
        const auto key = [&](int k) {
            const int page = table[sequence * p.table_stride + k / p.page_size];
            return &cache[static_cast<size_t>(page) * p.page_stride + k % p.page_size * kCacheWidth];
        };
        for (int k = 0; k < num_seen; ++k) {
            double score = 0;
            for (int i = 0; i < kCacheWidth; ++i) score += double{float_of(query[i])} * float_of(key(k)[i]);
            scores.push_back(score * p.scale);
            largest = std::max(largest, scores.back());
        }
        for (const double score : scores) sum += std::exp(score - largest);
        for (int k = 0; k < num_seen; ++k) {
            const double weight = std::exp(scores[k] - largest) / sum;
            for (int i = 0; i < kLatentWidth; ++i) result[i] += weight * float_of(key(k)[i]);
        }
        result[kLatentWidth] = largest + std::log(sum);
        return result;
    }
};

void check(const Case& c) {
    Call call(c);
    const MlaDecodeParams& p = call.p;
    const TensorMapSpec queries_map = decode_query_map(p), cache_map = decode_cache_map(p);
    check_tensor_map(queries_map);
    check_tensor_map(cache_map);
    const dim3 grid(static_cast<unsigned>(ceil_div(call.num_rows, kDecodeRows)),
                    static_cast<unsigned>(p.num_parts));
    launch_overlapped(played_kernel, grid, dim3(kDecodeConsumers),
                      static_cast<size_t>(kDecodeSm90SharedBytes + kRingAlignment), nullptr, queries_map,
                      cache_map, p);
    const dim3 combine_grid(static_cast<unsigned>(ceil_div(call.num_rows, combine::kBlockRows)),
                            static_cast<unsigned>(p.num_parts));
    launch_overlapped(combine::mla_decode_combine_kernel<T>, combine_grid, dim3(combine::kNumThreads), 0,
                      nullptr, p);
    tests::Distance found;
    for (int b = 0; b < call.num_sequences; ++b) {
        for (int row = 0; row < call.num_rows; ++row) {
            const size_t at = static_cast<size_t>(b) * call.num_rows + row;
            found.add(&call.out[kGuard + at * kLatentWidth], call.lse[kGuard + at], call.wanted(b, row));
        }
    }
    const bool is_right = found.is_small() and call.is_guarded();
    num_wrong += not is_right;
    std::printf("%-24s %.2g %.2g %s\n", c.name, found.difference / found.size, found.worst_lse,
                is_right ? "right" : "WRONG");
}

const std::vector<Case> kCases{
    {"one row", {1}, 1, 16, 64, 1},
    {"a block", {64}, 1, 16, 64, 1},
    {"a block and a row", {65}, 1, 16, 64, 1},
    {"pages of 16", {200, 17}, 1, 16, 16, 3},
    {"pages of 32", {33, 190}, 2, 8, 32, 2},
    {"pages of 128", {300, 64, 129}, 1, 16, 128, 4},
    {"lengths of none", {0, 70, 0, -3, 1}, 1, 4, 64, 3},
    {"new tokens", {130, 3, 2, 1, 0, 64}, 4, 16, 64, 3},
    {"two tiles", {150, 65}, 1, 100, 64, 3},
    {"new tokens in two tiles", {130, 63}, 3, 40, 32, 2},
    {"one part", {130, 0, 70}, 1, 16, 64, 1},
    {"shared by all", {700}, 1, 16, 64, 5},
    {"more parts than blocks", {70, 64}, 1, 16, 64, 9},
    {"a plan of other lengths", {400, 30, 0, 200}, 1, 16, 64, 4, {64, 300, 100, 500}},
};

}  // namespace
}  // namespace dsc

int main(int argc, char** argv) {
    const std::string_view planted = argc > 1 ? argv[1] : "";
    dsc::is_unblanked = planted == "unblanked";
    dsc::is_unfollowed = planted == "unfollowed";
    dsc::is_late = planted == "late";
    for (const dsc::Case& c : dsc::kCases) dsc::check(c);
    return dsc::num_wrong == 0 ? 0 : 1;
}
