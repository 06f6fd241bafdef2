// Small kernels that use each facility of the host executor as CUDA defines it.
#include "core/launch.h"
#include "core/math.h"
#include "host_kernels.h"

namespace dsc::tests {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

// ---- shared memory, barriers, atomics ----

template <int kNumThreads>
__global__ void __launch_bounds__(kNumThreads) block_sum_kernel(const float* x, float* sum, int num_values) {
    DSC_SHARED(float[kNumThreads / kWarp], partial);
    float value = 0.0f;
    for (int i = blockIdx.x * kNumThreads + threadIdx.x; i < num_values; i += gridDim.x * kNumThreads)
        value += x[i];
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
    __syncthreads();
    if (threadIdx.x != 0) return;
    float total = 0.0f;
    for (const float part : partial) total += part;
    atomicAdd(sum, total);
}

constexpr int kTile = 32;

__global__ void transpose_kernel(const float* x, float* y, int num_rows, int num_columns) {
    DSC_SHARED(float[kTile][kTile + 1], tile);
    const int row = blockIdx.y * kTile, column = blockIdx.x * kTile;
    for (int i = threadIdx.y; i < kTile; i += blockDim.y) {
        if (row + i < num_rows and column + static_cast<int>(threadIdx.x) < num_columns) {
            tile[i][threadIdx.x] = x[(row + i) * num_columns + column + threadIdx.x];
        }
    }
    __syncthreads();
    for (int i = threadIdx.y; i < kTile; i += blockDim.y) {
        if (column + i < num_columns and row + static_cast<int>(threadIdx.x) < num_rows) {
            y[(column + i) * num_rows + row + threadIdx.x] = tile[threadIdx.x][i];
        }
    }
}

__global__ void histogram_kernel(const int* x, unsigned* counts, int num_values, int num_bins) {
    DSC_SHARED_DYNAMIC(unsigned, bins);
    for (int i = threadIdx.x; i < num_bins; i += blockDim.x) bins[i] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < num_values; i += gridDim.x * blockDim.x) {
        atomicAdd(&bins[x[i]], 1);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_bins; i += blockDim.x) atomicAdd(&counts[i], bins[i]);
}

__global__ void votes_kernel(const int* x, int* result) {
    const int predicate = x[threadIdx.x];
    const int num_true = __syncthreads_count(predicate);
    const int all_true = __syncthreads_and(predicate), any_true = __syncthreads_or(predicate);
    result[threadIdx.x] = num_true * 4 + (all_true ? 2 : 0) + (any_true ? 1 : 0);
}

// ---- the grid ----

// prefix[b]: the sum over the blocks before b. Each block's own sum waits in its shared memory.
__global__ void prefix_kernel(const int* x, int* sums, int* prefix) {
    DSC_SHARED(int, own);
    if (threadIdx.x == 0) own = 0;
    __syncthreads();
    atomicAdd(&own, x[cooperative_groups::this_grid().thread_rank()]);
    __syncthreads();
    if (threadIdx.x == 0) sums[blockIdx.x] = own;
    cooperative_groups::this_grid().sync();
    if (threadIdx.x != 0) return;
    int before = 0;
    for (unsigned b = 0; b < blockIdx.x; ++b) before += sums[b];
    prefix[blockIdx.x] = sums[blockIdx.x] == own ? before : -1;
}

// log[0] counts the blocks that have had the token; each block waits for its turn.
__global__ void pass_token_kernel(int* log) {
    while (atomicAdd(&log[0], 0) != static_cast<int>(blockIdx.x)) __nanosleep(100);
    log[1 + blockIdx.x] = blockIdx.x * 10;
    __threadfence();
    atomicAdd(&log[0], 1);
}

// Each thread takes two turns.
__global__ void arrival_order_kernel(int* order) {
    for (int i = 0; i < 2; ++i) {
        const int turn = atomicAdd(&order[0], 1);
        order[1 + turn] = blockIdx.x * blockDim.x + threadIdx.x;
    }
}

