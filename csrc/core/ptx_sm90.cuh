// What the kernels of sm_90a say in PTX where they must not depend on CuTe, or CUDA C++ has no word for it.
// In the host executor, which plays the copy engine and wgmma, memory is in order.
#pragma once

#include "core/vec.h"

namespace dsc {

// 16 bytes in one access: an assignment may be cut into four.
__device__ __forceinline__ void store_whole(void* at, const Word& word) {
#ifdef DSC_HOST_EXECUTOR
    *reinterpret_cast<Word*>(at) = word;
#else
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(word.x), "r"(word.y), "r"(word.z),
                 "r"(word.w)
                 : "memory");
#endif
}

// The compiler moves no access to memory across. CUTLASS's waits on barriers do not say so themselves.
__device__ __forceinline__ void keep_order() {
#ifndef DSC_HOST_EXECUTOR
    asm volatile("" ::: "memory");
#endif
}

// What this thread wrote to shared memory comes before what wgmma and the copy engine do there, once threads
// have met.
__device__ __forceinline__ void order_before_async_reads() {
#ifndef DSC_HOST_EXECUTOR
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Named barrier `id` of num_threads threads, of which some only tell that they were there. The executor has
// none: its copies are played apart from products.
__device__ __forceinline__ void meet([[maybe_unused]] int id, [[maybe_unused]] int num_threads) {
#ifndef DSC_HOST_EXECUTOR
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
#endif
}

__device__ __forceinline__ void tell([[maybe_unused]] int id, [[maybe_unused]] int num_threads) {
#ifndef DSC_HOST_EXECUTOR
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
#endif
}

}  // namespace dsc
