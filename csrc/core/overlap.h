// Programmatic dependent launch, the device's side: a kernel launched by launch_overlapped (core/launch.h)
// may start while the kernel ahead of it in the stream still runs, which hides its launch.
//
// The rule: every thread calls wait_for_previous_kernel() before its first access to global memory, reads AND
// writes, and no thread returns before it. What the kernel reads may still be being written; what it writes
// may still be being read, since the caching allocator hands out memory again while the last kernel that uses
// it is in flight. Parameters, shared memory and registers may be used before the wait. The build contract
// (tests/csrc/test_build_contract.py) finds the wait ahead of every such access in the machine code.
//
// Why that makes chains safe: the wait returns when the whole kernel ahead is over, with its writes to be
// seen, whenever that kernel gave leave to start. It could not be over before its own threads had returned
// from their waits, that is, before the kernel ahead of it was over; and so on back to a launch without
// overlap, which starts after everything. So the wait is one for all kernels ahead in the stream, as in an
// ordinary launch. A kernel with a thread that leaves without waiting would break the chain for the kernels
// behind it: hence no early return.
//
// What that assumes of kernels that are not ours (torch's, a library's) and lie in the same stream: if they
// are launched to overlap, they have waited, too, before they end. One that does not wait may be over while
// the kernel ahead of it still runs, and nothing that we do behind it could tell.
//
// let_next_kernel_start() gives the next kernel leave to become resident, once all blocks have called it or
// ended. It orders nothing: the next kernel's wait does, whenever this was called. Call it after the loads
// have been issued; blocks of the next kernel then take only room that no block of this one waits for.
//
// Below sm_90 both are empty, and launch_overlapped is launch. The host executor, where launches follow each
// other, faults a thread that ends an overlapped launch without having waited.
#pragma once

#include "core/device.h"

namespace dsc {

__device__ __forceinline__ void wait_for_previous_kernel() {
#ifdef DSC_HOST_EXECUTOR
    host::wait_for_previous_kernel();
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if not defined(DSC_HOST_EXECUTOR) and __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace dsc
