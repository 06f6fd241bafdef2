// Where things lie in the sm_90a products, without a GPU: the copy engine is played on the CPU, from the maps
// and boxes the kernels use into a ring in memory, and the ring is read back through CuTe's layouts, from
// which wgmma's descriptors are made. Prints what is wrong, and how much was compared.
#include <cstdio>
#include <set>
#include <utility>
#include <vector>

#include "gemm/grouped_gemm_launch_sm90.cuh"
#include "gemm/grouped_gemm_wgrad_sm90.cuh"
#include "played_copies.h"
#include "played_layouts.h"

namespace dsc {
namespace {

using tests::num_compared;
using tests::num_wrong;
using tests::swizzle_lines;
using tests::value_at;

void compare(const char* what, int64_t got, int64_t wanted, const char* where, int i, int j) {
    ++num_compared;
    if (got == wanted) return;
    if (num_wrong++ < 10) {
        std::printf("%s %s: (%d, %d) is %lld, wanted %lld\n", what, where, i, j, static_cast<long long>(got),
                    static_cast<long long>(wanted));
    }
}

// One operand of a stage for one block: its own copies, or both blocks' halves.
template <typename Boxes>
void load_stage(const TensorMapSpec& map, const Boxes& boxes, char* ring, size_t target, int k_block,
                bool is_shared) {
    const int per_rank = Boxes::kNumBoxes / (is_shared ? kCluster : 1);
    for (int rank = 0; rank < (is_shared ? kCluster : 1); ++rank) {
        for (int i = 0; i < per_rank; ++i) {
            const int box = rank * per_rank + i;
            tests::play_box(map, boxes.box_place(k_block, box), ring,
                            target + static_cast<size_t>(box) * Boxes::kBoxLines * kLineBytes, swizzle_lines);
        }
    }
}

// ---- operands ----

struct Sizes {
    int experts, rows, columns, depth;  // of x [rows, depth] and w [experts, columns, depth]
};

// What line `m` and k of an operand's tile must be, from the tensor's meaning.
uint16_t wanted_at(Form form, const Sizes& s, int first, int group, int m, int k) {
    const int line = first + m;
    switch (form) {
        case Form::kRows:
            return line < s.rows and k < s.depth ? value_at(int64_t{line} * s.depth + k) : 0;
        case Form::kRowDepth:
            return group + k < s.rows and line < s.depth ? value_at(int64_t{group + k} * s.depth + line) : 0;
        case Form::kWeights:
            return line < s.columns and k < s.depth
                       ? value_at((int64_t{group} * s.columns + line) * s.depth + k)
                       : 0;
        case Form::kWeightDepth:
            return k < s.depth and line < s.columns
                       ? value_at((int64_t{group} * s.depth + k) * s.columns + line)
                       : 0;
        case Form::kGateUp: {
            const int width = s.columns / 2, f = first + m / 16 * 8 + m % 8, which = m / 8 % 2;
            return f < width and k < s.depth
                       ? value_at((int64_t{group} * s.columns + which * width + f) * s.depth + k)
                       : 0;
        }
    }
    return 0;
}

template <typename Boxes>
TensorMapSpec spec_of(const void* base, const Sizes& s) {
    constexpr FloatType kType = FloatType::kBfloat16;
    if (Boxes::kForm == Form::kRows or Boxes::kForm == Form::kRowDepth) {
        return rows_map<Boxes>("x", base, kType, s.rows, s.depth);
    }
    if (Boxes::kForm == Form::kWeights) {
        return weights_map<Boxes>(base, kType, s.experts, s.columns, s.depth);
    }
    if (Boxes::kForm == Form::kWeightDepth) {
        return weights_map<Boxes>(base, kType, s.experts, s.depth, s.columns);
    }
    return gate_up_map<Boxes>(base, kType, s.experts, s.columns / 2, s.depth);
}

// All stages of one operand, its own copies and shared ones, read back through CuTe's layout.
template <typename S, typename Boxes, typename Ring>
void check_operand(const char* name, const Sizes& s, int first, int group) {
    using Element = typename WarpgroupMma<S>::Element;
    constexpr int kLines = decltype(cute::size<0>(Ring{}))::value;
    static_assert(kLines == Boxes::kNumBoxes * Boxes::kBoxLines);
    const int64_t num_elements =
        std::max(int64_t{s.rows} * s.depth, int64_t{s.experts} * s.columns * s.depth);
    std::vector<uint16_t> memory(static_cast<size_t>(num_elements) + 8);
    uint16_t* const base = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16 / 2;
    for (int64_t i = 0; i < num_elements; ++i) base[i] = value_at(i);
    const TensorMapSpec map = spec_of<Boxes>(base, s);
    check_tensor_map(map);
    const Boxes boxes{.map = nullptr, .first = first, .group = group, .hint = 0};
    std::vector<char> bytes(size_t{S::kStages} * kLines * kLineBytes + kRingAlignment);
    char* const ring =
        bytes.data() + (kRingAlignment - reinterpret_cast<uintptr_t>(bytes.data()) % kRingAlignment);
    const auto tensor = cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Element*>(ring)), Ring{});
    for (const bool is_shared : {false, true}) {
        for (int stage = 0; stage < S::kStages; ++stage) {
            load_stage(map, boxes, ring, size_t{kLines} * kLineBytes * stage, stage, is_shared);
        }
        for (int stage = 0; stage < S::kStages; ++stage) {
            for (int m = 0; m < kLines; ++m) {
                for (int k = 0; k < kTileK; ++k) {
                    const Element& got = tensor(m, k, stage);
                    compare(name, reinterpret_cast<const uint16_t&>(got),
                            wanted_at(Boxes::kForm, s, first, group, m, stage * kTileK + k), "operand", m, k);
                }
            }
        }
    }
}

