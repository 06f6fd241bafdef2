// What a block of the sm_90a products works on at a time, and how operands reach it: sizes, the places of
// boxes and of sums. Nothing here needs a GPU or CuTe, so the host executor can play the rest.
#pragma once

#include "core/lines_sm90.cuh"
#include "core/tensor_map.h"
#include "core/warp.h"
#include "gemm/tile_product_sm80.cuh"

namespace dsc {

// Named barriers, above those that CUTLASS keeps for itself.
enum : uint32_t { kSkewBarrier, kBlankBarrier };  // kBlankBarrier + warpgroup

static_assert(kTileK == kLineElements);
constexpr int kCluster = kSm90Cluster;
constexpr int kNumConsumers = 2;  // warpgroups
constexpr int kNumThreadsSm90 = (1 + kNumConsumers) * kWarpgroup;
static_assert(kNumThreadsSm90 == kSm90Threads);

// What a block computes at a time.
template <typename T_, int kM_, int kN_, int kStages_, Major kMajorA_, Major kMajorB_>
struct WarpgroupTile {
    using T = T_;
    static constexpr int kM = kM_, kN = kN_, kStages = kStages_;
    static constexpr Major kMajorA = kMajorA_, kMajorB = kMajorB_;
    static constexpr int kWarpgroupsM = kM >= 128 ? 2 : 1, kWarpgroupsN = kNumConsumers / kWarpgroupsM;
    static constexpr int kWarpgroupM = kM / kWarpgroupsM, kWarpgroupN = kN / kWarpgroupsN;
    static constexpr int kBytesA = kM * kLineBytes, kBytesB = kN * kLineBytes;
    static constexpr int kStageBytes = kBytesA + kBytesB, kRingBytes = kStages * kStageBytes;
    static constexpr int kBlocksN = kWarpgroupN / 8;  // of 8 columns, in a thread's sums
    static_assert(kWarpgroupM == 64 and kStages >= 2 and kTileK * sizeof(T) == kLineBytes);
};

// A thread's sums: acc[4 * j + 2 * half + i] is row `half` and column i of the j-th block of eight columns.
template <typename S>
using WarpgroupSums = float[4 * S::kBlocksN];

// ---- operands ----

// How an operand lies in memory, and with it the dimensions of its tensor map, innermost first. Coordinates
// outside a map read as zeros.
enum class Form {
    kRows,         // x [M, K], a line per row: k, row
    kRowDepth,     // x [M, C] whose rows are the depth: column, row
    kWeights,      // w [E, N, K]: k, n, expert
    kWeightDepth,  // w [E, K, N]: n, k, expert
    kGateUp,       // w [E, 2, F, K], eight rows of gate and eight of up in turn: k, f % 8, gate or up, f / 8,
                   // expert
};

constexpr bool is_depth(Form form) {
    return form == Form::kRowDepth or form == Form::kWeightDepth;
}

constexpr int rank_of(Form form) {
    if (form == Form::kGateUp) return 5;
    return form == Form::kRows or form == Form::kRowDepth ? 2 : 3;
}

// kLines of 128 bytes in each stage, brought as boxes that follow each other in shared memory; half of the
// boxes are a block's part of what the cluster shares.
template <Form kForm_, int kLines>
struct OperandBoxes {
    static constexpr Form kForm = kForm_;
    static constexpr int kRank = rank_of(kForm);
    static constexpr int kBoxLines = is_depth(kForm) ? kTileK : kLines / kCluster;
    static constexpr int kNumBoxes = kLines / kBoxLines;
    static_assert(kNumBoxes % kCluster == 0 and kBoxLines * kLineBytes % kRingAlignment == 0);

    const TensorMap* map;
    int first;  // m, n or f
    int group;  // the expert, or its first row where rows are the depth
    uint64_t hint;

    __host__ __device__ BoxPlace box_place(int k_block, int box) const {
        const int k = k_block * kTileK, line = first + box * kBoxLines;
        if constexpr (kForm == Form::kRows) return {k, line};
        if constexpr (kForm == Form::kRowDepth) return {line, group + k};
        if constexpr (kForm == Form::kWeights) return {k, line, group};
        if constexpr (kForm == Form::kWeightDepth) return {line, k, group};
        return {k, 0, 0, first / 8 + box * (kBoxLines / 16), group};
    }
};

}  // namespace dsc
