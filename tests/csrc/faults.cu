// Kernels with one mistake each, at the line marked WRONG. With it put right, each is an ordinary kernel.
#include "core/launch.h"
#include "core/overlap.h"
#include "host_kernels.h"

namespace dsc::tests {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 64;

// ---- races: y must be x, reversed within the block ----

__global__ void missing_barrier(const float* x, float* y) {
    DSC_SHARED(float[kThreads], tile);
    tile[threadIdx.x] = x[threadIdx.x];
    // WRONG: no __syncthreads()
    y[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// Round r reverses the values of round r - 1: after an odd number of rounds y is x reversed.
__global__ void missing_second_barrier(const float* x, float* y) {
    DSC_SHARED(float[kThreads], tile);
    float value = x[threadIdx.x];
    for (int round = 0; round < 3; ++round) {
        tile[threadIdx.x] = value;
        __syncthreads();
        value = tile[kThreads - 1 - threadIdx.x];
        // WRONG: no __syncthreads() before the next round writes
    }
    y[threadIdx.x] = value;
}

__global__ void missing_syncwarp(const float* x, float* y) {
    DSC_SHARED(float[kThreads], tile);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    tile[threadIdx.x] = x[threadIdx.x];
    // WRONG: no __syncwarp(): lanes do not run in step
    y[kThreads - 32 - warp * 32 + lane] = tile[warp * 32 + 31 - lane];
}

__global__ void uninitialised_shared(const float* x, float* y) {
    DSC_SHARED(float[kThreads], tile);
    if (threadIdx.x > 0) tile[threadIdx.x] = x[threadIdx.x];  // WRONG: nobody writes tile[0]
    __syncthreads();
    y[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// ---- barriers and masks ----

enum class Scope { kWarp, kBlock, kGrid };

// One thread exits where all others wait: before the first of them, or after the last; the count in y sees to
// it.
template <Scope kScope, bool kExitsFirst>
__global__ void one_thread_exits(const float*, float* y) {
    auto* const count = reinterpret_cast<unsigned*>(y);
    if (kScope == Scope::kWarp and threadIdx.x >= 32) return;
    const unsigned num_others = kScope == Scope::kWarp ? 31 : gridDim.x * blockDim.x - 1;
    if (blockIdx.x == 0 and threadIdx.x == 5) {
        if (kExitsFirst) atomicAdd(count, 1);
        while (not kExitsFirst and atomicAdd(count, 0) != num_others) __nanosleep(20);
        return;  // WRONG
    }
    if (not kExitsFirst) atomicAdd(count, 1);
    while (kExitsFirst and atomicAdd(count, 0) == 0) __nanosleep(20);
    if constexpr (kScope == Scope::kWarp) __syncwarp();
    if constexpr (kScope == Scope::kBlock) __syncthreads();
    if constexpr (kScope == Scope::kGrid) cooperative_groups::this_grid().sync();
}

__global__ void two_barriers(const float*, float*) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();  // WRONG: another barrier
    }
}

__global__ void barrier_against_warp(const float*, float*) {
    if (threadIdx.x % 32 == 0) __syncthreads();  // WRONG: the other lanes wait for lane 0
    __syncwarp();
    if (threadIdx.x % 32 != 0) __syncthreads();
}

__global__ void lane_outside_its_mask(const float* x, float* y) {
    y[threadIdx.x] = __shfl_sync(0xfffffffeu, x[threadIdx.x], 1);  // WRONG: lane 0 takes part too
}

__global__ void masks_that_differ(const float* x, float* y) {
    const unsigned mask = threadIdx.x % 2 == 0 ? kAll : 0xfffffff0u | 1u << threadIdx.x % 32;  // WRONG
    y[threadIdx.x] = __shfl_xor_sync(mask, x[threadIdx.x], 1);
}

__global__ void shuffle_in_a_branch(const float* x, float* y) {
    float value = x[threadIdx.x];
    if (threadIdx.x % 32 < 16) value += __shfl_xor_sync(kAll, value, 8);  // WRONG: half the lanes stay away
    y[threadIdx.x] = value;
}

__global__ void reads_a_lane_outside_the_mask(const float* x, float* y) {
    if (threadIdx.x >= 16) return;
    y[threadIdx.x] = __shfl_down_sync(0x0000ffffu, x[threadIdx.x], 8);  // WRONG: lanes 8 to 15 read 16 to 23
}

__global__ void grid_sync(const float*, float*) {
    cooperative_groups::this_grid().sync();
}

__global__ void waits_for_nobody(const float*, float* y) {
    auto* const flag = reinterpret_cast<unsigned*>(y);
    while (atomicAdd(flag, 0) != 12345) __nanosleep(20);  // WRONG: nobody sets it
}

__global__ void one_thread_never_waits(const float* x, float* y) {
    if (threadIdx.x == 5) return;  // WRONG: before the wait
    wait_for_previous_kernel();
    let_next_kernel_start();
    y[threadIdx.x] = x[threadIdx.x];
}

// ---- memory: for the sanitizers ----

__global__ void reads_past_global(const float* x, float* y, int num_values) {
    for (int i = threadIdx.x; i <= num_values; i += blockDim.x) y[threadIdx.x] = x[i];  // WRONG: <=
}

__global__ void writes_past_shared(const float* x, float* y, int num_values) {
    DSC_SHARED(float[kThreads], tile);
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) tile[num_values] = 1.0f;  // WRONG: num_values = kThreads
    y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void writes_past_dynamic(const float* x, float* y) {
    DSC_SHARED_DYNAMIC(float, tile);
    tile[threadIdx.x] = x[threadIdx.x];  // WRONG: launched with room for all threads but one
    y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void misaligned_vector(const float* x, float* y) {
    const float4 four = *reinterpret_cast<const float4*>(x + 1);  // WRONG: not on 16 bytes
    y[threadIdx.x] = four.x;
}

// ---- launches ----

template <auto kKernel>
void run(const float* x, float* y, int) {
    launch(kKernel, 1, kThreads, 0, nullptr, x, y);
}

template <auto kKernel>
void run_cooperative(const float* x, float* y, int) {
    launch_cooperative(kKernel, 2, kThreads, 0, nullptr, x, y);
}

template <auto kKernel>
void run_sized(const float* x, float* y, int num_values) {
    launch(kKernel, 1, kThreads, 0, nullptr, x, y, num_values);
}

}  // namespace

const Fault kFaults[] = {
    {"missing_barrier", run<missing_barrier>},
    {"missing_second_barrier", run<missing_second_barrier>},
    {"missing_syncwarp", run<missing_syncwarp>},
    {"uninitialised_shared", run<uninitialised_shared>},
    {"exits_before_warp", run<one_thread_exits<Scope::kWarp, true>>},
    {"exits_after_warp", run<one_thread_exits<Scope::kWarp, false>>},
    {"exits_before_block", run<one_thread_exits<Scope::kBlock, true>>},
    {"exits_after_block", run<one_thread_exits<Scope::kBlock, false>>},
    {"exits_before_grid", run_cooperative<one_thread_exits<Scope::kGrid, true>>},
    {"exits_after_grid", run_cooperative<one_thread_exits<Scope::kGrid, false>>},
    {"two_barriers", run<two_barriers>},
    {"barrier_against_warp", run<barrier_against_warp>},
    {"lane_outside_its_mask", run<lane_outside_its_mask>},
    {"masks_that_differ", run<masks_that_differ>},
    {"shuffle_in_a_branch", run<shuffle_in_a_branch>},
    {"reads_a_lane_outside_the_mask", run<reads_a_lane_outside_the_mask>},
    {"grid_sync_without_cooperative_launch", run<grid_sync>},
    {"waits_for_nobody", run<waits_for_nobody>},
    {"one_thread_never_waits",
     [](const float* x, float* y, int) {
         launch_overlapped(one_thread_never_waits, 1, kThreads, 0, nullptr, x, y);
     }},
    {"reads_past_global", run_sized<reads_past_global>},
    {"writes_past_shared", run_sized<writes_past_shared>},
    {"writes_past_dynamic",
     [](const float* x, float* y, int) {
         launch(writes_past_dynamic, 1, kThreads, (kThreads - 1) * sizeof(float), nullptr, x, y);
     }},
    {"misaligned_vector", run<misaligned_vector>},
    {"too_many_threads", [](const float* x, float* y, int) { launch(grid_sync, 1, 1025, 0, nullptr, x, y); }},
    {"too_much_shared_memory",
     [](const float* x, float* y, int) { launch(grid_sync, 1, 1, 228 * 1024, nullptr, x, y); }},
    {"partial_warp",
     [](const float* x, float* y, int) { launch(shuffle_in_a_branch, 1, 40, 0, nullptr, x, y); }},
};
const int kNumFaults = static_cast<int>(sizeof(kFaults) / sizeof(kFaults[0]));

}  // namespace dsc::tests