// Counts the words of fresh shared memory that hold `pattern`, and leaves others behind.
__global__ void fresh_shared_kernel(unsigned pattern, unsigned* count) {
    DSC_SHARED(unsigned[64], declared);
    DSC_SHARED_DYNAMIC(unsigned, dynamic);
    for (unsigned* const word : {&declared[threadIdx.x], &dynamic[threadIdx.x]}) {
        if (*word == pattern) atomicAdd(count, 1);
        *word = 0;
    }
}

__global__ void coordinates_kernel(int* result) {
    const auto block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const auto thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    result[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1;
}

// ---- warps ----

template <typename T>
__global__ void shuffle_kernel(Shuffle kind, const T* x, T* y, int argument, int width) {
    const T value = x[threadIdx.x];
    T result{};
    switch (kind) {
        case Shuffle::kIdx:
            result = __shfl_sync(kAll, value, argument, width);
            break;
        case Shuffle::kUp:
            result = __shfl_up_sync(kAll, value, argument, width);
            break;
        case Shuffle::kDown:
            result = __shfl_down_sync(kAll, value, argument, width);
            break;
        case Shuffle::kXor:
            result = __shfl_xor_sync(kAll, value, argument, width);
            break;
    }
    y[threadIdx.x] = result;
}

constexpr int kNumQueries = 10;

__global__ void warp_queries_kernel(const int* x, unsigned* result, unsigned mask) {
    if ((mask >> threadIdx.x & 1) == 0) return;
    const int value = x[threadIdx.x];
    const auto bits = static_cast<unsigned>(value);
    int is_same = 0;
    const unsigned answers[kNumQueries] = {
        __ballot_sync(mask, value & 1),
        static_cast<unsigned>(__any_sync(mask, value & 1)),
        static_cast<unsigned>(__all_sync(mask, value & 1)),
        __match_any_sync(mask, value),
        __match_all_sync(mask, value, &is_same),
        static_cast<unsigned>(__reduce_add_sync(mask, value)),
        static_cast<unsigned>(__reduce_min_sync(mask, value)),
        static_cast<unsigned>(__reduce_max_sync(mask, value)),
        __reduce_and_sync(mask, bits) ^ __reduce_or_sync(mask, bits),
        __reduce_xor_sync(mask, bits),
    };
    for (int i = 0; i < kNumQueries; ++i) result[threadIdx.x * kNumQueries + i] = answers[i];
}

// The halves of a warp go different ways, each with a mask of its own lanes, and meet again.
__global__ void half_warps_kernel(const int* x, int* result) {
    const int lane = threadIdx.x;
    int value = x[lane];
    if (lane < 16) {
        for (int offset = 8; offset > 0; offset /= 2) value += __shfl_xor_sync(0x0000ffffu, value, offset);
    } else {
        value = __reduce_max_sync(0xffff0000u, value);
        __syncwarp(0xffff0000u);
    }
    result[lane] = __shfl_sync(kAll, value, lane < 16 ? 31 : 0);
}

// ---- types ----

// Each thread does every atomic once; thread i's number is i + 1. `seen` gets what atomicAdd returned.
template <typename T>
__global__ void atomics_kernel(T* cells, T* seen) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const T number = static_cast<T>(i + 1);
    seen[i] = atomicAdd(&cells[0], static_cast<T>(1));
    if constexpr (not std::is_same_v<T, double>) atomicExch(&cells[1], number);
    if constexpr (std::is_integral_v<T>) {
        atomicMin(&cells[2], number);
        atomicMax(&cells[3], number);
        atomicOr(&cells[4], number);
        atomicAnd(&cells[5], ~number);
        atomicXor(&cells[6], number);
        for (T old = cells[7]; old < number;) {
            const T now = atomicCAS(&cells[7], old, number);
            if (now == old) break;
            old = now;
        }
    }
    if constexpr (std::is_same_v<T, unsigned>) {
        atomicInc(&cells[8], 4);
        atomicDec(&cells[9], 4);
        atomicSub(&cells[10], number);
    }
}

template <typename From, typename To, To (*kConvert)(From)>
__global__ void convert_kernel(const From* x, To* y, int num_values) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < num_values) y[i] = kConvert(x[i]);
}

