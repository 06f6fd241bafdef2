// What the kernels of sm_90a say in PTX because CUDA C++ has no word for it. Barriers, the copy engine and
// wgmma come from CuTe and CUTLASS.
#pragma once

#include "core/vec.h"

namespace dsc {

// 16 bytes in one access: an assignment may be cut into four.
__device__ __forceinline__ void store_whole(void* at, const Word& word) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(word.x), "r"(word.y), "r"(word.z),
                 "r"(word.w)
                 : "memory");
}

}  // namespace dsc
