// Which tile comes when: the rows of each expert, cut into tiles, found from the END offsets on the device.
//
// A block keeps the table of all experts in shared memory and walks over the tiles b, b + blocks, ...
// Neighbouring tiles share an expert, and within it a band of kBandTiles row tiles: its rows of x and one
// column tile of w stay in L2 while all columns pass. Rows that belong to no expert come last, as a group of
// their own.
#pragma once

#include "core/math.h"
#include "core/warp.h"
#include "gemm/grouped_gemm_plan.h"

namespace dsc {

constexpr int kBandTiles = 8;

struct GroupTable {
    int first_row[kGemmMaxExperts + 2];   // of expert e; [E]: of the rows of none; [E + 1]: M
    int first_tile[kGemmMaxExperts + 2];  // row tiles before expert e's
};
static_assert(sizeof(GroupTable) == kGroupTableBytes);

struct RowTile {
    int group;         // expert, or E: rows of none
    int row, end_row;  // of the tile, and of its expert
    int column_tile;
};

// What the lanes before this one hold together, by `combine`; `first` in lane 0.
template <typename Combine>
__device__ __forceinline__ int combined_before(int value, int first, const Combine& combine) {
    const int lane = threadIdx.x % kWarpSize;
    DSC_UNROLL
    for (int step = 1; step < kWarpSize; step *= 2) {
        const int before = __shfl_up_sync(kAllLanes, value, step);
        if (lane >= step) value = combine(value, before);
    }
    const int before = __shfl_up_sync(kAllLanes, value, 1);
    return lane == 0 ? first : before;
}

// One warp turns each group's END row, as it came, into ascending ones and counts tiles. A lane takes
// neighbouring groups.
template <typename CountTiles>
__device__ __forceinline__ void scan_groups(GroupTable& table, int num_groups,
                                            const CountTiles& count_tiles) {
    const int per_lane = ceil_div(num_groups, kWarpSize);
    const int begin = static_cast<int>(threadIdx.x) * per_lane, end = min(begin + per_lane, num_groups);
    int last_row = 0;
    for (int g = begin; g < end; ++g) last_row = max(last_row, table.first_row[g + 1]);
    int row = combined_before(last_row, 0, [](int a, int b) { return max(a, b); });
    int num_tiles = 0;
    for (int g = begin; g < end; ++g) {
        const int end_row = max(row, table.first_row[g + 1]);
        num_tiles += count_tiles(end_row - row);
        table.first_row[g + 1] = row = end_row;
        table.first_tile[g + 1] = num_tiles;
    }
    const int num_before = combined_before(num_tiles, 0, [](int a, int b) { return a + b; });
    for (int g = begin; g < end; ++g) table.first_tile[g + 1] += num_before;
    if (threadIdx.x == 0) table.first_row[0] = table.first_tile[0] = 0;
}

// Called by all threads; a barrier ends it. count_tiles(num_rows): the tiles of a group (in first_tile).
template <typename CountTiles>
__device__ __forceinline__ void fill_groups(GroupTable& table, const int32_t* offsets, int num_experts,
                                            int num_rows, const CountTiles& count_tiles) {
    for (int e = threadIdx.x; e <= num_experts; e += blockDim.x) {
        table.first_row[e + 1] = e < num_experts ? min(max(offsets[e], 0), num_rows) : num_rows;
    }
    __syncthreads();
    if (threadIdx.x < kWarpSize) scan_groups(table, num_experts + 1, count_tiles);
    __syncthreads();
}

// The group of the idx-th tile, where each of first_tile stands for num_column_tiles of them: the last that
// starts there or before. Empty ones start where the next does.
__device__ __forceinline__ int find_group(const GroupTable& table, int num_experts, int num_column_tiles,
                                          int idx) {
    const int row_tile = idx / num_column_tiles;
    int group = 0;
    DSC_UNROLL
    for (int step = kGemmMaxExperts; step > 0; step /= 2) {
        const int candidate = group + step;
        if (candidate <= num_experts and table.first_tile[candidate] <= row_tile) group = candidate;
    }
    return group;
}

// The idx-th tile; idx < table.first_tile[E + 1] * num_column_tiles.
template <int kTileRows>
__device__ __forceinline__ RowTile find_tile(const GroupTable& table, int num_experts, int num_column_tiles,
                                             int idx) {
    const int group = find_group(table, num_experts, num_column_tiles, idx);
    const int first_tile = table.first_tile[group];
    const int num_row_tiles = table.first_tile[group + 1] - first_tile;
    const int place = idx - first_tile * num_column_tiles;
    const int band = place / (kBandTiles * num_column_tiles);
    const int in_band = place - band * kBandTiles * num_column_tiles;
    const int height = min(kBandTiles, num_row_tiles - band * kBandTiles);
    return {.group = group,
            .row = table.first_row[group] + (band * kBandTiles + in_band % height) * kTileRows,
            .end_row = table.first_row[group + 1],
            .column_tile = in_band / height};
}

}  // namespace dsc
