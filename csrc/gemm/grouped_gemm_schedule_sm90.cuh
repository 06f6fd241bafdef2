// Which tiles a cluster of two blocks takes on sm_90: pairs of neighbours that share an operand.
//
// Two row tiles of an expert under one column tile share that column tile of w. The last row tile of an
// expert that has an odd number of them is paired with itself under two column tiles, which share those rows
// of x. So nothing is computed for padding beyond a tile's own rows; where the columns too are odd, one block
// of the expert's last pair has no tile. The weight gradient has the same pairs, of the rows and columns of
// grad_w.
//
// Decoding swaps the operands: a tile is 128 rows of w against all rows of x that an expert has, and pairs
// are always two tiles of w that share those rows.
//
// Pairs are numbered expert by expert, within one in bands of kBandPairs pairs of row tiles through which all
// columns pass, so that the clusters at work at one time share rows and columns in L2.
#pragma once

#include "gemm/grouped_gemm_schedule.cuh"

namespace dsc {

constexpr int kBandPairs = kBandTiles / 2;

struct TilePair {
    int row_tile, column_tile;  // of the block `rank` of the cluster
    bool shares_rows;           // else columns
};

// Pairs in a grid of tiles; kSwaps: none by rows.
template <bool kSwaps>
__host__ __device__ constexpr int num_pairs(int row_tiles, int column_tiles) {
    const int by_columns = (column_tiles + 1) / 2;
    return kSwaps ? row_tiles * by_columns : row_tiles / 2 * column_tiles + row_tiles % 2 * by_columns;
}

// The idx-th pair. A column tile may come out as column_tiles: no tile.
template <bool kSwaps>
__host__ __device__ constexpr TilePair pair_at(int idx, int row_tiles, int column_tiles, int rank) {
    const int num_by_rows = kSwaps ? 0 : row_tiles / 2 * column_tiles;
    if (idx < num_by_rows) {
        const int band = idx / (kBandPairs * column_tiles), in_band = idx % (kBandPairs * column_tiles);
        const int left = row_tiles / 2 - band * kBandPairs;
        const int height = left < kBandPairs ? left : kBandPairs;
        return {.row_tile = 2 * (band * kBandPairs + in_band % height) + rank,
                .column_tile = in_band / height,
                .shares_rows = false};
    }
    const int place = idx - num_by_rows;
    if (kSwaps) return {place % row_tiles, 2 * (place / row_tiles) + rank, true};
    return {row_tiles - 1, 2 * place + rank, true};
}

}  // namespace dsc
