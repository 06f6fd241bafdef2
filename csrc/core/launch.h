// Kernel launches: one line that launches on the GPU under nvcc and runs in the host executor otherwise.
// Launch limits that are broken (too many threads, too much shared memory, no kernel image for this device)
// throw.
//     launch(moe_gate_kernel<2>, grid, block, shared_bytes, stream, params);
#pragma once

#include "core/device.h"

#ifndef DSC_HOST_EXECUTOR
#include <stdexcept>
#include <string>
#endif

namespace dsc {

#ifdef DSC_HOST_EXECUTOR

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Args&&... args) {
    host::run_grid({.grid = grid, .block = block, .shared_bytes = shared_bytes, .is_cooperative = false},
                   kernel, static_cast<Args&&>(args)...);
}

template <typename... Params, typename... Args>
void launch_cooperative(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                        Args&&... args) {
    host::run_grid({.grid = grid, .block = block, .shared_bytes = shared_bytes, .is_cooperative = true},
                   kernel, static_cast<Args&&>(args)...);
}

#else

inline void check_launch(cudaError_t status, const char* step) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // a launch error is sticky until read: the next launch must not report this one
    throw std::runtime_error(std::string(step) + ": " + cudaGetErrorString(status));
}

template <typename... Params, typename... Args>
void launch_configured(void (*kernel)(Params...), cudaLaunchConfig_t config, Args&&... args) {
    constexpr size_t kSharedWithoutOptIn = 48 * 1024;
    if (config.dynamicSmemBytes > kSharedWithoutOptIn) {
        check_launch(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(config.dynamicSmemBytes)),
                     "cudaFuncSetAttribute");
    }
    check_launch(cudaLaunchKernelEx(&config, kernel, static_cast<Args&&>(args)...), "cudaLaunchKernelEx");
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Args&&... args) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    launch_configured(kernel, config, static_cast<Args&&>(args)...);
}

// All blocks of the grid are alive at once, so cooperative_groups::this_grid().sync() may be used.
template <typename... Params, typename... Args>
void launch_cooperative(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                        cudaStream_t stream, Args&&... args) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    launch_configured(kernel, config, static_cast<Args&&>(args)...);
}

#endif

}  // namespace dsc
