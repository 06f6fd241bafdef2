// Words that other devices, other processes and the host read and write while a kernel runs: loads that
// acquire and stores that release at system scope (PTX memory model), and the device's wall clock. In the
// host executor memory is in order; another thread may go on at each of these, and the clock ticks a
// microsecond a look.
#pragma once

#include "core/device.h"

namespace dsc {

__device__ __forceinline__ uint64_t load_acquire_system(const uint64_t* at) {
#ifdef DSC_HOST_EXECUTOR
    host::maybe_yield();
    return *at;
#else
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
    return value;
#endif
}

__device__ __forceinline__ uint32_t load_relaxed_system(const uint32_t* at) {
#ifdef DSC_HOST_EXECUTOR
    host::maybe_yield();
    return *at;
#else
    uint32_t value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
#endif
}

__device__ __forceinline__ void store_release_system(uint64_t* at, uint64_t value) {
#ifdef DSC_HOST_EXECUTOR
    host::maybe_yield();
    *at = value;
    host::maybe_yield();
#else
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
#endif
}

__device__ __forceinline__ void store_release_system(uint32_t* at, uint32_t value) {
#ifdef DSC_HOST_EXECUTOR
    host::maybe_yield();
    *at = value;
#else
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
#endif
}

// The value before.
__device__ __forceinline__ uint32_t add_acquire_release_system(uint32_t* at, uint32_t value) {
#ifdef DSC_HOST_EXECUTOR
    return atomicAdd(at, value);
#else
    uint32_t old;
    asm volatile("atom.add.acq_rel.sys.global.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(at), "r"(value)
                 : "memory");
    return old;
#endif
}

// Nanoseconds of a clock that runs on while the thread sleeps; it may move in steps of a microsecond or more.
__device__ __forceinline__ uint64_t global_time() {
#ifdef DSC_HOST_EXECUTOR
    return host::tick_clock();
#else
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
#endif
}

}  // namespace dsc
