// The instructions of sm_80 that CUDA C++ has no name for, as the kernels use them (PTX ISA 8.x, sections
// cp.async, ldmatrix and mma). In the host executor the same functions come from host/ptx_sm80.h.
//
// An 8 x 8 matrix of 16-bit elements lies on a warp with lane l holding elements (l / 4, 2 * (l % 4)) and the
// one to the right of it, the lower column in the lower half of a register.
#pragma once

#include "core/device.h"

#ifndef DSC_HOST_EXECUTOR

namespace dsc {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The value itself, of which the compiler knows nothing: what is computed from it is computed here, not ahead
// of a loop and kept in registers that the loop needs.
__device__ __forceinline__ int unhoisted(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Starts copying 16 bytes past L1; zeros instead where is_valid is false, and `global` is not read. Both
// addresses are multiples of 16.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool is_valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(is_valid ? 16 : 0)
                 : "memory");
}

// The copies this thread has started since its last commit are one group.
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kNumPending of this thread's newest groups are under way. Other threads see what
// arrived after the next barrier.
template <int kNumPending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kNumPending) : "memory");
}

// Four matrices; lane l names row l % 8 of matrix l / 8, 16 bytes at a multiple of 16.
__device__ __forceinline__ void load_matrices(uint32_t (&matrix)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// The same, each matrix transposed on the way.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&matrix)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// acc [16, 8] += a [16, 16] b [16, 8], in float32. a: the matrices of rows 0-7 and 8-15 of columns 0-7, then
// of columns 8-15. b: the transposes of rows 0-7 and of rows 8-15. acc: rows 0-7, then rows 8-15.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        static_assert(std::is_same_v<T, __half>);
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

}  // namespace dsc

#else
#include "host/ptx_sm80.h"
#endif
