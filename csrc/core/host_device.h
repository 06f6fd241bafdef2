// For pure functions that kernels, launches and builds without kernels share: on both sides under nvcc.
#pragma once

#ifdef __CUDACC__
#define DSC_HOST_DEVICE __host__ __device__
#else
#define DSC_HOST_DEVICE
#endif
