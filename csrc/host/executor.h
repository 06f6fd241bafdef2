// The host executor runs a CUDA grid on the CPU, one fiber a thread, on the calling OS thread. A thread runs
// until it waits (at a barrier, in a warp collective), touches an atomic (sometimes), or ends; which thread
// goes on then is drawn from a seed. Whatever CUDA leaves undefined and the executor can see ends the launch
// with a Fault.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <tuple>
#include <type_traits>

#include "core/check.h"
#include "host/vector_types.h"

namespace dsc::host {

using Place = std::source_location;  // of the intrinsic in the kernel

// Intrinsics take the argument types that CUDA has, and no others.
template <typename T, typename... Ts>
concept OneOf = (std::is_same_v<T, Ts> or ...);

class Fault : public LaunchError {
  public:
    using LaunchError::LaunchError;
};

struct LaunchShape {
    dim3 grid, block;
    size_t shared_bytes;
    bool is_cooperative = false;  // all blocks alive at once, as this_grid().sync() needs
    bool is_overlapped = false;   // every thread must call wait_for_previous_kernel()
};

// The seed of the order of blocks and threads in every launch from here on.
void set_order(uint64_t seed);

// Runs `thread_main` once for each thread of the grid. Throws Fault; the executor is usable afterwards.
void run_threads(const LaunchShape& shape, const std::function<void()>& thread_main);

template <typename... Params, typename... Args>
void run_grid(const LaunchShape& shape, void (*kernel)(Params...), Args&&... args) {
    static_assert((std::is_trivially_copyable_v<Params> and ...), "kernel parameters travel as bytes");
    const std::tuple<Params...> params(static_cast<Args&&>(args)...);
    run_threads(shape, [&] { std::apply(kernel, params); });
}

// ---- called by a running thread ----

struct Vote {
    int num_true, num_threads;
};

[[noreturn]] void fail(const char* what, const Place& where);

Vote wait_for_block(const char* what, bool predicate, const Place& where);
void wait_for_grid(const Place& where);

// Launches follow each other here, so the wait is over at once; that it happened is what counts.
void wait_for_previous_kernel();

// Every lane named in `mask` brings a frame; the last to arrive runs complete(mask, frames), with one frame
// pointer per lane (null outside the mask), and all go on. The one primitive under shuffles, votes and
// warp-wide instructions such as ldmatrix and mma.sync.
using Complete = void (*)(unsigned mask, void* const* frames);
void wait_for_warp(const char* what, unsigned mask, void* frame, Complete complete, const Place& where);

int lane_idx();

// cp.async of 16 bytes: lands when the thread waits for its group, as late as CUDA allows.
void start_copy(void* target, const void* source, bool is_valid, const Place& where);
void commit_copies();
void wait_copies(int num_pending);

// Another thread may go on before the caller does: always after yield(), by chance at an atomic.
void yield();
void maybe_yield();

// Nanoseconds since the thread began, a thousand more at each look.
uint64_t tick_clock();

void* find_shared(const void* key, size_t num_bytes, size_t alignment, const char* name);
void* shared_dynamic_bytes();

// The block's variable that belongs to this Key: a closure type, so one per declaration and template
// instance.
template <typename T, typename Key>
T& shared_variable(Key, const char* name) {
    static_assert(std::is_trivially_default_constructible_v<T>, "shared variables are not constructed");
    static constexpr char kKey = 0;
    return *static_cast<T*>(find_shared(&kKey, sizeof(T), alignof(T), name));
}

template <typename T>
T* shared_dynamic() {
    static_assert(alignof(T) <= 128);
    return static_cast<T*>(shared_dynamic_bytes());
}

// The running thread's coordinates: written by the executor, read by kernels through the names below.
namespace running {
extern uint3 thread_idx, block_idx;
extern dim3 block_dim, grid_dim;
}  // namespace running

}  // namespace dsc::host

inline const uint3& threadIdx = dsc::host::running::thread_idx;
inline const uint3& blockIdx = dsc::host::running::block_idx;
inline const dim3& blockDim = dsc::host::running::block_dim;
inline const dim3& gridDim = dsc::host::running::grid_dim;
inline constexpr int warpSize = 32;
