// The jobs of the sm_90a kernel in the host executor: tiles, boxes, blanked rows and epilogues are the
// kernel's own; the copy engine, the swizzle and wgmma are played. Each product is compared with float64.
// Prints a line for each: its name, the distance 1 - 2<x, y> / (<x, x> + <y, y>), and whether the rows round
// the output are untouched. With "tiles" it prints the tiles of some jobs instead.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string_view>
#include <vector>

#include "core/launch.h"
#include "core/overlap.h"
#include "gemm/grouped_gemm_wgrad_sm90.cuh"
#include "gemm/grouped_maps_sm90.h"
#include "played_copies.h"
#include "played_values.h"

namespace dsc {
namespace {

using T = __nv_bfloat16;
using tests::Bits;
using tests::float_of;
using tests::kPoison;
constexpr FloatType kType = FloatType::kBfloat16;

bool leaves_rows = false;  // a planted mistake: rows past an expert's last stay in the weight gradient

// ---- what the hardware does ----

template <typename Boxes>
void play_copies(const Boxes& boxes, char* ring, size_t target, int k_block) {
    for (int box = 0; box < Boxes::kNumBoxes; ++box) {
        tests::play_box(*boxes.map, boxes.box_place(k_block, box), ring,
                        target + static_cast<size_t>(box) * Boxes::kBoxLines * kLineBytes);
    }
}

// Line m and k of an operand in a stage.
template <Major kMajor>
float element_at(const char* operand, int m, int k) {
    const size_t byte = kMajor == Major::kK ? size_t{kLineBytes} * m + 2 * k
                                            : size_t{kTileK * kLineBytes} * (m / kTileK) +
                                                  size_t{kLineBytes} * k + 2 * (m % kTileK);
    return float_of(
        *reinterpret_cast<const uint16_t*>(operand + (byte ^ (byte / kLineBytes % 8 * kWordBytes))));
}

template <typename S>
void play_products(WarpgroupSums<S>& sums, const char* a, const char* b) {
    const SumsPlace place = sums_place<S>(static_cast<int>(threadIdx.x));
    for (int i = 0; i < 4 * S::kBlocksN; ++i) {
        const int row = place.row + 8 * (i / 2 % 2);
        const int column = place.column + 8 * (i / 4) + 2 * static_cast<int>(threadIdx.x % 4) + i % 2;
        for (int k = 0; k < kTileK; ++k) {
            sums[i] += element_at<S::kMajorA>(a, row, k) * element_at<S::kMajorB>(b, column, k);
        }
    }
}

// The kernel of grouped_gemm_sm90.cuh with one role after the other.
template <typename S, typename Job>
__global__ void played_kernel(const TensorMaps maps, const Job job) {
    DSC_SHARED(GroupTable, table);
    DSC_SHARED_DYNAMIC(char, shared);
    char* const ring =
        shared + (kRingAlignment - reinterpret_cast<uintptr_t>(shared) % kRingAlignment) % kRingAlignment;
    wait_for_previous_kernel();
    job.fill(table);
    const bool multiplies = threadIdx.x >= kWarpgroup;
    const int num_pairs = job.num_tile_pairs(table);
    for (int idx = static_cast<int>(blockIdx.x) / kCluster; idx < num_pairs;
         idx += static_cast<int>(gridDim.x) / kCluster) {
        const ProductTile tile = job.tile_at(table, idx, static_cast<int>(blockIdx.x % kCluster));
        WarpgroupSums<S> sums{};
        for (int k_block = 0; k_block < tile.num_k_blocks; ++k_block) {
            const int stage = k_block % S::kStages;
            const size_t a = size_t{S::kBytesA} * stage,
                         b = size_t{S::kStages} * S::kBytesA + size_t{S::kBytesB} * stage;
            if (threadIdx.x == 0) {
                play_copies(job.a_of(maps, tile), ring, a, k_block);
                play_copies(job.b_of(maps, tile), ring, b, k_block);
            }
            __syncthreads();
            if (multiplies and not leaves_rows) job.prepare(ring, tile, stage, k_block);
            __syncthreads();
            if (multiplies) play_products<S>(sums, ring + a, ring + b);
            __syncthreads();
        }
        if (multiplies) job.store(sums, tile);
    }
}

template <typename S, typename Job>
void play(const TensorMapSpec& rows, const TensorMapSpec& columns, const Job& job) {
    check_tensor_map(rows);
    check_tensor_map(columns);
    const TensorMaps maps{Job::kSwaps ? columns : rows, Job::kSwaps ? rows : columns};
    launch_overlapped(played_kernel<S, Job>, dim3(3 * kCluster), dim3(kNumThreadsSm90),
                      static_cast<size_t>(S::kRingBytes + kRingAlignment), nullptr, maps, job);
}

// ---- cases ----

const std::vector<int> kCounts{1, 0, 130, 17, 0, 64, 65, 129, 200};
constexpr int kRowsOfNone = 9;
std::mt19937 rng(1);
int num_wrong = 0;

struct Rows {
    std::vector<int32_t> ends;
    std::vector<int> expert;  // of each row that has one
    int num_used = 0, num_rows = 0;

