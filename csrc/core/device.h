// The CUDA language for every kernel of dscoder: nvcc's own headers, or under DSC_HOST_EXECUTOR the host
// executor's (csrc/host), which compiles the same .cu with the C++ compiler. Kernels include this header and
// never <cuda_runtime.h> itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef DSC_HOST_EXECUTOR
#include "host/cuda.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// Shared memory is declared through two macros, because the host executor gives each block its own copy (so
// that the blocks of a cooperative launch may be alive at once) and fills it with NaNs when the block starts.
//     DSC_SHARED(float[kTile][kTile + 1], tile);  a block-wide variable; inside templates too
//     DSC_SHARED_DYNAMIC(float, scratch);         float* to the launch's bytes, aligned to 128
#ifdef DSC_HOST_EXECUTOR
#define DSC_SHARED(type, name) \
    std::type_identity_t<type>& name = ::dsc::host::shared_variable<std::type_identity_t<type>>([] {}, #name)
#define DSC_SHARED_DYNAMIC(type, name) type* const name = ::dsc::host::shared_dynamic<type>()
#define DSC_UNROLL
#define DSC_NO_UNROLL
#else
#define DSC_SHARED(type, name) __shared__ std::type_identity_t<type> name
#define DSC_SHARED_DYNAMIC(type, name)                                   \
    extern __shared__ __align__(128) unsigned char dsc_shared_dynamic[]; \
    type* const name = reinterpret_cast<type*>(dsc_shared_dynamic)
#define DSC_UNROLL _Pragma("unroll")
#define DSC_NO_UNROLL _Pragma("unroll 1")
#endif