template <typename S, typename Job>
void check_job(const char* name, const Sizes& s) {
    using A = std::conditional_t<Job::kSwaps, typename Job::Columns, typename Job::Rows>;
    using B = std::conditional_t<Job::kSwaps, typename Job::Rows, typename Job::Columns>;
    for (const int first : {0, 8, s.rows - 3}) {
        check_operand<S, A, typename WarpgroupMma<S>::RingA>(name, s, Job::kSwaps ? first / 8 * 8 : first,
                                                             s.experts - 1);
        check_operand<S, B, typename WarpgroupMma<S>::RingB>(name, s, Job::kSwaps ? first : first / 8 * 8,
                                                             s.experts - 1);
    }
}

// ---- sums ----

// Which element of the tile each sum of each thread is, by CuTe and by sums_place.
template <typename S>
void check_sums(const char* name) {
    using namespace cute;
    typename WarpgroupMma<S>::Mma mma;
    const auto tile = make_identity_tensor(Shape<Int<S::kM>, Int<S::kN>>{});
    for (int thread = kWarpgroup; thread < kNumThreadsSm90; ++thread) {
        const auto part = mma.get_slice(thread - kWarpgroup).partition_C(tile);
        const SumsPlace place = sums_place<S>(thread);
        for (int i = 0; i < 4 * S::kBlocksN; ++i) {
            const auto at = part(i);
            const int row = place.row + 8 * (i / 2 % 2);
            const int column = place.column + 8 * (i / 4) + 2 * (thread % 4) + i % 2;
            compare(name, get<0>(at), row, "row of sum", thread, i);
            compare(name, get<1>(at), column, "column of sum", thread, i);
        }
    }
}

// ---- pairs ----

