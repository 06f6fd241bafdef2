// Products of whole tiles in shared memory on mma.sync, as the backward kernels of mla_prefill take them: all
// warps of a block share one product, m x n of any depth, and its sums stay in their registers.
//
// Tiles lie as mla_prefill_tiles_sm80.cuh says, so one serves as it is where a product's depth lies along its
// rows, and where it lies across them.
#pragma once

#include "attention/mla_prefill_tiles_sm80.cuh"

namespace dsc::prefill_backward {

using prefill::kChunk;
using prefill::kLineChunks;
using prefill::kLineElements;

constexpr int kNumThreads = 256;
constexpr int kNumWarps = kNumThreads / kWarpSize;

// How the warps share a product: blocks of 16 x 16 in turn, so that neighbours of a warp's are a whole number
// of chunks apart which the swizzle does not mix with the warp's own.
template <int kRows, int kColumns, int kWarpsM_>
struct WarpGrid {
    static constexpr int kWarpsM = kWarpsM_, kWarpsN = kNumWarps / kWarpsM;
    static constexpr int kBlocksM = kRows / (16 * kWarpsM), kBlocksN = kColumns / (16 * kWarpsN);
    static_assert(kBlocksM * 16 * kWarpsM == kRows and kBlocksN * 16 * kWarpsN == kColumns);

    static __device__ __forceinline__ int warp_m(int thread) { return thread / kWarpSize / kWarpsN; }
    static __device__ __forceinline__ int warp_n(int thread) { return thread / kWarpSize % kWarpsN; }
    // The first row of block i of a thread's warp, and the first column of its block j.
    static __device__ __forceinline__ int row(int thread, int i) {
        return 16 * (i * kWarpsM + warp_m(thread));
    }
    static __device__ __forceinline__ int column(int thread, int j) {
        return 16 * (j * kWarpsN + warp_n(thread));
    }
};

// A thread's sums: block (i, j), its left or right half of 8 columns, and what multiply_add gives a lane.
template <typename Grid>
using Sums = float[Grid::kBlocksM][Grid::kBlocksN][2][4];

enum class Side { kA, kB };
enum class Depth { kAlongRows, kAcrossRows };

// The 16 x 16 blocks of one operand that a warp multiplies, as ldmatrix brings them into registers.
template <typename Grid, Side kSide, Depth kDepth, int kWidth>
struct Operand {
    static constexpr bool kIsTurned = kDepth == Depth::kAcrossRows;
    static constexpr int kWarps = kSide == Side::kA ? Grid::kWarpsM : Grid::kWarpsN;
    static constexpr int kBlocks = kSide == Side::kA ? Grid::kBlocksM : Grid::kBlocksN;
    static_assert(kWarps == 1 or kWarps == 2 or kWarps == 4);

    const uint16_t* tile;
    int offset;  // of this lane's row in the warp's first block

    template <typename T>
    __device__ __forceinline__ explicit Operand(const T* tile)
        : tile(reinterpret_cast<const uint16_t*>(tile)) {
        const int thread = unhoisted(threadIdx.x), lane = thread % kWarpSize;
        const int matrix = lane / 8, line = lane % 8;
        const int half_outer = kSide == Side::kA ? matrix % 2 : matrix / 2;
        const int half_depth = kSide == Side::kA ? matrix / 2 : matrix % 2;
        const int warp = kSide == Side::kA ? Grid::warp_m(thread) : Grid::warp_n(thread);
        const int row = (kIsTurned ? 8 * half_depth : 16 * warp + 8 * half_outer) + line;
        offset = prefill::place<kWidth>(row, kIsTurned ? 2 * warp + half_outer : half_depth);
    }

    // Block `block` at 16 * step of the depth. Chunks are even numbers apart that fill other bits than the
    // lane's own, so the swizzled place differs by their exclusive or.
    __device__ __forceinline__ void load(uint32_t (&fragment)[4], int block, int step) const {
        const int row = 16 * (kIsTurned ? step : block * kWarps);
        const int chunk = 2 * (kIsTurned ? block * kWarps : step);
        const uint16_t* const at = tile + row * kWidth + chunk / kLineChunks * kLineElements +
                                   (offset ^ (chunk % kLineChunks * kChunk));
        if constexpr (kIsTurned) {
            load_matrices_transposed(fragment, at);
        } else {
            load_matrices(fragment, at);
        }
    }
};

// sums += a b over a depth of 16 * kSteps. The next fragments come while the last are multiplied.
template <typename T, typename Grid, int kSteps, typename A, typename B>
__device__ __forceinline__ void add_product(Sums<Grid>& sums, const A& a, const B& b) {
    uint32_t a_block[2][Grid::kBlocksM][4], b_block[2][4];
    DSC_UNROLL
    for (int i = 0; i < Grid::kBlocksM; ++i) a.load(a_block[0][i], i, 0);
    b.load(b_block[0], 0, 0);
    DSC_UNROLL
    for (int step = 0; step < kSteps; ++step) {
        DSC_UNROLL
        for (int j = 0; j < Grid::kBlocksN; ++j) {
            const int next = step * Grid::kBlocksN + j + 1;
            if (next < kSteps * Grid::kBlocksN) {
                b.load(b_block[next % 2], next % Grid::kBlocksN, next / Grid::kBlocksN);
            }
            if (j == 0 and step + 1 < kSteps) {
                DSC_UNROLL
                for (int i = 0; i < Grid::kBlocksM; ++i) a.load(a_block[(step + 1) % 2][i], i, step + 1);
            }
            const auto& own = b_block[(next - 1) % 2];
            DSC_UNROLL
            for (int i = 0; i < Grid::kBlocksM; ++i) {
                multiply_add<T>(sums[i][j][0], a_block[step % 2][i], own[0], own[1]);
                multiply_add<T>(sums[i][j][1], a_block[step % 2][i], own[2], own[3]);
            }
        }
    }
}

template <typename Grid>
__device__ __forceinline__ void clear(Sums<Grid>& sums) {
    DSC_UNROLL
    for (int i = 0; i < Grid::kBlocksM; ++i) {
        DSC_UNROLL
        for (int j = 0; j < Grid::kBlocksN; ++j) {
            DSC_UNROLL
            for (int element = 0; element < 8; ++element) sums[i][j][element / 4][element % 4] = 0.0f;
        }
    }
}

}  // namespace dsc::prefill_backward
