// Which tile comes when: the rows of each expert, cut into tiles, found from the END offsets on the device.
//
// A block keeps the table of all experts in shared memory and walks over the tiles b, b + blocks, ...
// Neighbouring tiles share an expert, and within it a band of kBandTiles row tiles: its rows of x and one
// column tile of w stay in L2 while all columns pass. Rows that belong to no expert come last, as a group of
// their own.
#pragma once

#include "core/math.h"
#include "core/warp.h"
#include "gemm/gemm.h"

namespace dsc {

constexpr int kBandTiles = 8;

struct GroupTable {
    int64_t first_row[kGemmMaxExperts + 2];  // of expert e; [E]: of the rows of none; [E + 1]: M
    int first_tile[kGemmMaxExperts + 2];     // row tiles before expert e's
};

struct RowTile {
    int group;             // expert, or E: rows of none
    int64_t row, end_row;  // of the tile, and of its expert
    int64_t group_row;     // the expert's first
    int column_tile;
};

// Called by all threads; a barrier ends it. Offsets that descend or leave [0, M] are clamped. A group of so
// many rows has num_tiles_of(rows) tiles.
template <typename Count>
__device__ __forceinline__ void fill_groups(GroupTable& table, const int32_t* offsets, int num_experts,
                                            int64_t num_rows, const Count& num_tiles_of) {
    if (threadIdx.x < kWarpSize) {
        const int lane = threadIdx.x;
        int64_t row = 0;
        int tile = 0;
        for (int first = 0; first <= num_experts; first += kWarpSize) {
            const int e = first + lane;
            int64_t end = e < num_experts ? min(max(int64_t{offsets[e]}, int64_t{0}), num_rows) : num_rows;
            end = max(end, row);
            DSC_UNROLL
            for (int step = 1; step < kWarpSize; step *= 2) {
                const int64_t before = __shfl_up_sync(kAllLanes, static_cast<long long>(end), step);
                if (lane >= step) end = max(end, before);
            }
            const int64_t shifted = __shfl_up_sync(kAllLanes, static_cast<long long>(end), 1);
            const int64_t begin = lane == 0 ? row : shifted;
            const int num_tiles = e <= num_experts ? num_tiles_of(end - begin) : 0;
            int tiles_to_here = num_tiles;
            DSC_UNROLL
            for (int step = 1; step < kWarpSize; step *= 2) {
                const int before = __shfl_up_sync(kAllLanes, tiles_to_here, step);
                if (lane >= step) tiles_to_here += before;
            }
            if (e <= num_experts) {
                table.first_row[e] = begin;
                table.first_tile[e] = tile + tiles_to_here - num_tiles;
            }
            row = __shfl_sync(kAllLanes, static_cast<long long>(end), kWarpSize - 1);
            tile += __shfl_sync(kAllLanes, tiles_to_here, kWarpSize - 1);
        }
        if (lane == 0) {
            table.first_row[num_experts + 1] = num_rows;
            table.first_tile[num_experts + 1] = tile;
        }
    }
    __syncthreads();
}

template <int kTileRows>
__device__ __forceinline__ void fill_groups(GroupTable& table, const int32_t* offsets, int num_experts,
                                            int64_t num_rows) {
    fill_groups(table, offsets, num_experts, num_rows,
                [](int64_t rows) { return static_cast<int>(ceil_div<int64_t>(rows, kTileRows)); });
}

// The last group that starts at or before the tile; empty ones start where the next does.
__device__ __forceinline__ int find_group(const GroupTable& table, int num_experts, int num_column_tiles,
                                          int64_t idx) {
    int group = 0;
    for (int step = kGemmMaxExperts; step > 0; step /= 2) {
        const int candidate = group + step;
        if (candidate <= num_experts and int64_t{table.first_tile[candidate]} * num_column_tiles <= idx) {
            group = candidate;
        }
    }
    return group;
}

// The idx-th tile; idx < table.first_tile[E + 1] * num_column_tiles.
template <int kTileRows>
__device__ __forceinline__ RowTile find_tile(const GroupTable& table, int num_experts, int num_column_tiles,
                                             int64_t idx) {
    const int group = find_group(table, num_experts, num_column_tiles, idx);
    const int first_tile = table.first_tile[group];
    const int num_row_tiles = table.first_tile[group + 1] - first_tile;
    const int64_t place = idx - int64_t{first_tile} * num_column_tiles;
    const int band = static_cast<int>(place / (kBandTiles * num_column_tiles));
    const int in_band = static_cast<int>(place % (kBandTiles * num_column_tiles));
    const int height = min(kBandTiles, num_row_tiles - band * kBandTiles);
    const int64_t group_row = table.first_row[group];
    return {.group = group,
            .row = group_row + int64_t{band * kBandTiles + in_band % height} * kTileRows,
            .end_row = table.first_row[group + 1],
            .group_row = group_row,
            .column_tile = in_band / height};
}

}  // namespace dsc
