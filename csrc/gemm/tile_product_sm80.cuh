// One tile of a matrix product on the tensor cores of sm_80: acc[m, n] = sum_k a[m, k] b[n, k] in float32.
//
// Both operands travel through a ring of kStages shared-memory stages by asynchronous copies, 16 bytes a
// time, and from there by ldmatrix into fragments. An operand lies in memory either with k contiguous
// (kMajorK: a row per m or n) or with m or n contiguous (kMajorMN: a row per k; ldmatrix transposes it), so
// no product ever needs a transposed copy. A stage's 16-byte chunks are swizzled, chunk c of row r lying at
// c ^ (r % 8), which keeps the eight rows of every ldmatrix in different banks in both forms.
//
// Fragments are loaded one step of 16 k's ahead of their products, across stages too, so the tensor cores
// have work while a block waits at the one barrier of a stage; the copies of the coming stage are started a
// third at a time between the products.
#pragma once

#include "core/ptx_sm80.cuh"
#include "core/warp.h"
#include "gemm/grouped_gemm_plan.h"

namespace dsc {

constexpr int kChunk = 8;                // elements of 16 bytes
constexpr int kTileK = kGemmDepthBlock;  // of a stage: eight chunks
constexpr int kStepK = 16;               // of one instruction
constexpr int kNumSteps = kTileK / kStepK;
constexpr int kNumParts = kNumSteps - 1;  // in which a stage's copies are started

enum class Major { kK, kMN };

// What a block computes at a time, and how its warps share it.
template <typename T_, int kTileIdx, Major kMajorA_, Major kMajorB_>
struct TileShape {
    using T = T_;
    static constexpr Sm80Tile kTile = kSm80Tiles[kTileIdx];
    static constexpr int kM = kTile.rows, kN = kTile.columns, kStages = kTile.num_stages;
    static constexpr int kWarpsM = kTile.warps_m, kWarpsN = kTile.warps_n;
    static constexpr Major kMajorA = kMajorA_, kMajorB = kMajorB_;
    static constexpr int kNumThreads = kTile.num_threads();
    static constexpr int kMinBlocks = kRegistersPerSm / (kTile.registers * kNumThreads);
    static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
    static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
    static constexpr int kStageElements = (kM + kN) * kTileK;
    static_assert(kWarpM % 16 == 0 and kWarpN % 16 == 0 and kStages >= 2 and sizeof(T) == 2);
};

// The accumulators of one thread: fragment (i, j) is rows 16 i and columns 8 j of the warp's part.
template <typename S>
using Accumulators = float[S::kFragmentsM][S::kFragmentsN][4];

// Which chunk of which row thread `tid` copies in round `i`, of a stage's operand with kRows m's or n's.
template <Major kMajor, int kRows, int kNumThreads>
struct CopyMap {
    static constexpr int kRowChunks = (kMajor == Major::kK ? kTileK : kRows) / kChunk;
    static constexpr int kNumRows = kMajor == Major::kK ? kRows : kTileK;
    static constexpr int kRounds = kNumRows * kRowChunks / kNumThreads;
    static constexpr int kRowStep = kNumThreads / kRowChunks;  // rows between rounds
    static_assert(kNumRows * kRowChunks % kNumThreads == 0 and kNumThreads % kRowChunks == 0);

    static __device__ __forceinline__ int row(int tid) { return tid / kRowChunks; }
    static __device__ __forceinline__ int chunk(int tid) { return tid % kRowChunks; }
    static __device__ __forceinline__ int place(int row, int chunk) {
        return (row * kRowChunks + (chunk ^ (row % 8))) * kChunk;
    }
    // The rounds of part p are first_round(p), ... up to first_round(p + 1).
    static __device__ __forceinline__ constexpr int first_round(int part) {
        return part * kRounds / kNumParts;
    }
};

// The 16 x 16 elements at (mn, k) of a stage's operand, as four 8 x 8 matrices with k along a row: those of
// mn 0-7, then mn 8-15 (kMNFirst), each with k 0-7 and 8-15.
template <Major kMajor, int kRows, bool kMNFirst, typename T>
__device__ __forceinline__ void load_fragment(uint32_t (&fragment)[4], const T* operand, int mn, int k) {
    using Map = CopyMap<kMajor, kRows, kWarpSize>;
    const int lane = threadIdx.x % kWarpSize, matrix = lane / 8, line = lane % 8;
    const int half_mn = kMNFirst ? matrix % 2 : matrix / 2, half_k = kMNFirst ? matrix / 2 : matrix % 2;
    if constexpr (kMajor == Major::kK) {
        load_matrices(fragment, operand + Map::place(mn + 8 * half_mn + line, k / kChunk + half_k));
    } else {
        load_matrices_transposed(fragment,
                                 operand + Map::place(k + 8 * half_k + line, mn / kChunk + half_mn));
    }
}

// What one warp multiplies in one step.
template <typename S>
struct Fragments {
    uint32_t a[S::kFragmentsM][4], b[S::kFragmentsN / 2][4];

