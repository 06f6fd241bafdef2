// Which kernel a grouped product gets: the tile, the ring, how many blocks. Pure functions of the sizes and
// of the device, in plain C++, so that a build without kernels answers too. Nothing here depends on how the
// rows fall to the experts, which the device alone knows: a plan holds for all of them.
//
// The cost of a tile is what its SM spends on a block of the depth, the slowest of three: multiplying,
// moving fragments through shared memory, bringing operands from L2. Rows that fill an expert's last tile in
// part, columns past the end and the last wave count as what they keep busy.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>

#include "core/check.h"

namespace dsc {

constexpr int kGemmMaxExperts = 512;
constexpr int kGemmDepthBlock = 64;  // elements of the depth in one stage of a ring
constexpr int kGroupTableBytes = 8 * (kGemmMaxExperts + 2);
constexpr int kStaticBytes = (kGroupTableBytes + 127) / 128 * 128;  // of shared memory, below an aligned ring

enum class GemmArch { kAuto, kSm80, kSm90 };
enum class GemmStep { kForward, kInputGradient, kSwiglu, kSwigluBackward, kWeightGradient };

// The caller's wish: "auto", or a tile by its name.
struct GemmChoice {
    GemmArch arch = GemmArch::kAuto;
    std::string_view tile = "auto";
};

// As in the params of gemm.h: the result has num_columns columns; a weight gradient has num_columns rows and
// `depth` columns for each expert.
struct GemmSizes {
    GemmStep step;
    int64_t num_rows;
    int num_experts, num_columns, depth;
    bool gathers = false;  // rows of x by row_idx
};

// ---- what a device has ----

struct GemmDevice {
    int num_sms;
    int shared_per_sm, shared_per_block;  // bytes
    int threads_per_sm;
    int multiply_adds, l2_bytes;  // of one SM in one cycle: by mma.sync; read by all SMs at once
    bool is_sm90;
};

constexpr int kRegistersPerSm = 65536;
constexpr int kSharedPerBlock = 1024;  // that the system takes

inline GemmDevice gemm_device(int major, int minor, int num_sms) {
    const bool is_small = major == 8 and (minor == 6 or minor == 9);
    DSC_CHECK(major == 8 or (major == 9 and minor == 0),
              "grouped_gemm: there are kernels for compute capability 8.x and 9.0, got ", major, ".", minor);
    DSC_CHECK(num_sms > 0, "grouped_gemm: num_sms must be > 0, got ", num_sms);
    const int shared_per_sm = 1024 * (major == 9 ? 228 : is_small ? 100 : 164);
    return {.num_sms = num_sms,
            .shared_per_sm = shared_per_sm,
            .shared_per_block = shared_per_sm - kSharedPerBlock,
            .threads_per_sm = is_small ? 1536 : 2048,
            .multiply_adds = major == 9 ? 1280
                             : is_small ? 512
                                        : 1024,
            .l2_bytes = major == 9 ? 32 : 40,
            .is_sm90 = major == 9};
}

// ---- what a tile takes ----

// A tile of kernels on mma.sync. `registers`: a thread's, at most, which the build contract holds them to.
struct Sm80Tile {
    const char* name;
    int rows, columns, warps_m, warps_n, num_stages, registers;

