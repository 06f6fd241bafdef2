// Barriers in shared memory (mbarrier) as the kernels of sm_90a wait on them.
#pragma once

#include <cutlass/arch/barrier.h>

#include "core/device.h"

namespace dsc {

// A loop that the compiler leaves one.
#define DSC_LOOP _Pragma("unroll 1")

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

// Until the phase of this parity is over. While no GPU has run a kernel (kIsProven is false), a wait of about
// a second ends it with an error, so that a mistake does not hang the device.
template <typename Barrier, bool kIsProven>
__device__ __forceinline__ void wait_for_phase(const uint64_t* barrier, uint32_t parity) {
    constexpr int64_t kMostCycles = int64_t{1} << 31;
    if constexpr (kIsProven) {
        Barrier::wait(barrier, parity);
    } else {
        if (Barrier::try_wait(barrier, parity)) return;
        const int64_t start = clock64();
        while (not Barrier::try_wait(barrier, parity)) {
            if (clock64() - start > kMostCycles) __trap();
        }
    }
}

}  // namespace dsc
