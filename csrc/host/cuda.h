// The subset of CUDA C++ that the host executor gives a meaning to; core/device.h includes this in place of
// <cuda_runtime.h>. What is missing does not compile: add it beside its neighbours, with a test.
#pragma once

#include "host/atomics.h"
#include "host/barriers.h"
#include "host/device_math.h"
#include "host/executor.h"
#include "host/float16.h"
#include "host/vector_types.h"
#include "host/warp_intrinsics.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(num_bytes) __attribute__((aligned(num_bytes)))
#define __grid_constant__
#define __shared__       \
    static_assert(false, \
                  "shared memory is declared through DSC_SHARED and DSC_SHARED_DYNAMIC of core/device.h");

// The executor has one stream: a launch is over when it returns.
using cudaStream_t = struct CUstream_st*;