    constexpr int num_threads() const { return 32 * warps_m * warps_n; }
    constexpr int stage_bytes() const { return (rows + columns) * kGemmDepthBlock * 2; }
    constexpr int ring_bytes() const { return num_stages * stage_bytes(); }
};

// For decoding, for a few hundred rows an expert, and for many.
constexpr std::array<Sm80Tile, 3> kSm80Tiles{{
    {.name = "16x128",
     .rows = 16,
     .columns = 128,
     .warps_m = 1,
     .warps_n = 4,
     .num_stages = 4,
     .registers = 128},
    {.name = "64x128",
     .rows = 64,
     .columns = 128,
     .warps_m = 2,
     .warps_n = 2,
     .num_stages = 3,
     .registers = 224},
    {.name = "128x256",
     .rows = 128,
     .columns = 256,
     .warps_m = 2,
     .warps_n = 4,
     .num_stages = 3,
     .registers = 255},
}};

// The first tile that a step has: the gradients come with many rows.
constexpr int first_sm80_tile(GemmStep step) {
    return step == GemmStep::kForward or step == GemmStep::kSwiglu ? 0 : 1;
}

// 0: the tile does not fit the device.
constexpr int blocks_per_sm(const Sm80Tile& tile, const GemmDevice& device) {
    const int shared_bytes = tile.ring_bytes() + kStaticBytes;
    if (shared_bytes > device.shared_per_block) return 0;
    const int registers = (tile.registers + 7) / 8 * 8 * tile.num_threads();
    return std::min({device.shared_per_sm / (shared_bytes + kSharedPerBlock), kRegistersPerSm / registers,
                     device.threads_per_sm / tile.num_threads()});
}

// ---- what a tile costs ----

constexpr int64_t parts_of(int64_t size, int64_t part) {
    return (size + part - 1) / part;
}

// Columns of the result that a tile of `columns` columns of w makes: a SwiGLU takes two for each.
constexpr int result_columns(GemmStep step, int columns) {
    return step == GemmStep::kSwiglu ? columns / 2 : columns;
}

// Tiles of all experts, on average over how the rows may fall: an expert's last one is half full.
constexpr double expected_tiles(const GemmSizes& sizes, int rows, int columns) {
    if (sizes.step == GemmStep::kWeightGradient) {
        return static_cast<double>(sizes.num_experts) *
               static_cast<double>(parts_of(sizes.num_columns, rows)) *
               static_cast<double>(parts_of(sizes.depth, columns));
    }
    const auto num_rows = static_cast<double>(sizes.num_rows);
    const double num_used = std::min(num_rows, static_cast<double>(std::max(sizes.num_experts, 1)));
    const double row_tiles = std::max(num_used, num_rows / rows + num_used / 2);
    return row_tiles * static_cast<double>(parts_of(sizes.num_columns, result_columns(sizes.step, columns)));
}

// At most, however the rows fall.
constexpr int64_t most_tiles(const GemmSizes& sizes, int rows, int columns) {
    if (sizes.step == GemmStep::kWeightGradient) {
        return sizes.num_experts * parts_of(sizes.num_columns, rows) * parts_of(sizes.depth, columns);
    }
    const int64_t num_groups = std::min<int64_t>(sizes.num_rows, sizes.num_experts + 1);
    const int64_t row_tiles = std::min(sizes.num_rows, sizes.num_rows / rows + num_groups);
    return row_tiles * parts_of(sizes.num_columns, result_columns(sizes.step, columns));
}

// Blocks of the depth in one tile, on average.
constexpr double expected_depth_blocks(const GemmSizes& sizes) {
    if (sizes.step != GemmStep::kWeightGradient)
        return static_cast<double>(parts_of(sizes.depth, kGemmDepthBlock));
    const double num_rows = static_cast<double>(sizes.num_rows) / std::max(sizes.num_experts, 1);
    return num_rows / kGemmDepthBlock + 0.5;
}

constexpr double kEndOfTile = 3000;  // cycles to fill the ring and to store the sums

// Cycles until the last SM is done. Blocks that share an SM hide each other's ends of tiles.
constexpr double sm80_cycles(const GemmSizes& sizes, const Sm80Tile& tile, const GemmDevice& device) {
    constexpr double kSharedBytes = 128;  // of an SM in one cycle
    const int num_resident = blocks_per_sm(tile, device);
    const double multiply =
        static_cast<double>(tile.rows) * tile.columns * kGemmDepthBlock / device.multiply_adds;
    const double fragment_bytes =
        (tile.rows * tile.warps_n + tile.columns * tile.warps_m) * kGemmDepthBlock * 2.0;
    const double shared = (fragment_bytes + tile.stage_bytes()) / kSharedBytes;
    const double l2 = static_cast<double>(tile.stage_bytes()) / device.l2_bytes;
    const double cycles = expected_depth_blocks(sizes) * std::max({multiply, shared, l2}) +
                          kEndOfTile / (num_resident * num_resident);
    const double num_waves = expected_tiles(sizes, tile.rows, tile.columns) / (device.num_sms * num_resident);
    return std::max(1.0, num_waves + 0.5) * num_resident * cycles;
}

// ---- the plan ----

struct GemmPlan {
    GemmArch arch;
    std::string_view tile;
    int tile_idx;  // in the arch's table
    int num_stages, cluster, num_threads, registers;
    int shared_bytes;               // dynamic; the table of groups comes on top
    int blocks_per_sm, num_blocks;  // 0: nothing to do
    bool multicasts = false;        // sm90: what both blocks of a cluster need is brought once
    int skew_blocks = 0;            // sm90: k blocks that one warpgroup is ahead of the other
};

inline GemmPlan sm80_plan(const GemmSizes& sizes, const GemmDevice& device, int tile_idx) {
    const Sm80Tile& tile = kSm80Tiles[tile_idx];
    const int num_resident = blocks_per_sm(tile, device);
    const int64_t num_tiles = most_tiles(sizes, tile.rows, tile.columns);
    DSC_CHECK(num_resident > 0, "grouped_gemm: a tile of ", tile.name, " needs ",
              tile.ring_bytes() + kStaticBytes, " bytes of shared memory, the device has ",
              device.shared_per_block);
    DSC_CHECK(num_tiles < int64_t{1} << 30, "grouped_gemm: at most 2^30 tiles, got ", num_tiles, " of ",
              tile.name);
    const int64_t most_blocks = int64_t{num_resident} * device.num_sms;
    return {.arch = GemmArch::kSm80,
            .tile = tile.name,
            .tile_idx = tile_idx,
            .num_stages = tile.num_stages,
            .cluster = 1,
            .num_threads = tile.num_threads(),
            .registers = tile.registers,
            .shared_bytes = tile.ring_bytes(),
            .blocks_per_sm = num_resident,
            .num_blocks = static_cast<int>(std::min(num_tiles, most_blocks))};
}

// The cheapest tile that fits, or the one asked for.
inline GemmPlan plan_sm80(const GemmSizes& sizes, const GemmDevice& device, std::string_view wanted) {
    int best = -1;
    double fewest = 0;
    for (int idx = first_sm80_tile(sizes.step); idx < static_cast<int>(kSm80Tiles.size()); ++idx) {
        if (wanted == kSm80Tiles[idx].name) return sm80_plan(sizes, device, idx);
        if (blocks_per_sm(kSm80Tiles[idx], device) == 0) continue;
        const double cycles = sm80_cycles(sizes, kSm80Tiles[idx], device);
        if (best < 0 or cycles < fewest) {
            best = idx;
            fewest = cycles;
        }
    }
    DSC_CHECK(wanted == "auto", "grouped_gemm: there is no tile of ", wanted, " for this step on sm80");
    return sm80_plan(sizes, device, best);
}

// ---- the kernels of sm_90a ----

// Whether kAuto may choose them. They compile, and a model of their pipeline holds (tests/csrc), but no GPU
// has run them: until one has, with `make gpu-check`, correctness comes first and arch="sm90" must be asked
// for.
constexpr bool kSm90IsProven = false;

constexpr int kSm90Cluster = 2;           // blocks that share an operand
constexpr int kSm90Threads = 3 * 128;     // one warpgroup loads, two multiply
constexpr int kSm90StartRegisters = 168;  // of a thread, before the warpgroups divide them anew
constexpr int kSm90LoadRegisters = 40, kSm90MultiplyRegisters = 232;
constexpr int kSm90StaticBytes = 5120;  // the table of groups and the barriers, up to the ring's 1024
constexpr int kSm90FewestStages = 3;    // to keep loads ahead of the products
// K blocks that one warpgroup is ahead of the other, so that one stores while the other multiplies. Fewer
// than stages: the one ahead must find its next stage full while the other still waits to begin.
constexpr int kSm90SkewBlocks = 2;
static_assert(kSm90SkewBlocks < kSm90FewestStages);

constexpr double kSm90Tflops = 650, kSm90L2Supply = 5.5;  // TFLOP/s to be fed; TB/s of L2, not measured

// A tile of wgmma: rows of x by lines of w. Swapped, for decoding: the lines are wgmma's rows, which come in
// 64s, and a tile need not have more rows of x than an expert has.
struct Sm90Tile {
    const char* name;
    int rows, columns, num_stages;
    bool swaps;
    int most_rows;  // an expert has on average, for the tile to be chosen