    __device__ __forceinline__ void load(const typename S::T* stage, int k) {
        const int warp = threadIdx.x / kWarpSize;
        const int first_m = warp / S::kWarpsN * S::kWarpM, first_n = warp % S::kWarpsN * S::kWarpN;
        DSC_UNROLL
        for (int i = 0; i < S::kFragmentsM; ++i) {
            load_fragment<S::kMajorA, S::kM, true>(a[i], stage, first_m + 16 * i, k);
        }
        DSC_UNROLL
        for (int j = 0; j < S::kFragmentsN / 2; ++j) {
            load_fragment<S::kMajorB, S::kN, false>(b[j], stage + S::kM * kTileK, first_n + 16 * j, k);
        }
    }

    __device__ __forceinline__ void multiply_into(Accumulators<S>& acc) const {
        DSC_UNROLL
        for (int i = 0; i < S::kFragmentsM; ++i) {
            DSC_UNROLL
            for (int j = 0; j < S::kFragmentsN; ++j) {
                const auto& pair = b[j / 2];
                multiply_add<typename S::T>(acc[i][j], a[i], pair[j % 2 * 2], pair[j % 2 * 2 + 1]);
            }
        }
    }
};

// Starts this thread's copies of the first k block, the only one that a tile finds under way. A barrier has
// passed since anybody read stage 0.
template <typename S, typename Source>
__device__ __forceinline__ void start_tile(typename S::T* ring, int num_k_blocks, Source& source) {
    if (num_k_blocks > 0) {
        DSC_UNROLL
        for (int part = 0; part < kNumParts; ++part) source.load(ring, 0, part);
    }
    commit_copies();
}

// The whole product, after start_tile. source.load(stage, k_block, part) starts a part of this thread's
// copies of one k block; blocks come in order. When it returns, every stage is free again once all threads
// have arrived at a barrier.
template <typename S, typename Source>
__device__ __forceinline__ void multiply_tile(Accumulators<S>& acc, typename S::T* ring, int num_k_blocks,
                                              Source& source) {
    DSC_UNROLL
    for (int i = 0; i < S::kFragmentsM; ++i) {
        DSC_UNROLL
        for (int j = 0; j < S::kFragmentsN; ++j) {
            DSC_UNROLL
            for (int element = 0; element < 4; ++element) acc[i][j][element] = 0.0f;
        }
    }
    if (num_k_blocks == 0) return;
    DSC_UNROLL
    for (int k_block = 1; k_block < S::kStages - 1; ++k_block) {
        DSC_UNROLL
        for (int part = 0; part < kNumParts; ++part) {
            if (k_block < num_k_blocks) source.load(ring + k_block * S::kStageElements, k_block, part);
        }
        commit_copies();
    }
    Fragments<S> fragments[2];
    wait_copies<S::kStages - 2>();
    __syncthreads();
    fragments[0].load(ring, 0);
    int stage = 0;
    for (int k_block = 0; k_block < num_k_blocks; ++k_block) {
        // The stage before this one was read for the last time ahead of the barrier just passed.
        const int coming = k_block + S::kStages - 1, freed = stage == 0 ? S::kStages - 1 : stage - 1;
        const int next = stage + 1 == S::kStages ? 0 : stage + 1;
        DSC_UNROLL
        for (int step = 0; step < kNumSteps; ++step) {
            if (step < kNumParts) {
                fragments[(step + 1) % 2].load(ring + stage * S::kStageElements, (step + 1) * kStepK);
                if (coming < num_k_blocks) source.load(ring + freed * S::kStageElements, coming, step);
                if (step == kNumParts - 1) commit_copies();
            } else {  // behind the last block these are unread leftovers
                wait_copies<S::kStages - 2>();
                __syncthreads();
                fragments[0].load(ring + next * S::kStageElements, 0);
            }
            fragments[step % 2].multiply_into(acc);
        }
        stage = next;
    }
}

}  // namespace dsc