    Rows() {
        for (size_t e = 0; e < kCounts.size(); ++e) {
            num_used += kCounts[e];
            ends.push_back(num_used);
            expert.insert(expert.end(), static_cast<size_t>(kCounts[e]), static_cast<int>(e));
        }
        num_rows = num_used + kRowsOfNone;
    }
    int num_experts() const { return static_cast<int>(ends.size()); }
};
const Rows kRows;

Bits random_bits(size_t size, float scale) {
    Bits bits(size + 8);  // boxes of the last row may not run past it
    std::normal_distribution<float> normal(0, scale);
    for (uint16_t& element : bits) {
        const T value = __float2bfloat16_rn(normal(rng));
        std::memcpy(&element, &value, sizeof(element));
    }
    return bits;
}

// Rows of x, NaN in those of no expert.
Bits random_rows(int width) {
    Bits bits = random_bits(static_cast<size_t>(kRows.num_rows) * width, 1);
    std::fill(bits.begin() + int64_t{kRows.num_used} * width, bits.end(), kPoison);
    return bits;
}

// An output of NaN with eight elements on each side.
template <typename E>
struct Output {
    std::vector<E> memory;
    explicit Output(size_t size) : memory(size + 16) {
        std::fill(memory.begin(), memory.end(),
                  std::is_same_v<E, float> ? static_cast<E>(NAN) : static_cast<E>(kPoison));
    }
    E* data() { return memory.data() + 8; }
    double value(size_t i) const {
        if constexpr (std::is_same_v<E, float>)
            return memory[i + 8];
        else
            return float_of(memory[i + 8]);
    }
    bool is_guarded() const {
        bool is_whole = true;
        for (size_t i = 0; i < 8; ++i) {
            is_whole = is_whole and std::isnan(value(i - 8)) and std::isnan(value(memory.size() - 16 + i));
        }
        return is_whole;
    }
};

template <typename E>
void report(const char* name, const Output<E>& got, const std::vector<double>& wanted, double most) {
    double difference = 0, scale = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
        const double value = got.value(i);
        difference += (value - wanted[i]) * (value - wanted[i]);
        scale += value * value + wanted[i] * wanted[i];
    }
    const bool is_right = difference <= most * scale and got.is_guarded();  // false for NaN
    num_wrong += not is_right;
    std::printf("%-24s %.2g %s\n", name, difference / scale, is_right ? "right" : "WRONG");
}

// rows [M, depth] @ w [E, ...] in float64; w_at(expert, column, k) is where w's element lies.
template <typename At>
std::vector<double> products(const Bits& x, const Bits& w, int num_columns, int depth, const At& w_at) {
    std::vector<double> y(static_cast<size_t>(kRows.num_rows) * num_columns);
    for (int m = 0; m < kRows.num_used; ++m) {
        for (int n = 0; n < num_columns; ++n) {
            double sum = 0;
            for (int k = 0; k < depth; ++k) {
                sum += double{float_of(x[size_t(m) * depth + k])} * float_of(w[w_at(kRows.expert[m], n, k)]);
            }
            y[size_t(m) * num_columns + n] = sum;
        }
    }
    return y;
}

template <typename S, bool kSwaps>
void check_product(const char* name, int num_columns, int depth) {
    constexpr bool kTurned = S::kMajorB == Major::kMN;
    const Bits x = random_rows(depth),
               w = random_bits(size_t(kRows.num_experts()) * num_columns * depth, 0.1f);
    Output<uint16_t> y(size_t(kRows.num_rows) * num_columns);
    using Job = ProductSm90<S, kSwaps>;
    const Job job{{.p = {.x = x.data(),
                         .w = w.data(),
                         .y = y.data(),
                         .offsets = kRows.ends.data(),
                         .row_idx = nullptr,
                         .num_rows = kRows.num_rows,
                         .num_source_rows = kRows.num_rows,
                         .num_experts = kRows.num_experts(),
                         .num_columns = num_columns,
                         .depth = depth,
                         .is_w_transposed = kTurned,
                         .type = kType}}};
    play<S>(rows_map<typename Job::Rows>("x", x.data(), kType, kRows.num_rows, depth),
            weights_map<typename Job::Columns>(w.data(), kType, kRows.num_experts(),
                                               kTurned ? depth : num_columns, kTurned ? num_columns : depth),
            job);
    report(name, y,
           products(x, w, num_columns, depth,
                    [&](int e, int n, int k) {
                        return kTurned ? (size_t(e) * depth + k) * num_columns + n
                                       : (size_t(e) * num_columns + n) * depth + k;
                    }),
           1e-5);
}

template <typename S, bool kSwaps>
void check_swiglu(const char* name, int width, int depth) {
    const Bits x = random_rows(depth), w = random_bits(size_t(kRows.num_experts()) * 2 * width * depth, 0.1f);
    Output<uint16_t> hidden(size_t(kRows.num_rows) * width), gate_up(size_t(kRows.num_rows) * 2 * width);
    using Job = SwigluSm90<S, kSwaps>;
    const Job job{{.p = {.x = x.data(),
                         .w = w.data(),
                         .hidden = hidden.data(),
                         .gate_up = gate_up.data(),
                         .offsets = kRows.ends.data(),
                         .row_idx = nullptr,
                         .num_rows = kRows.num_rows,
                         .num_source_rows = kRows.num_rows,
                         .num_experts = kRows.num_experts(),
                         .width = width,
                         .depth = depth,
                         .type = kType}}};
    play<S>(rows_map<typename Job::Rows>("x", x.data(), kType, kRows.num_rows, depth),
            gate_up_map<typename Job::Columns>(w.data(), kType, kRows.num_experts(), width, depth), job);
    const std::vector<double> both = products(
        x, w, 2 * width, depth, [&](int e, int n, int k) { return (size_t(e) * 2 * width + n) * depth + k; });
    std::vector<double> wanted(size_t(kRows.num_rows) * width);
    for (size_t i = 0; i < wanted.size(); ++i) {
        const size_t at = i / width * 2 * width + i % width;
        wanted[i] = both[at] / (1 + std::exp(-both[at])) * both[at + width];
    }
    report(name, gate_up, both, 1e-5);
    report(name, hidden, wanted, 2e-5);
}

template <typename S>
void check_swiglu_backward(const char* name, int width, int depth) {
    const Bits grad = random_rows(depth), gate_up = random_rows(2 * width);
    const Bits w = random_bits(size_t(kRows.num_experts()) * depth * width, 0.1f);
    Output<uint16_t> got(size_t(kRows.num_rows) * 2 * width);
    using Job = SwigluBackwardSm90<S>;
    const Job job{{.p = {.grad = grad.data(),
                         .w = w.data(),
                         .gate_up = gate_up.data(),
                         .grad_gate_up = got.data(),
                         .offsets = kRows.ends.data(),
                         .num_rows = kRows.num_rows,
                         .num_experts = kRows.num_experts(),
                         .width = width,
                         .depth = depth,
                         .type = kType}}};
    play<S>(rows_map<typename Job::Rows>("grad", grad.data(), kType, kRows.num_rows, depth),
            weights_map<typename Job::Columns>(w.data(), kType, kRows.num_experts(), depth, width), job);
    const std::vector<double> grad_hidden = products(
        grad, w, width, depth, [&](int e, int n, int k) { return (size_t(e) * depth + k) * width + n; });
    std::vector<double> wanted(size_t(kRows.num_rows) * 2 * width);
    for (size_t i = 0; i < size_t(kRows.num_used) * width; ++i) {
        const size_t at = i / width * 2 * width + i % width;
        const double gate = float_of(gate_up[at]), up = float_of(gate_up[at + width]);
        const double sigmoid = 1 / (1 + std::exp(-gate));
        wanted[at] = grad_hidden[i] * up * (sigmoid + gate * sigmoid * (1 - sigmoid));
        wanted[at + width] = grad_hidden[i] * gate * sigmoid;
    }
    report(name, got, wanted, 2e-5);
}

template <typename Out>
void check_weight_gradient(const char* name, int num_columns, int depth, bool accumulates) {
    using S = WarpgroupTile<T, 128, 256, 4, Major::kMN, Major::kMN>;
    const Bits grad = random_rows(num_columns), x = random_rows(depth);
    std::vector<double> wanted(size_t(kRows.num_experts()) * num_columns * depth);
    Output<std::conditional_t<std::is_same_v<Out, float>, float, uint16_t>> got(wanted.size());
    for (size_t i = 0; accumulates and i < wanted.size(); ++i) {
        wanted[i] = static_cast<double>(i % 7);
        const Out old = static_cast<Out>(static_cast<float>(i % 7));
        std::memcpy(got.data() + i, &old, sizeof(old));
    }
    for (int m = 0; m < kRows.num_used; ++m) {
        for (int n = 0; n < num_columns; ++n) {
            for (int k = 0; k < depth; ++k) {
                wanted[(size_t(kRows.expert[m]) * num_columns + n) * depth + k] +=
                    double{float_of(grad[size_t(m) * num_columns + n])} * float_of(x[size_t(m) * depth + k]);
            }
        }
    }
    using Job = WeightGradientSm90<S, Out>;
    const Job job{{.grad = grad.data(),
                   .x = x.data(),
                   .grad_w = got.data(),
                   .offsets = kRows.ends.data(),
                   .row_idx = nullptr,
                   .num_rows = kRows.num_rows,
                   .num_source_rows = kRows.num_rows,
                   .num_experts = kRows.num_experts(),
                   .num_columns = num_columns,
                   .depth = depth,
                   .is_float32 = std::is_same_v<Out, float>,
                   .accumulates = accumulates,
                   .type = kType}};
    play<S>(rows_map<typename Job::A>("grad", grad.data(), kType, kRows.num_rows, num_columns),
            rows_map<typename Job::B>("x", x.data(), kType, kRows.num_rows, depth), job);
    report(name, got, wanted, std::is_same_v<Out, float> ? 1e-10 : 1e-5);
}

// ---- the tiles alone ----

// A line for each block's part of each pair: job, pair, rank, group, row, column, k blocks, what is shared.
template <typename Job>
__global__ void list_tiles(const char* name, const Job job) {
    DSC_SHARED(GroupTable, table);
    wait_for_previous_kernel();
    job.fill(table);
    if (threadIdx.x > 0) return;
    for (int idx = 0; idx < job.num_tile_pairs(table); ++idx) {
        for (int rank = 0; rank < kCluster; ++rank) {
            const ProductTile tile = job.tile_at(table, idx, rank);
            std::printf("%s %d %d %d %d %d %d %d\n", name, idx, rank, tile.group, tile.row, tile.column,
                        tile.num_k_blocks, static_cast<int>(tile.shares_rows));
        }
    }
}

template <typename Params>
Params sizes_alone(int num_columns, int depth) {
    Params p{};
    p.offsets = kRows.ends.data();
    p.num_rows = p.num_source_rows = kRows.num_rows;
    p.num_experts = kRows.num_experts();
    p.num_columns = num_columns;
    p.depth = depth;
    return p;
}

template <typename Job>
void list(const char* name, const Job& job) {
    launch_overlapped(list_tiles<Job>, dim3(1), dim3(kNumThreadsSm90), 0, nullptr, name, job);
}

void list_all() {
    using Large = WarpgroupTile<T, 128, 256, 4, Major::kK, Major::kK>;
    using Fewest = WarpgroupTile<T, 128, 32, 10, Major::kK, Major::kK>;
    using Turned = WarpgroupTile<T, 128, 256, 4, Major::kMN, Major::kMN>;
    const auto p = sizes_alone<GroupedGemmParams>(600, 152);
    list("rows", ProductSm90<Large, false>{{.p = p}});
    list("swapped", ProductSm90<Fewest, true>{{.p = p}});
    list("gradient", WeightGradientSm90<Turned, T>{sizes_alone<GroupedWeightGradientParams>(300, 600)});
}

void check_all() {
    using Large = WarpgroupTile<T, 128, 256, 4, Major::kK, Major::kK>;
    using LargeTurned = WarpgroupTile<T, 128, 256, 4, Major::kK, Major::kMN>;
    using Small = WarpgroupTile<T, 64, 256, 5, Major::kK, Major::kK>;
    using SmallTurned = WarpgroupTile<T, 64, 256, 5, Major::kK, Major::kMN>;
    using Few = WarpgroupTile<T, 128, 64, 8, Major::kK, Major::kK>;
    using Fewest = WarpgroupTile<T, 128, 32, 10, Major::kK, Major::kK>;
    check_product<Large, false>("128x256", 336, 152);
    check_product<Large, false>("128x256 least", 8, 8);
    check_product<LargeTurned, false>("128x256 turned", 336, 72);
    check_product<Small, false>("64x256", 536, 152);
    check_product<SmallTurned, false>("64x256 turned", 264, 72);
    check_product<Few, true>("64x128", 336, 152);
    check_product<Fewest, true>("32x128", 136, 72);
    check_swiglu<Large, false>("128x256 swiglu", 168, 72);
    check_swiglu<Small, false>("64x256 swiglu", 136, 72);
    check_swiglu<Few, true>("64x128 swiglu", 168, 72);
    check_swiglu<Fewest, true>("32x128 swiglu", 72, 152);
    check_swiglu_backward<LargeTurned>("128x256 backward", 264, 72);
    check_swiglu_backward<SmallTurned>("64x256 backward", 136, 72);
    for (const bool accumulates : {false, true}) {
        check_weight_gradient<T>("gradient", 136, 264, accumulates);
        check_weight_gradient<float>("gradient float32", 136, 264, accumulates);
    }
}

}  // namespace
}  // namespace dsc

int main(int argc, char** argv) {
    const std::string_view mode = argc > 1 ? argv[1] : "";
    dsc::leaves_rows = mode == "planted";
    if (mode == "tiles") {
        dsc::list_all();
    } else {
        dsc::check_all();
    }
    return dsc::num_wrong == 0 ? 0 : 1;
}