    constexpr int stage_bytes() const { return (rows + columns) * kGemmDepthBlock * 2; }
    constexpr int ring_bytes() const { return num_stages * stage_bytes(); }
    constexpr int sums_per_thread() const { return rows * columns / (kSm90Threads - 128); }
    // That a block asks of L2 for one block of the depth: one operand whole, of the other what the cluster
    // does not share: two tiles of rows share their columns, two swapped ones their rows.
    constexpr int l2_bytes(bool multicasts) const {
        const int whole = swaps ? columns : rows, shared = rows + columns - whole;
        return (whole + shared / (multicasts ? kSm90Cluster : 1)) * kGemmDepthBlock * 2;
    }
    // L2 to shared memory, in TB/s, at so many TFLOP/s.
    constexpr double l2_demand(double tflops, bool multicasts) const {
        return tflops * l2_bytes(multicasts) / (2.0 * rows * columns * kGemmDepthBlock);
    }
    // A copy for both blocks makes each wait for the other: only where L2 cannot feed them one by one.
    constexpr bool must_multicast() const { return l2_demand(kSm90Tflops, false) > kSm90L2Supply; }
};

constexpr std::array<Sm90Tile, 4> kSm90Tiles{{
    {.name = "32x128", .rows = 32, .columns = 128, .num_stages = 10, .swaps = true, .most_rows = 24},
    {.name = "64x128", .rows = 64, .columns = 128, .num_stages = 8, .swaps = true, .most_rows = 48},
    {.name = "64x256", .rows = 64, .columns = 256, .num_stages = 5, .swaps = false, .most_rows = 400},
    {.name = "128x256",
     .rows = 128,
     .columns = 256,
     .num_stages = 4,
     .swaps = false,
     .most_rows = std::numeric_limits<int>::max()},
}};

// What the large tiles rest on: L2 can feed them only where a cluster shares an operand.
static_assert(kSm90Tiles[3].must_multicast() and kSm90Tiles[3].l2_demand(kSm90Tflops, true) < kSm90L2Supply);

// Decoding has no gradients; a weight gradient has its rows as depth.
constexpr int first_sm90_tile(GemmStep step) {
    if (step == GemmStep::kForward or step == GemmStep::kSwiglu) return 0;
    return step == GemmStep::kWeightGradient ? 3 : 2;
}

// Registers, shared memory and stages.
constexpr bool fits_sm90(const Sm90Tile& tile, const GemmDevice& device) {
    constexpr int kBesidesSums = 96;  // addresses, descriptors, words on their way out
    constexpr int kRegisters = 128 * (kSm90LoadRegisters + 2 * kSm90MultiplyRegisters);
    static_assert(kRegisters <= kRegistersPerSm and kSm90Threads * kSm90StartRegisters <= kRegistersPerSm);
    return tile.ring_bytes() + kSm90StaticBytes <= device.shared_per_block and
           tile.sums_per_thread() + kBesidesSums <= kSm90MultiplyRegisters and
           tile.num_stages >= kSm90FewestStages;
}

// A tile's name may end in /1 to /4, the steps by which a kernel is brought up on a GPU: 1 two stages, loads
// of its own, warpgroups in step; 2 all stages; 3 multicast; 4 skew, which is also the plan without a step.
inline GemmPlan sm90_plan(const GemmSizes& sizes, const GemmDevice& device, int tile_idx, int step) {
    const Sm90Tile& tile = kSm90Tiles[tile_idx];
    DSC_CHECK(fits_sm90(tile, device), "grouped_gemm: a tile of ", tile.name, " needs ",
              tile.ring_bytes() + kSm90StaticBytes, " bytes of shared memory, the device has ",
              device.shared_per_block);
    const int64_t num_tiles = most_tiles(sizes, tile.rows, tile.columns);
    DSC_CHECK(num_tiles < int64_t{1} << 30, "grouped_gemm: at most 2^30 tiles, got ", num_tiles, " of ",
              tile.name);
    const int64_t num_clusters = std::min<int64_t>(num_tiles, device.num_sms / kSm90Cluster);
    return {.arch = GemmArch::kSm90,
            .tile = tile.name,
            .tile_idx = tile_idx,
            .num_stages = step == 1 ? 2 : tile.num_stages,
            .cluster = kSm90Cluster,
            .num_threads = kSm90Threads,
            .registers = kSm90StartRegisters,
            .shared_bytes = tile.ring_bytes(),
            .blocks_per_sm = 1,
            .num_blocks = static_cast<int>(num_clusters) * kSm90Cluster,
            .multicasts = step >= 3 and tile.must_multicast(),
            .skew_blocks = step >= 4 ? kSm90SkewBlocks : 0};
}

// Whether there is something to multiply, and a copy engine can bring it: the mma kernels write the zeros of
// a product without depth, and gather rows.
constexpr bool has_sm90(const GemmSizes& sizes, const GemmDevice& device) {
    return device.is_sm90 and device.num_sms >= kSm90Cluster and not sizes.gathers and sizes.num_rows > 0 and
           sizes.num_experts > 0 and sizes.num_columns > 0 and sizes.depth > 0;
}

constexpr double sm90_clusters_used(const GemmSizes& sizes, const Sm90Tile& tile, const GemmDevice& device) {
    return expected_tiles(sizes, tile.rows, tile.columns) / kSm90Cluster / (device.num_sms / kSm90Cluster);
}

// Cycles until the last cluster is done. Clusters without a tile leave their share of L2 to the others.
inline double sm90_cycles(const GemmSizes& sizes, const Sm90Tile& tile, const GemmDevice& device) {
    constexpr double kMultiplyAdds = 2048, kMostL2Bytes = 64;  // of one SM in one cycle
    const double num_waves = sm90_clusters_used(sizes, tile, device);
    const double l2_bytes = std::min(kMostL2Bytes, device.l2_bytes / std::min(num_waves, 1.0));
    const double multiply = static_cast<double>(tile.rows) * tile.columns * kGemmDepthBlock / kMultiplyAdds;
    const double cycles =
        expected_depth_blocks(sizes) * std::max(multiply, tile.l2_bytes(tile.must_multicast()) / l2_bytes);
    return std::ceil(num_waves) * (cycles + kEndOfTile);
}

// The tile for the rows that an expert has on average; where it has no work for some of the clusters, the
// cheapest that is not larger.
inline int sm90_tile(const GemmSizes& sizes, const GemmDevice& device) {
    const int64_t average = parts_of(sizes.num_rows, sizes.num_experts);
    int found = first_sm90_tile(sizes.step);
    while (average > kSm90Tiles[found].most_rows) ++found;
    if (sm90_clusters_used(sizes, kSm90Tiles[found], device) >= 1) return found;
    for (int idx = found - 1; idx >= first_sm90_tile(sizes.step); --idx) {
        const double cycles = sm90_cycles(sizes, kSm90Tiles[idx], device);
        if (cycles < sm90_cycles(sizes, kSm90Tiles[found], device)) found = idx;
    }
    return found;
}

inline GemmPlan plan_sm90(const GemmSizes& sizes, const GemmDevice& device, std::string_view wanted) {
    int step = 4;
    std::string_view name = wanted;
    if (wanted.size() > 2 and wanted[wanted.size() - 2] == '/') {
        step = wanted.back() - '0';
        name.remove_suffix(2);
    }
    DSC_CHECK(step >= 1 and step <= 4, "grouped_gemm: a tile's step must be 1 to 4, got ", wanted);
    if (name == "auto") return sm90_plan(sizes, device, sm90_tile(sizes, device), step);
    for (int idx = first_sm90_tile(sizes.step); idx < static_cast<int>(kSm90Tiles.size()); ++idx) {
        if (name == kSm90Tiles[idx].name) return sm90_plan(sizes, device, idx, step);
    }
    DSC_CHECK(false, "grouped_gemm: there is no tile of ", wanted, " for this step on sm90");
    return {};
}

inline GemmPlan plan_gemm(const GemmSizes& sizes, const GemmDevice& device, const GemmChoice& choice) {
    DSC_CHECK(sizes.num_rows >= 0 and sizes.num_experts >= 0 and sizes.num_columns >= 0 and sizes.depth >= 0,
              "grouped_gemm: sizes must be >= 0, got ", sizes.num_rows, " rows, ", sizes.num_experts,
              " experts, ", sizes.num_columns, " columns, depth ", sizes.depth);
    if (choice.arch == GemmArch::kSm90) {
        DSC_CHECK(device.is_sm90, "grouped_gemm: arch sm90 needs compute capability 9.0 and a build for 90a");
        DSC_CHECK(
            not sizes.gathers,
            "grouped_gemm: arch sm90 reads rows where they lie, got row_idx: permute x, or take arch sm80");
    }
    const bool takes_sm90 =
        choice.arch == GemmArch::kSm90 or (choice.arch == GemmArch::kAuto and kSm90IsProven);
    if (takes_sm90 and has_sm90(sizes, device)) return plan_sm90(sizes, device, choice.tile);
    return plan_sm80(sizes, device, choice.tile);
}

}  // namespace dsc
