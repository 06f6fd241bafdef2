// One tile of a matrix product on the tensor cores of sm_80: acc[m, n] = sum_k a[m, k] b[n, k] in float32.
//
// Both operands travel through a ring of kStages shared-memory stages by asynchronous copies, 16 bytes a
// time, and from there by ldmatrix into fragments. An operand lies in memory either with k contiguous
// (kMajorK: a row per m or n) or with m or n contiguous (kMajorMN: a row per k; ldmatrix transposes it), so
// no product ever needs a transposed copy. A stage's 16-byte chunks are swizzled, chunk c of row r lying at
// c ^ (r % 8), which keeps the eight rows of every ldmatrix in different banks in both forms.
#pragma once

#include "core/ptx_sm80.cuh"
#include "core/warp.h"

namespace dsc {

constexpr int kChunk = 8;   // elements of 16 bytes
constexpr int kTileK = 64;  // of a stage: eight chunks

enum class Major { kK, kMN };

// What a block computes at a time, and how its warps share it.
template <typename T_, int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kStages_, Major kMajorA_,
          Major kMajorB_>
struct TileShape {
    using T = T_;
    static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kStages = kStages_;
    static constexpr Major kMajorA = kMajorA_, kMajorB = kMajorB_;
    static constexpr int kNumThreads = kWarpsM * kWarpsN * kWarpSize;
    static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
    static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
    static constexpr int kStageElements = (kM + kN) * kTileK;
    static constexpr int kRingBytes = kStages * kStageElements * static_cast<int>(sizeof(T));
    static_assert(kWarpM % 16 == 0 and kWarpN % 16 == 0 and kStages >= 2);
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

template <typename S>
__device__ __forceinline__ void multiply_stage(Accumulators<S>& acc, const typename S::T* stage) {
    const int warp = threadIdx.x / kWarpSize;
    const int first_m = warp / S::kWarpsN * S::kWarpM, first_n = warp % S::kWarpsN * S::kWarpN;
    const typename S::T* const b_stage = stage + S::kM * kTileK;
    uint32_t a[2][S::kFragmentsM][4], b[2][S::kFragmentsN / 2][4];
    const auto load = [&](int k, auto& a_k, auto& b_k) {
        DSC_UNROLL
        for (int i = 0; i < S::kFragmentsM; ++i) {
            load_fragment<S::kMajorA, S::kM, true>(a_k[i], stage, first_m + 16 * i, k);
        }
        DSC_UNROLL
        for (int j = 0; j < S::kFragmentsN / 2; ++j) {
            load_fragment<S::kMajorB, S::kN, false>(b_k[j], b_stage, first_n + 16 * j, k);
        }
    };
    load(0, a[0], b[0]);
    DSC_UNROLL
    for (int k = 0; k < kTileK; k += 16) {
        const int now = k / 16 % 2, next = 1 - now;
        if (k + 16 < kTileK) load(k + 16, a[next], b[next]);  // under the products of this k
        DSC_UNROLL
        for (int i = 0; i < S::kFragmentsM; ++i) {
            DSC_UNROLL
            for (int j = 0; j < S::kFragmentsN; ++j) {
                const auto& pair = b[now][j / 2];
                multiply_add<typename S::T>(acc[i][j], a[now][i], pair[j % 2 * 2], pair[j % 2 * 2 + 1]);
            }
        }
    }
}

// The whole product. source.load(stage, k_block) starts this thread's copies of one k block. When it
// returns, every stage is free again once all threads have arrived at a barrier.
template <typename S, typename Source>
__device__ __forceinline__ void multiply_tile(Accumulators<S>& acc, typename S::T* ring, int num_k_blocks,
                                              const Source& source) {
    DSC_UNROLL
    for (int i = 0; i < S::kFragmentsM; ++i) {
        DSC_UNROLL
        for (int j = 0; j < S::kFragmentsN; ++j) {
            DSC_UNROLL
            for (int element = 0; element < 4; ++element) acc[i][j][element] = 0.0f;
        }
    }
    const auto stage_of = [&](int k_block) { return ring + k_block % S::kStages * S::kStageElements; };
    DSC_UNROLL
    for (int k_block = 0; k_block < S::kStages - 1; ++k_block) {
        if (k_block < num_k_blocks) source.load(stage_of(k_block), k_block);
        commit_copies();
    }
    for (int k_block = 0; k_block < num_k_blocks; ++k_block) {
        wait_copies<S::kStages - 2>();
        __syncthreads();  // the block's copies of k_block are there, and all have left the stage before it
        const int coming = k_block + S::kStages - 1;
        if (coming < num_k_blocks) source.load(stage_of(coming), coming);
        commit_copies();
        multiply_stage<S>(acc, stage_of(k_block));
    }
    wait_copies<0>();
}

}  // namespace dsc
