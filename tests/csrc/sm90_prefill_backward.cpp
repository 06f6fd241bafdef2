// The gradients of prefill attention of sm_90a in the host executor: the choice of tiles and of the queries
// that see them, boxes, masks, P and dS and their places, blanked rows, sums of dQ and results are the
// kernel's own, and so are the kernels ahead of it and behind it; the copy engine and wgmma are played. Every
// case is compared with float64; prints a line for each: its name, the squared distances of dQ, dK and dV
// relative to their size, and whether all is right and rows of no sequence are zeros.
//
// An argument plants a mistake: "queries" or "keys" leaves their rows behind a sequence's end, "unhidden"
// hides no scores, "strips" leaves the middle strip of dQ to the other warpgroup, always.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string_view>
#include <utility>

#include "attention/mla_prefill_backward_blocks_sm90.cuh"
#include "attention/mla_prefill_rows.cu"
#include "played_copies.h"
#include "played_values.h"

namespace dsc::prefill_backward_sm90 {
namespace {

using T = __nv_bfloat16;
using tests::Bits;
using tests::float_of;

bool leaves_queries = false, leaves_keys = false, is_unhidden = false, leaves_strip = false;

// ---- what the hardware does ----

// Operands as products see them.
struct Tables {
    float keys[kKeys][192], values[kKeys][kValueWidth];
    float queries[kQueries][192], grad_out[kQueries][kValueWidth];
    float weights[kKeys][kQueries], grad_scores[kKeys][kQueries];
};
std::vector<Tables> all_tables;  // of each block of the grid

Tables& own_tables() {
    return all_tables[blockIdx.x];
}

// Lines of strips, read back through the swizzle by all threads.
template <int kLines, int kColumns>
void unpack_strips(float (&table)[kLines][kColumns], const char* strips, int num_columns) {
    for (int i = static_cast<int>(threadIdx.x); i < kLines * num_columns; i += kConsumers) {
        const int line = i / num_columns, column = i % num_columns;
        const char* const strip = strips + column / kLineElements * kLines * kLineBytes;
        const int byte = swizzled(line * kLineBytes + 2 * (column % kLineElements));
        table[line][column] = float_of(*reinterpret_cast<const uint16_t*>(strip + byte));
    }
}

template <typename Find>
void play_strips(const TensorMapSpec& map, int num_strips, int strip_bytes, char* strips,
                 const Find& place_of) {
    for (int strip = 0; strip < num_strips; ++strip) {
        tests::play_box(map, place_of(strip), strips, static_cast<size_t>(strip) * strip_bytes);
    }
}

// Row and key of a thread's i-th sum.
int row_of(int i) {
    return own_lane().row + 8 * (i / 2 % 2);
}
int key_of(int i) {
    return own_lane().key + i / 4 * 8 + i % 2;
}
constexpr int kNumSums = 4 * (kOwnKeys / 8);

template <int kColumns>
void play_scores(Sums& sums, const float (&queries)[kQueries][kColumns], const float (&keys)[kKeys][kColumns],
                 int num_columns) {
    for (int i = 0; i < kNumSums; ++i) {
        sums[i] = 0;
        for (int c = 0; c < num_columns; ++c) sums[i] += queries[row_of(i)][c] * keys[key_of(i)][c];
    }
}

template <int kCount, int kColumns>
void play_keys(Sums (&sums)[kCount], const float (&queries)[kQueries][kColumns],
               const float (&weights)[kKeys][kQueries]) {
    for (int strip = 0; strip < kCount; ++strip) {
        for (int i = 0; i < kNumSums; ++i) {
            const int column = strip * kLineElements + row_of(i);
            for (int q = 0; q < kQueries; ++q) sums[strip][i] += queries[q][column] * weights[key_of(i)][q];
        }
    }
}

template <int kWidth, int kCount>
void play_queries(char* sums, int first_strip) {
    const Tables& tables = own_tables();
    float acc[32 * kCount] = {};
    for (int i = 0; i < 32 * kCount; ++i) {
        const int column =
            first_strip * kLineElements + i / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
        for (int k = 0; k < kKeys; ++k) acc[i] += tables.grad_scores[k][row_of(i)] * tables.keys[k][column];
    }
    keep_sums<kWidth, kCount>(sums, acc, first_strip);
}

// ---- a tile of the kernel of mla_prefill_backward_sm90.cuh ----

// Zeros in rows behind the sequence, of one operand by each warpgroup.
template <int kFirstStrips, int kLines>
void play_blanking(char* first, char* second, int num_rows) {
    if (num_rows < kLines and threadIdx.x < kWarpgroup) blank_lines<kFirstStrips, kLines>(first, num_rows);
    if (num_rows < kLines and threadIdx.x >= kWarpgroup) blank_lines<kValueStrips, kLines>(second, num_rows);
}

template <typename S>
void play_keys_landing(const MapSpecs& maps, const Tile& tile, char* memory) {
    Tables& tables = own_tables();
    const auto from = [&](int strip) { return key_place(tile, strip); };
    if (threadIdx.x == 0) {
        play_strips(maps.keys, S::kStrips, kKeyStripBytes, memory, from);
        play_strips(maps.values, kValueStrips, kKeyStripBytes, memory + S::kFirstValue, from);
    }
    __syncthreads();
    if (not leaves_keys) {
        play_blanking<S::kStrips, kKeys>(memory, memory + S::kFirstValue, num_keys_of(tile));
    }
    __syncthreads();
    unpack_strips(tables.keys, memory, S::kWidth);
    unpack_strips(tables.values, memory + S::kFirstValue, kValueWidth);
}

template <typename S>
void play_queries_landing(const MapSpecs& maps, const Tile& tile, const Walk& walk, int stage, char* memory) {
    Tables& tables = own_tables();
    const auto from = [&](int strip) { return query_place(tile, walk, strip); };
    char* const queries = memory + S::kFirstQuery + stage * S::kQueryBytes;
    char* const grad_out = memory + S::kFirstGradOut + stage * S::kGradOutBytes;
    if (threadIdx.x == 0) {
        play_strips(maps.queries, S::kStrips, kQueryStripBytes, queries, from);
        play_strips(maps.grad_out, kValueStrips, kQueryStripBytes, grad_out, from);
    }
    __syncthreads();
    if (not leaves_queries) play_blanking<S::kStrips, kQueries>(queries, grad_out, walk.num_rows());
    __syncthreads();
    unpack_strips(tables.queries, queries, S::kWidth);
    unpack_strips(tables.grad_out, grad_out, kValueWidth);
    __syncthreads();
}

template <typename S>
void play_block(const MlaPrefillBackwardParams& p, const Tile& tile, const Walk& walk, int n, char* memory) {
    Tables& tables = own_tables();
    const Rows rows = load_rows(p, tile, walk);
    Sums weights, grads;
    play_scores(weights, tables.queries, tables.keys, S::kWidth);
    play_scores(grads, tables.grad_out, tables.values, kValueWidth);
    if (not is_unhidden) hide_scores(weights, tile, walk, p.causal);
    weigh_scores(weights, rows, p.scale * kLog2E);
    keep_turned<T>(memory + S::kFirstWeight, weights, 1.0f);
    make_grad_scores(grads, weights, rows);
    keep_turned<T>(memory + S::kFirstGradScore, grads, 1.0f);
    __syncthreads();
    unpack_strips(tables.weights, memory + S::kFirstWeight, kQueries);
    unpack_strips(tables.grad_scores, memory + S::kFirstGradScore, kQueries);
    __syncthreads();
    const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
    const OwnStrips strips = own_strips(S::kStrips, warpgroup, leaves_strip ? 1 - warpgroup : n);
    if (strips.count == 2) play_queries<S::kWidth, 2>(memory + S::kFirstSum, strips.first);
    if (strips.count == 1) play_queries<S::kWidth, 1>(memory + S::kFirstSum, strips.first);
    __syncthreads();
    if (threadIdx.x == 0) start_adding_sums<S::kWidth>(p, tile, walk, memory + S::kFirstSum);
}

template <typename S>
void play_tile(const MapSpecs& maps, const MlaPrefillBackwardParams& p, const Tile& tile, char* memory) {
    const Tables& tables = own_tables();
    Sums grad_k[S::kStrips] = {}, grad_v[kValueStrips] = {};
    Walk walk = walk_of(p, tile);
    if (walk.has_block()) play_keys_landing<S>(maps, tile, memory);
    for (int n = 0; walk.has_block(); ++n, walk.advance()) {
        play_queries_landing<S>(maps, tile, walk, n % kStages, memory);
        play_block<S>(p, tile, walk, n, memory);
        play_keys(grad_v, tables.grad_out, tables.weights);
        play_keys(grad_k, tables.queries, tables.grad_scores);
        __syncthreads();
    }
    __syncthreads();
    for (int i = 0; i < S::kStrips; ++i) keep_turned<T>(memory + i * kKeyStripBytes, grad_k[i], p.scale);
    for (int i = 0; i < kValueStrips; ++i) {
        keep_turned<T>(memory + S::kFirstValue + i * kKeyStripBytes, grad_v[i], 1.0f);
    }
    __syncthreads();
    store_gradients<S>(p, tile, memory);
}

template <typename S>
__global__ void played_kernel(const MapSpecs maps, const MlaPrefillBackwardParams p) {
    DSC_SHARED_DYNAMIC(char, unaligned);
    char* const memory =
        unaligned +
        (kRingAlignment - reinterpret_cast<uintptr_t>(unaligned) % kRingAlignment) % kRingAlignment;
    wait_for_previous_kernel();
    const Tile tile = find_tile(p, static_cast<int>(blockIdx.x));
    if (tile.is_there) play_tile<S>(maps, p, tile, memory);
}

// ---- cases ----

std::mt19937 rng(1);
int num_wrong = 0;

struct Case {
    const char* name;
    std::vector<std::pair<int, int>> lengths;  // of queries and of keys
    int width, num_heads, num_key_heads;
    bool causal;
};

uint16_t bits_of(float number) {
    const T value = __float2bfloat16_rn(number);
    uint16_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

constexpr int kStray = 3;    // rows of no sequence ahead of all and behind all
constexpr int kPadding = 8;  // elements between heads, and as many between tokens

// Rows [T, heads, width], NaN where nobody should look.
struct Operand {
    int num_heads, width, padding;
    Bits bits;

    Operand(int num_rows, int heads, int row_width, int row_padding)
        : num_heads(heads),
          width(row_width),
          padding(row_padding),
          bits(static_cast<size_t>(num_rows * token_stride()), tests::kPoison) {}
    int64_t head_stride() const { return width + padding; }
    int64_t token_stride() const { return num_heads * head_stride() + padding; }
    uint16_t* row(int64_t token, int head) { return &bits[token * token_stride() + head * head_stride()]; }
    HeadRows view() const { return {bits.data(), token_stride(), head_stride()}; }
    void draw(int first, int end) {
        std::normal_distribution<float> normal(0, 1);
        for (int token = first; token < end; ++token) {
            for (int i = 0; i < num_heads * width; ++i)
                row(token, i / width)[i % width] = bits_of(normal(rng));
        }
    }
};

std::vector<int32_t> ends_of(const Case& c, bool has_queries) {
    std::vector<int32_t> ends{kStray};
    for (const auto& [queries, keys] : c.lengths)
        ends.push_back(ends.back() + (has_queries ? queries : keys));
    return ends;
}

using Grid = std::vector<double>;  // [T, heads, width]

struct Call {
    std::vector<int32_t> ends_q, ends_k, plan;
    int num_queries, num_keys;
    Operand q, k, v, grad_out, out, grad_q, grad_k, grad_v;
    std::vector<float> lse, row_values, sums_q;
    Grid wanted_q, wanted_k, wanted_v;
    MlaPrefillBackwardParams p{};

    explicit Call(const Case& c)
        : ends_q(ends_of(c, true)),
          ends_k(ends_of(c, false)),
          num_queries(ends_q.back() + kStray),
          num_keys(ends_k.back() + kStray),
          q(num_queries, c.num_heads, c.width, kPadding),
          k(num_keys, c.num_key_heads, c.width, kPadding),
          v(num_keys, c.num_key_heads, kValueWidth, kPadding),
          grad_out(num_queries, c.num_heads, kValueWidth, kPadding),
          out(num_queries, c.num_heads, kValueWidth, 0),
          grad_q(num_queries, c.num_heads, c.width, 0),
          grad_k(num_keys, c.num_key_heads, c.width, 0),
          grad_v(num_keys, c.num_key_heads, kValueWidth, 0),
          lse(static_cast<size_t>(num_queries) * c.num_heads, NAN),
          row_values(2 * lse.size(), NAN),
          wanted_q(grad_q.bits.size()),
          wanted_k(grad_k.bits.size()),
          wanted_v(grad_v.bits.size()) {
        for (Operand* operand : {&q, &grad_out}) operand->draw(kStray, num_queries - kStray);
        for (Operand* operand : {&k, &v}) operand->draw(kStray, num_keys - kStray);
        const int num_sequences = static_cast<int>(c.lengths.size());
        sums_q.assign(num_sum_blocks(num_queries, num_sequences) * kSumRows * c.num_heads * c.width, NAN);
        p = {.q = q.view(),
             .k = k.view(),
             .v = v.view(),
             .grad_out = grad_out.view(),
             .out = out.bits.data(),
             .lse = lse.data(),
             .cu_seqlens_q = ends_q.data(),
             .cu_seqlens_k = ends_k.data(),
             .plan = nullptr,
             .row_values = row_values.data(),
             .sums_q = sums_q.data(),
             .grad_q = grad_q.bits.data(),
             .grad_k = grad_k.bits.data(),
             .grad_v = grad_v.bits.data(),
             .num_queries = num_queries,
             .num_keys = num_keys,
             .num_sequences = num_sequences,
             .num_heads = c.num_heads,
             .num_key_heads = c.num_key_heads,
             .width = c.width,
             .value_width = kValueWidth,
             .scale = 0.08f,
             .causal = c.causal,
             .deterministic = false,
             .dtype = FloatType::kBfloat16};
        make_plan();
        for (int b = 0; b < num_sequences; ++b) {
            for (int i = ends_q[b]; i < ends_q[b + 1]; ++i) {
                for (int head = 0; head < c.num_heads; ++head) add_row(b, i, head);
            }
        }
    }

    void make_plan() {
        plan.assign(static_cast<size_t>(prefill_plan_size(std::max(num_queries, num_keys), p.num_sequences)),
                    0x7fffffff);
        const int64_t most = most_prefill_tiles(num_keys, p.num_sequences, kKeys);
        std::vector<PrefillTile> tiles(static_cast<size_t>(most));
        plan[0] = fill_prefill_plan(ends_q, ends_k, p.num_sequences, num_queries, num_keys,
                                    tiling_of(p.causal), most, tiles);
        for (int i = 0; i < plan[0]; ++i) {
            plan[2 + 2 * i] = tiles[i].sequence;
            plan[3 + 2 * i] = tiles[i].block;
        }
        p.plan = plan.data();
    }

    static double dot(const uint16_t* a, const uint16_t* b, int size) {
        double sum = 0;
        for (int i = 0; i < size; ++i) sum += double{float_of(a[i])} * float_of(b[i]);
        return sum;
    }
    static void add(double* to, double factor, const uint16_t* from, int size) {
        for (int i = 0; i < size; ++i) to[i] += factor * float_of(from[i]);
    }

    // A query's part of the wanted gradients in float64, and what the forward pass left of it.
    void add_row(int sequence, int token, int head) {
        const int first_key = ends_k[sequence], key_count = ends_k[sequence + 1] - first_key;
        const int query_count = ends_q[sequence + 1] - ends_q[sequence];
        const int row = token - ends_q[sequence];
        const int num_seen = std::max(0, p.causal ? key_count - query_count + row + 1 : key_count);
        const int key_head = head / (p.num_heads / p.num_key_heads);
        std::vector<double> weights(num_seen), grads(num_seen), output(kValueWidth);
        double sum = 0, delta = 0;
        for (int i = 0; i < num_seen; ++i) {
            weights[i] = std::exp(p.scale * dot(q.row(token, head), k.row(first_key + i, key_head), p.width));
            grads[i] = dot(grad_out.row(token, head), v.row(first_key + i, key_head), kValueWidth);
            sum += weights[i];
        }
        for (int i = 0; i < num_seen; ++i) {
            weights[i] /= sum;
            delta += weights[i] * grads[i];
            add(output.data(), weights[i], v.row(first_key + i, key_head), kValueWidth);
        }
        for (int i = 0; i < kValueWidth; ++i)
            out.row(token, head)[i] = bits_of(static_cast<float>(output[i]));
        lse[token * p.num_heads + head] = static_cast<float>(std::log(sum));
        for (int i = 0; i < num_seen; ++i) {
            const int64_t key = (int64_t{first_key} + i) * p.num_key_heads + key_head;
            const double grad = p.scale * weights[i] * (grads[i] - delta);
            add(&wanted_q[(int64_t{token} * p.num_heads + head) * p.width], grad,
                k.row(first_key + i, key_head), p.width);
            add(&wanted_k[key * p.width], grad, q.row(token, head), p.width);
            add(&wanted_v[key * kValueWidth], weights[i], grad_out.row(token, head), kValueWidth);
        }
    }
};

double distance(const Bits& got, const Grid& wanted) {
    double difference = 0, size = 1e-30;
    for (size_t i = 0; i < wanted.size(); ++i) {
        difference += std::pow(float_of(got[i]) - wanted[i], 2);
        size += wanted[i] * wanted[i];
    }
    return difference / size;
}

template <int kWidth>
void play(const MlaPrefillBackwardParams& p) {
    using S = Shape<T, kWidth>;
    const MapSpecs maps = map_specs(p);
    for (const TensorMapSpec* map : {&maps.keys, &maps.values, &maps.queries, &maps.grad_out}) {
        check_tensor_map(*map);
    }
    const auto num_blocks =
        static_cast<unsigned>(most_prefill_tiles(p.num_keys, p.num_sequences, kKeys) * p.num_key_heads);
    all_tables.assign(num_blocks, Tables{});
    launch_overlapped(played_kernel<S>, dim3(num_blocks), dim3(kConsumers),
                      static_cast<size_t>(S::kSharedBytes + kRingAlignment), nullptr, maps, p);
}

void check(const Case& c) {
    Call call(c);
    launch_mla_prefill_row_values(call.p, nullptr);
    if (c.width == 192) {
        play<192>(call.p);
    } else {
        play<128>(call.p);
    }
    launch_mla_prefill_round_sums(call.p, nullptr);
    const double of_q = distance(call.grad_q.bits, call.wanted_q),
                 of_k = distance(call.grad_k.bits, call.wanted_k),
                 of_v = distance(call.grad_v.bits, call.wanted_v);
    const bool is_right = of_q <= 3e-5 and of_k <= 3e-5 and of_v <= 3e-5;
    num_wrong += not is_right;
    std::printf("%-24s %.2g %.2g %.2g %s\n", c.name, of_q, of_k, of_v, is_right ? "right" : "WRONG");
}

const std::vector<Case> kCases{
    {"a few rows", {{3, 5}}, 192, 1, 1, true},
    {"a whole block", {{64, 96}}, 192, 1, 1, false},
    {"whole blocks", {{192, 192}}, 192, 1, 1, true},
    {"a block and a row", {{65, 97}}, 192, 1, 1, true},
    {"128 wide", {{150, 150}, {70, 70}}, 128, 2, 2, true},
    {"no mask", {{150, 200}, {30, 3}}, 192, 1, 1, false},
    {"a piece of a prompt", {{40, 300}, {130, 259}}, 192, 1, 1, true},
    {"more queries than keys", {{300, 60}, {5, 3}}, 192, 1, 1, true},
    {"nothing on either side", {{0, 50}, {40, 0}, {0, 0}, {33, 33}}, 192, 2, 2, true},
    {"heads share keys", {{64, 64}, {65, 65}, {63, 63}}, 128, 6, 2, true},
    {"shared by three", {{100, 200}, {1, 1}}, 192, 3, 1, false},
};

}  // namespace
}  // namespace dsc::prefill_backward_sm90

int main(int argc, char** argv) {
    using namespace dsc::prefill_backward_sm90;
    const std::string_view planted = argc > 1 ? argv[1] : "";
    leaves_queries = planted == "queries";
    leaves_keys = planted == "keys";
    is_unhidden = planted == "unhidden";
    leaves_strip = planted == "strips";
    for (const Case& c : kCases) check(c);
    return num_wrong == 0 ? 0 : 1;
}