template <bool kSwaps>
void check_pairs(int row_tiles, int column_tiles) {
    std::set<std::pair<int, int>> seen;
    int num_void = 0;
    for (int idx = 0; idx < num_pairs<kSwaps>(row_tiles, column_tiles); ++idx) {
        TilePair pair[kCluster];
        for (int rank = 0; rank < kCluster; ++rank) {
            pair[rank] = pair_at<kSwaps>(idx, row_tiles, column_tiles, rank);
            const auto [row, column, shares_rows] = pair[rank];
            if (column == column_tiles) {
                ++num_void;
                continue;
            }
            const bool is_new = seen.emplace(row, column).second;
            compare("pair", is_new and row < row_tiles and column < column_tiles, 1, "is new", row, column);
        }
        compare("pair", pair[0].shares_rows, pair[1].shares_rows, "agrees", row_tiles, column_tiles);
        const bool is_shared = pair[0].shares_rows ? pair[0].row_tile == pair[1].row_tile
                                                   : pair[0].column_tile == pair[1].column_tile;
        compare("pair", is_shared, 1, "shares", row_tiles, column_tiles);
    }
    compare("pairs", static_cast<int64_t>(seen.size()), row_tiles * column_tiles, "cover", row_tiles,
            column_tiles);
    const int most_void = kSwaps ? row_tiles * (column_tiles % 2) : row_tiles % 2 * (column_tiles % 2);
    compare("pairs", num_void, most_void, "without a tile", row_tiles, column_tiles);
}

void check_all() {
    using T = __nv_bfloat16;
    using Large = WarpgroupTile<T, 128, 256, 4, Major::kK, Major::kK>;
    using LargeTurned = WarpgroupTile<T, 128, 256, 4, Major::kK, Major::kMN>;
    using Small = WarpgroupTile<T, 64, 256, 5, Major::kK, Major::kK>;
    using SmallTurned = WarpgroupTile<T, 64, 256, 5, Major::kK, Major::kMN>;
    using Few = WarpgroupTile<T, 128, 64, 8, Major::kK, Major::kK>;
    using Fewest = WarpgroupTile<T, 128, 32, 10, Major::kK, Major::kK>;
    using Gradient = WarpgroupTile<T, 128, 256, 4, Major::kMN, Major::kMN>;
    const Sizes sizes{.experts = 2, .rows = 203, .columns = 336, .depth = 152};
    check_job<Large, ProductSm90<Large>>("128x256", sizes);
    check_job<LargeTurned, ProductSm90<LargeTurned>>("128x256 turned", sizes);
    check_job<Large, SwigluSm90<Large>>("128x256 swiglu", sizes);
    check_job<Small, ProductSm90<Small>>("64x256", sizes);
    check_job<Small, SwigluSm90<Small>>("64x256 swiglu", sizes);
    check_job<SmallTurned, SwigluBackwardSm90<SmallTurned>>("64x256 backward", sizes);
    check_job<Few, ProductSm90<Few, true>>("64x128", sizes);
    check_job<Few, SwigluSm90<Few, true>>("64x128 swiglu", sizes);
    check_job<Fewest, ProductSm90<Fewest, true>>("32x128", sizes);
    check_job<Fewest, SwigluSm90<Fewest, true>>("32x128 swiglu", sizes);
    using Job = WeightGradientSm90<Gradient, T>;
    for (const int first_row : {0, 1, 77, 202}) {
        check_operand<Gradient, typename Job::A, typename WarpgroupMma<Gradient>::RingA>("gradient a", sizes,
                                                                                         64, first_row);
        check_operand<Gradient, typename Job::B, typename WarpgroupMma<Gradient>::RingB>("gradient b", sizes,
                                                                                         0, first_row);
    }
    check_sums<Large>("128x256");
    check_sums<Small>("64x256");
    check_sums<SmallTurned>("64x256 turned");
    check_sums<Few>("64x128");
    check_sums<Fewest>("32x128");
    check_sums<Gradient>("gradient");
    for (int row_tiles = 0; row_tiles < 20; ++row_tiles) {
        for (int column_tiles = 1; column_tiles < 14; ++column_tiles) {
            check_pairs<false>(row_tiles, column_tiles);
            check_pairs<true>(row_tiles, column_tiles);
        }
    }
}

}  // namespace
}  // namespace dsc

int main(int argc, char**) {
    return dsc::tests::main_of(argc > 1, dsc::check_all);
}
