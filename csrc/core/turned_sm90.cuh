// How sums leave registers on sm_90: rounded and turned into lines of shared memory, and as float32 from
// there to global memory, where the copy engine adds them to what it finds. The host executor plays both.
#pragma once

#include "core/ptx_sm90.cuh"
#include "core/warp.h"

namespace dsc {

// Four blocks of 8 x 8 elements of 16 bits, turned: a lane holds two neighbours of row lane / 4 of each, as
// the sums of wgmma lie. Column c of block b goes to the 16 bytes that lane 8 * b + c says, `at` behind
// `base`.
__device__ __forceinline__ void store_turned(char* base, int at, const uint32_t (&words)[4]) {
#ifdef DSC_HOST_EXECUTOR
    const int lane = threadIdx.x % kWarpSize;
    for (int i = 0; i < 8; ++i) {
        const int target = __shfl_sync(kAllLanes, at, i / 2 * 8 + lane % 4 * 2 + i % 2);
        const auto element = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
        *reinterpret_cast<uint16_t*>(base + target + lane / 4 * 2) = element;
    }
#else
    const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(base + at));
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(target),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
#endif
}

// One thread: to[i] += from[i] for so many bytes of shared memory, some time behind this. Both begin at
// multiples of 16 bytes.
__device__ __forceinline__ void start_adding(float* to, const float* from, int num_bytes) {
#ifdef DSC_HOST_EXECUTOR
    for (int i = 0; i < num_bytes / 4; ++i) atomicAdd(to + i, from[i]);
#else
    const auto source = static_cast<uint32_t>(__cvta_generic_to_shared(from));
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                 "r"(source), "r"(num_bytes)
                 : "memory");
#endif
}

// Until all that this thread has started to add is read, or with kIsWritten done.
template <bool kIsWritten>
__device__ __forceinline__ void finish_adding() {
#ifndef DSC_HOST_EXECUTOR
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    if constexpr (kIsWritten) {
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    } else {
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }
#endif
}

}  // namespace dsc
