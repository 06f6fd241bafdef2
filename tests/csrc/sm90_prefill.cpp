// Prefill attention of sm_90a in the host executor: the choice of tiles, boxes, masks, softmax, blanked rows
// and results are the kernel's own; the copy engine and wgmma are played, one role after the other. Every
// case is compared with float64; prints a line for each: its name, the squared distance of the outputs
// relative to their size, the largest error of a log-sum-exp, and whether all is right and nothing else was
// touched.
//
// An argument plants a mistake: "unblanked" leaves rows of values behind a sequence's end, "unhidden" hides
// no scores, "unscaled" does not scale sums when a reference moves, "overlong" stores a row too many.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string_view>
#include <utility>

#include "attention/mla_prefill_blocks_sm90.cuh"
#include "core/launch.h"
#include "core/overlap.h"
#include "played_copies.h"
#include "played_values.h"

namespace dsc::prefill_sm90 {
namespace {

using T = __nv_bfloat16;
using tests::Bits;
using tests::float_of;

bool is_unblanked = false, is_unhidden = false, is_unscaled = false, is_overlong = false;

// ---- what the hardware does ----

// Element `column` of line `line` of a run of strips.
float element_at(const char* strips, int line, int column) {
    const int byte = line * kLineBytes + 2 * (column % kLineElements);
    const char* const strip = strips + column / kLineElements * kStripBytes;
    return float_of(*reinterpret_cast<const uint16_t*>(strip + swizzled(byte)));
}

template <typename Find>
void play_strips(const TensorMapSpec& map, int num_strips, char* strips, const Find& place_of) {
    for (int strip = 0; strip < num_strips; ++strip) {
        tests::play_box(map, place_of(strip), strips, static_cast<size_t>(strip) * kStripBytes);
    }
}

void play_scores(Scores& scores, const char* queries, const char* keys, int width) {
    const Lane lane = own_lane();
    for (int i = 0; i < 4 * kKeys / 8; ++i) {
        const int row = lane.row + 8 * (i / 2 % 2), key = lane.column + i / 4 * 8 + i % 2;
        scores[i] = 0;
        for (int c = 0; c < width; ++c) scores[i] += element_at(queries, row, c) * element_at(keys, key, c);
    }
}

using Rounded = uint16_t[kRows][kKeys];

// A row's weights lie in the four threads of a quad.
void show_weights(Rounded& rounded, const Weights& weights) {
    const Lane lane = own_lane();
    for (int i = 0; i < static_cast<int>(sizeof(Weights) / 4); ++i) {
        uint16_t* const pair = &rounded[lane.row + 8 * (i % 2)][lane.column + i / 2 * 8];
        pair[0] = static_cast<uint16_t>(weights[i]);
        pair[1] = static_cast<uint16_t>(weights[i] >> 16);
    }
}

void play_values(Values& sums, const Rounded& rounded, const char* values) {
    const Lane lane = own_lane();
    for (int i = 0; i < 4 * kValueWidth / 8; ++i) {
        const int row = lane.row + 8 * (i / 2 % 2), column = lane.column + i / 4 * 8 + i % 2;
        for (int key = 0; key < kKeys; ++key) {
            sums[i] += float_of(rounded[row][key]) * element_at(values, key, column);
        }
    }
}

// A tile of the kernel of mla_prefill_sm90.cuh. `memory`: queries, keys and values, one stage.
void play_tile(const MapSpecs& maps, const MlaPrefillParams& p, const Tile& tile, char* memory,
               Rounded& rounded) {
    char* const keys = memory + p.width / kLineElements * kStripBytes;
    char* const values = keys + p.width / kLineElements * kStripBytes;
    Values sums{};
    RowStates rows;
    const View view = view_of(tile, p.causal);
    for (int block = tile.num_blocks - 1; block >= 0; --block) {
        const bool is_first = block == tile.num_blocks - 1;
        if (threadIdx.x == 0) {
            const auto from = [&](int strip) { return key_place(tile, block, strip); };
            const int num_strips = p.width / kLineElements;
            if (is_first) {
                play_strips(maps.queries, num_strips, memory, [&](int i) { return query_place(tile, i); });
            }
            play_strips(maps.keys, num_strips, keys, from);
            play_strips(maps.values, kValueWidth / kLineElements, values, from);
        }
        __syncthreads();
        Scores scores;
        Weights weights;
        float scale[2] = {1, 1};
        play_scores(scores, memory, keys, p.width);
        if (not is_unhidden) hide_scores(scores, view, block);
        const bool moves = move_references(scores, p.scale * kLog2E, rows, scale);
        weigh_scores(scores, p.scale * kLog2E, rows);
        round_weights<T>(weights, scores);
        if (moves and not is_unscaled) rescale(sums, scale);
        show_weights(rounded, weights);
        if (is_first and num_values_of_last(tile) < kKeys and not is_unblanked) {
            blank_lines<1, kKeys>(values + threadIdx.x / kWarpgroup * kStripBytes, num_values_of_last(tile));
        }
        __syncthreads();
        play_values(sums, rounded, values);
        __syncthreads();
    }
    Tile stored = tile;
    if (is_overlong) ++stored.num_rows;
    store_rows<T>(p, stored, rows, sums);
}

__global__ void played_kernel(const MapSpecs maps, const MlaPrefillParams p) {
    DSC_SHARED(Tile, tile);
    DSC_SHARED(Rounded, rounded);
    DSC_SHARED_DYNAMIC(char, unaligned);
    char* const memory =
        unaligned +
        (kRingAlignment - reinterpret_cast<uintptr_t>(unaligned) % kRingAlignment) % kRingAlignment;
    wait_for_previous_kernel();
    for (int index = static_cast<int>(blockIdx.x);;) {
        if (threadIdx.x == 0) tile = find_tile(p, index);
        __syncthreads();
        if (tile.num_rows == 0) break;
        play_tile(maps, p, tile, memory, rounded);
        __syncthreads();
        if (threadIdx.x == 0) index = next_index(p);
    }
}

// ---- cases ----

std::mt19937 rng(1);
int num_wrong = 0;

struct Case {
    const char* name;
    std::vector<std::pair<int, int>> lengths;  // of queries and of keys
    int width, num_heads, num_key_heads;
    bool causal;
    float growth = 1;  // of the keys, from the last to the first of a sequence
};

uint16_t random_bits(float scale) {
    std::normal_distribution<float> normal(0, scale);
    const T value = __float2bfloat16_rn(normal(rng));
    uint16_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

constexpr int kStray = 3;    // rows of no sequence ahead of all and behind all
constexpr int kPadding = 8;  // elements between heads, and as many between tokens
// What results hold before the call: numbers, since the rows of no sequence would give NaN.
constexpr uint16_t kUntouched = 0x4321;
constexpr float kUntouchedLse = 4321;

// Rows [T, heads, width] that lie apart, NaN where nobody should look.
struct Rows {
    int num_heads, width;
    Bits bits;

    Rows(int num_rows, int heads, int row_width)
        : num_heads(heads),
          width(row_width),
          bits(static_cast<size_t>(num_rows) * token_stride(), tests::kPoison) {}
    int64_t head_stride() const { return width + kPadding; }
    int64_t token_stride() const { return num_heads * head_stride() + kPadding; }
    uint16_t* row(int64_t token, int head) { return &bits[token * token_stride() + head * head_stride()]; }
    const uint16_t* row(int64_t token, int head) const { return const_cast<Rows*>(this)->row(token, head); }
    HeadRows view() const { return {bits.data(), token_stride(), head_stride()}; }
    void draw(int64_t token, float scale) {
        for (int head = 0; head < num_heads; ++head) {
            for (int i = 0; i < width; ++i) row(token, head)[i] = random_bits(scale);
        }
    }
};

std::vector<int32_t> ends_of(const Case& c, bool has_queries) {
    std::vector<int32_t> ends{kStray};
    for (const auto& [queries, keys] : c.lengths)
        ends.push_back(ends.back() + (has_queries ? queries : keys));
    return ends;
}

struct Call {
    std::vector<int32_t> ends_q, ends_k, plan;
    int num_queries, num_keys;
    Rows q, k, v;
    Bits out;
    std::vector<float> lse;
    MlaPrefillParams p{};

    explicit Call(const Case& c)
        : ends_q(ends_of(c, true)),
          ends_k(ends_of(c, false)),
          num_queries(ends_q.back() + kStray),
          num_keys(ends_k.back() + kStray),
          q(num_queries, c.num_heads, c.width),
          k(num_keys, c.num_key_heads, c.width),
          v(num_keys, c.num_key_heads, kValueWidth),
          out(static_cast<size_t>(num_queries) * c.num_heads * kValueWidth, kUntouched),
          lse(static_cast<size_t>(num_queries) * c.num_heads, kUntouchedLse) {
        const int num_sequences = static_cast<int>(c.lengths.size());
        for (int t = kStray; t < num_queries - kStray; ++t) q.draw(t, 1);
        for (int b = 0; b < num_sequences; ++b) {
            const float length = static_cast<float>(std::max(1, c.lengths[b].second));
            for (int t = ends_k[b]; t < ends_k[b + 1]; ++t) {
                k.draw(t, std::pow(c.growth, static_cast<float>(ends_k[b + 1] - t) / length));
                v.draw(t, 1);
            }
        }
        plan.assign(static_cast<size_t>(prefill_plan_size(num_queries, num_sequences)), 0x7fffffff);
        const int64_t most = most_prefill_tiles(num_queries, num_sequences, kRows);
        std::vector<PrefillTile> tiles(static_cast<size_t>(most));
        plan[0] = fill_prefill_plan(ends_q, ends_k, num_sequences, num_queries, num_keys, tiling_of(c.causal),
                                    most, tiles);
        plan[1] = 0;
        for (int i = 0; i < plan[0]; ++i) {
            plan[2 + 2 * i] = tiles[i].sequence;
            plan[3 + 2 * i] = tiles[i].block;
        }
        p = {.q = q.view(),
             .k = k.view(),
             .v = v.view(),
             .cu_seqlens_q = ends_q.data(),
             .cu_seqlens_k = ends_k.data(),
             .plan = plan.data(),
             .out = out.data(),
             .lse = lse.data(),
             .num_queries = num_queries,
             .num_keys = num_keys,
             .num_sequences = num_sequences,
             .num_heads = c.num_heads,
             .num_key_heads = c.num_key_heads,
             .width = c.width,
             .value_width = kValueWidth,
             .scale = 0.08f,
             .causal = c.causal,
             .dtype = FloatType::kBfloat16};
    }

    // Query `row` of a sequence in float64: its output, and the log-sum-exp behind it.
    std::vector<double> wanted(int sequence, int row, int head) const {
        const int first_key = ends_k[sequence], key_count = ends_k[sequence + 1] - first_key;
        const int query_count = ends_q[sequence + 1] - ends_q[sequence];
        const int num_seen = p.causal ? key_count - query_count + row + 1 : key_count;
        const int key_head = head / (p.num_heads / p.num_key_heads);
        const uint16_t* const query = q.row(ends_q[sequence] + row, head);
        std::vector<double> result(kValueWidth + 1), scores;
        double largest = -std::numeric_limits<double>::infinity(), sum = 0;
        for (int i = 0; i < num_seen; ++i) {
            const uint16_t* const key = k.row(first_key + i, key_head);
            double score = 0;
            for (int c = 0; c < p.width; ++c) score += double{float_of(query[c])} * float_of(key[c]);
            scores.push_back(score * p.scale);
            largest = std::max(largest, scores.back());
        }
        for (const double score : scores) sum += std::exp(score - largest);
        for (int i = 0; i < num_seen; ++i) {
            const uint16_t* const value = v.row(first_key + i, key_head);
            const double weight = std::exp(scores[i] - largest) / sum;
            for (int c = 0; c < kValueWidth; ++c) result[c] += weight * float_of(value[c]);
        }
        result[kValueWidth] = largest + std::log(sum);
        return result;
    }

    // Rows of no sequence.
    bool is_untouched() const {
        const auto is_whole = [](auto begin, auto end, auto wanted) {
            return std::all_of(begin, end, [&](auto value) { return value == wanted; });
        };
        const auto num_outs = static_cast<int64_t>(kStray) * p.num_heads * kValueWidth;
        const auto num_lses = static_cast<int64_t>(kStray) * p.num_heads;
        return is_whole(out.begin(), out.begin() + num_outs, kUntouched) and
               is_whole(out.end() - num_outs, out.end(), kUntouched) and
               is_whole(lse.begin(), lse.begin() + num_lses, kUntouchedLse) and
               is_whole(lse.end() - num_lses, lse.end(), kUntouchedLse);
    }
};

void check(const Case& c) {
    Call call(c);
    const MlaPrefillParams& p = call.p;
    const MapSpecs maps = map_specs(p);
    for (const TensorMapSpec* map : {&maps.queries, &maps.keys, &maps.values}) check_tensor_map(*map);
    constexpr int64_t kSms = 3;  // that the played device has
    const auto num_blocks = static_cast<unsigned>(std::min(most_works(p), kSms));
    const int num_strips = 2 * c.width / kLineElements + kValueWidth / kLineElements;
    launch_overlapped(played_kernel, dim3(num_blocks), dim3(kConsumers),
                      static_cast<size_t>(num_strips * kStripBytes + kRingAlignment), nullptr, maps, p);
    tests::Distance found;
    for (int b = 0; b < static_cast<int>(c.lengths.size()); ++b) {
        for (int row = 0; row < c.lengths[b].first; ++row) {
            for (int head = 0; head < c.num_heads; ++head) {
                const size_t at = static_cast<size_t>(call.ends_q[b] + row) * c.num_heads + head;
                found.add(&call.out[at * kValueWidth], call.lse[at], call.wanted(b, row, head));
            }
        }
    }
    const bool is_right = found.is_small() and call.is_untouched();
    num_wrong += not is_right;
    std::printf("%-24s %.2g %.2g %s\n", c.name, found.difference / found.size, found.worst_lse,
                is_right ? "right" : "WRONG");
}

const std::vector<Case> kCases{
    {"one query", {{1, 1}}, 192, 1, 1, true},
    {"a whole block", {{128, 128}}, 192, 1, 1, false},
    {"a causal block", {{128, 128}}, 192, 1, 1, true},
    {"a block and a row", {{129, 129}}, 192, 1, 1, true},
    {"128 wide", {{150, 150}, {70, 70}}, 128, 2, 2, true},
    {"no mask", {{150, 200}, {30, 3}}, 192, 1, 1, false},
    {"a piece of a prompt", {{40, 300}, {130, 259}}, 192, 1, 1, true},
    {"more queries than keys", {{300, 60}, {5, 3}}, 192, 1, 1, true},
    {"nothing on either side", {{0, 50}, {40, 0}, {0, 0}, {33, 33}}, 192, 2, 2, true},
    {"heads share keys", {{64, 64}, {65, 65}, {63, 63}}, 128, 6, 2, true},
    {"scores that grow", {{260, 260}}, 128, 1, 1, true, 16},
    {"scores that fall", {{260, 260}}, 128, 1, 1, true, 0.05f},
};

}  // namespace
}  // namespace dsc::prefill_sm90

int main(int argc, char** argv) {
    using namespace dsc::prefill_sm90;
    const std::string_view planted = argc > 1 ? argv[1] : "";
    is_unblanked = planted == "unblanked";
    is_unhidden = planted == "unhidden";
    is_unscaled = planted == "unscaled";
    is_overlong = planted == "overlong";
    for (const Case& c : kCases) check(c);
    return num_wrong == 0 ? 0 : 1;
}