template <typename From, typename To, To (*kConvert)(From)>
void launch_convert(const From* x, To* y, int num_values) {
    launch(convert_kernel<From, To, kConvert>, ceil_div(num_values, 256), 256, 0, nullptr, x, y, num_values);
}

}  // namespace

// ---- host ----

void block_sum(const float* x, float* sum, int num_values, int num_blocks) {
    launch(block_sum_kernel<256>, num_blocks, 256, 0, nullptr, x, sum, num_values);
}

void transpose(const float* x, float* y, int num_rows, int num_columns) {
    const dim3 grid(ceil_div(num_columns, kTile), ceil_div(num_rows, kTile));
    launch(transpose_kernel, grid, dim3(kTile, 8), 0, nullptr, x, y, num_rows, num_columns);
}

void histogram(const int* x, unsigned* counts, int num_values, int num_bins) {
    launch(histogram_kernel, 5, 96, num_bins * sizeof(unsigned), nullptr, x, counts, num_values, num_bins);
}

void votes(const int* x, int* result, int num_threads) {
    launch(votes_kernel, 1, num_threads, 0, nullptr, x, result);
}

void prefix_of_blocks(const int* x, int* prefix, int num_blocks, int num_threads) {
    launch_cooperative(prefix_kernel, num_blocks, num_threads, 0, nullptr, x, prefix + num_blocks, prefix);
}

void pass_token(int* log, int num_blocks) {
    launch_cooperative(pass_token_kernel, num_blocks, 1, 0, nullptr, log);
}

void arrival_order(int* order, int num_blocks, int num_threads) {
    launch(arrival_order_kernel, num_blocks, num_threads, 0, nullptr, order);
}

unsigned fresh_shared(unsigned pattern, int num_blocks) {
    unsigned count = 0;
    launch(fresh_shared_kernel, num_blocks, 64, 64 * sizeof(unsigned), nullptr, pattern, &count);
    return count;
}

void coordinates(int* result, const unsigned* grid, const unsigned* block) {
    launch(coordinates_kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0,
           nullptr, result);
}

template <typename T>
void shuffle(Shuffle kind, const T* x, T* y, int argument, int width) {
    launch(shuffle_kernel<T>, 1, kWarp, 0, nullptr, kind, x, y, argument, width);
}
template void shuffle(Shuffle, const int*, int*, int, int);
template void shuffle(Shuffle, const float*, float*, int, int);
template void shuffle(Shuffle, const double*, double*, int, int);
template void shuffle(Shuffle, const int64_t*, int64_t*, int, int);

void warp_queries(const int* x, unsigned* result, unsigned mask) {
    launch(warp_queries_kernel, 1, kWarp, 0, nullptr, x, result, mask);
}

void half_warps(const int* x, int* result) {
    launch(half_warps_kernel, 1, kWarp, 0, nullptr, x, result);
}

template <typename T>
void atomics(T* cells, T* seen, int num_threads) {
    launch(atomics_kernel<T>, ceil_div(num_threads, 64), 64, 0, nullptr, cells, seen);
}
template void atomics(int*, int*, int);
template void atomics(unsigned*, unsigned*, int);
template void atomics(unsigned long long*, unsigned long long*, int);
template void atomics(float*, float*, int);
template void atomics(double*, double*, int);

void to_bfloat16(const float* x, uint16_t* y, int num_values) {
    launch_convert<float, __nv_bfloat16, __float2bfloat16>(x, reinterpret_cast<__nv_bfloat16*>(y),
                                                           num_values);
}
void to_half(const float* x, uint16_t* y, int num_values) {
    launch_convert<float, __half, __float2half>(x, reinterpret_cast<__half*>(y), num_values);
}
void from_bfloat16(const uint16_t* x, float* y, int num_values) {
    launch_convert<__nv_bfloat16, float, __bfloat162float>(reinterpret_cast<const __nv_bfloat16*>(x), y,
                                                           num_values);
}
void from_half(const uint16_t* x, float* y, int num_values) {
    launch_convert<__half, float, __half2float>(reinterpret_cast<const __half*>(x), y, num_values);
}

}  // namespace dsc::tests
