// Rows by the copy engine of sm_90 (cp.async.bulk): global memory -> shared memory -> global memory, of this
// device or a peer. Addresses and sizes are multiples of 16 bytes. One thread starts copies, waits for them
// and owns the barriers. In the host executor the same functions come from host/bulk.h.
#pragma once

#include "core/device.h"

#ifdef DSC_HOST_EXECUTOR
#include "host/bulk.h"
#else

namespace dsc {

using BulkBarrier = uint64_t;  // an mbarrier of one arrival

__device__ __forceinline__ uint32_t bulk_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// To be followed by a barrier of the block before others use it.
__device__ __forceinline__ void init_bulk_barrier(BulkBarrier* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bulk_address(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Accesses of this thread, and of those it has met, to global and shared memory come before the bulk copies
// that it starts from here on. The second fence is in the first, by the letter of PTX; ptxas makes the first
// a fence of shared memory behind a barrier of the device's memory.
__device__ __forceinline__ void order_before_bulk_copies() {
    asm volatile("fence.proxy.async;" ::: "memory");
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Lands when the barrier's phase is over.
__device__ __forceinline__ void start_bulk_load(void* shared, const void* global, uint32_t num_bytes,
                                                BulkBarrier* barrier) {
    const uint32_t at = bulk_address(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(num_bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            bulk_address(shared)),
        "l"(global), "r"(num_bytes), "r"(at)
        : "memory");
}

__device__ __forceinline__ void wait_bulk_load(BulkBarrier* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred is_over;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 is_over, [%0], %1;\n"
        "@!is_over bra again;\n}" ::"r"(bulk_address(barrier)),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void start_bulk_store(void* global, const void* shared, uint32_t num_bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                 "r"(bulk_address(shared)), "r"(num_bytes)
                 : "memory");
}

// The stores started since the last commit are one group.
__device__ __forceinline__ void commit_bulk_stores() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until all groups but the kNumPending newest have read shared memory, which may be written again then.
template <int kNumPending>
__device__ __forceinline__ void wait_bulk_reads() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kNumPending) : "memory");
}

// Until all stores are made: their bytes are there for this thread, and for whom it tells by a release.
__device__ __forceinline__ void wait_bulk_stores() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace dsc

#endif
