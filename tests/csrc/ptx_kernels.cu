// Kernels around one instruction of sm_80 each (core/ptx_sm80.cuh): what goes in and what comes out is laid
// open, so that the executor can be held to the PTX manual. And one around the exchange of sums in a quad.
#include "core/launch.h"
#include "core/ptx_sm80.cuh"
#include "core/quad_words.cuh"
#include "host_kernels.h"

namespace dsc::tests {
namespace {

constexpr int kWarp = 32;

// Four matrices of eight rows, row r at tile[r]; each lane's four registers go out.
template <bool kIsTransposed>
__global__ void load_matrices_kernel(const uint16_t* matrices, uint32_t* registers) {
    DSC_SHARED_DYNAMIC(uint16_t, tile);
    for (int i = threadIdx.x; i < 4 * 64; i += kWarp) tile[i] = matrices[i];
    __syncwarp();
    uint32_t matrix[4];
    if constexpr (kIsTransposed) {
        load_matrices_transposed(matrix, tile + 8 * threadIdx.x);
    } else {
        load_matrices(matrix, tile + 8 * threadIdx.x);
    }
    for (int i = 0; i < 4; ++i) registers[4 * threadIdx.x + i] = matrix[i];
}

// acc [16, 8] += a [16, 16] b [16, 8], fragments put together element by element as the manual draws them.
template <typename T>
__global__ void multiply_add_kernel(const uint16_t* a, const uint16_t* b, float* acc) {
    const int group = threadIdx.x / 4, pair = 2 * (threadIdx.x % 4);
    const auto pack = [](uint32_t low, uint32_t high) { return low | high << 16; };
    uint32_t fragment[4];
    for (int i = 0; i < 4; ++i) {
        const int row = group + 8 * (i % 2), column = pair + 8 * (i / 2);
        fragment[i] = pack(a[16 * row + column], a[16 * row + column + 1]);
    }
    const uint32_t b0 = pack(b[8 * pair + group], b[8 * (pair + 1) + group]);
    const uint32_t b1 = pack(b[8 * (pair + 8) + group], b[8 * (pair + 9) + group]);
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = acc[8 * (group + 8 * (i / 2)) + pair + i % 2];
    multiply_add<T>(sums, fragment, b0, b1);
    for (int i = 0; i < 4; ++i) acc[8 * (group + 8 * (i / 2)) + pair + i % 2] = sums[i];
}

// A thread copies 4 floats of each half of x, as two groups, and reads them back, or its neighbour's.
__global__ void copies_kernel(const float* x, float* y, Copying kind) {
    DSC_SHARED_DYNAMIC(float, tile);
    const int half = 4 * static_cast<int>(blockDim.x), own = 4 * static_cast<int>(threadIdx.x);
    const int shift = kind == Copying::kMisaligned ? 1 : 0;
    float* const target = kind == Copying::kIntoGlobal ? y : tile;
    copy_async(target + own, x + own + shift, true);
    commit_copies();
    copy_async(tile + half + own, x + half + own, kind != Copying::kZeroFill);
    if (kind != Copying::kUncommitted) commit_copies();
    if (kind == Copying::kOldestWaited) {
        wait_copies<1>();
    } else if (kind != Copying::kUnwaited) {
        wait_copies<0>();
    }
    if (kind == Copying::kNeighbour) __syncthreads();
    const bool is_crossed = kind == Copying::kNeighbour or kind == Copying::kNeighbourUnsynced;
    const int read = is_crossed ? half - 4 - own : own;
    for (int i = 0; i < 4; ++i) {
        y[own + i] = tile[read + i];
        y[half + own + i] = tile[half + read + i];
    }
}

// The sums of one warp of wgmma, 16 rows of eight blocks: y [2, 16, 32] are blocks 0, 1, 2, 3 and 4, 5, 6, 7,
// or with kStride 2 the even and the odd ones.
template <int kStride>
__global__ void quad_words_kernel(const float* tile, __nv_bfloat16* y) {
    const int row = threadIdx.x / 4, quad = threadIdx.x % 4;
    float sums[32];
    for (int i = 0; i < 32; ++i)
        sums[i] = tile[64 * (row + 8 * (i / 2 % 2)) + 8 * (i / 4) + 2 * quad + i % 2];
    for (int part = 0; part < 2; ++part) {
        for (int half = 0; half < 2; ++half) {
            const Word word =
                rounded_word<__nv_bfloat16, kStride>(sums, kStride == 1 ? 4 * part : part, half);
            *reinterpret_cast<Word*>(y + 32 * (16 * part + row + 8 * half) + 8 * quad) = word;
        }
    }
}

}  // namespace

void run_quad_words(const float* tile, uint16_t* y, bool is_alternating) {
    const auto kernel = is_alternating ? quad_words_kernel<2> : quad_words_kernel<1>;
    launch(kernel, 1, kWarp, 0, nullptr, tile, reinterpret_cast<__nv_bfloat16*>(y));
}

void run_load_matrices(const uint16_t* matrices, uint32_t* registers, bool is_transposed) {
    constexpr size_t kBytes = 4 * 64 * sizeof(uint16_t);
    if (is_transposed) {
        launch(load_matrices_kernel<true>, 1, kWarp, kBytes, nullptr, matrices, registers);
    } else {
        launch(load_matrices_kernel<false>, 1, kWarp, kBytes, nullptr, matrices, registers);
    }
}

void run_multiply_add(const uint16_t* a, const uint16_t* b, float* acc, bool is_bfloat16) {
    if (is_bfloat16) {
        launch(multiply_add_kernel<__nv_bfloat16>, 1, kWarp, 0, nullptr, a, b, acc);
    } else {
        launch(multiply_add_kernel<__half>, 1, kWarp, 0, nullptr, a, b, acc);
    }
}

void run_copies(const float* x, float* y, int num_threads, Copying kind) {
    const size_t num_bytes = 8 * sizeof(float) * static_cast<size_t>(num_threads);
    launch(copies_kernel, 1, num_threads, num_bytes, nullptr, x, y, kind);
}

}  // namespace dsc::tests
