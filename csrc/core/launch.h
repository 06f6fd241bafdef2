// Kernel launches: one line that launches on the GPU under nvcc and runs in the host executor otherwise.
// Launch limits that are broken (too many threads, too much shared memory, no kernel image for this device)
// throw LaunchError.
//     launch(moe_gate_kernel<2>, grid, block, shared_bytes, stream, params);
// launch_overlapped is the same for kernels that keep the rule of core/overlap.h, and starts them early.
#pragma once

#include "core/device.h"

#ifndef DSC_HOST_EXECUTOR
#include "core/check.h"
#include "core/launch_cache.h"
#endif

namespace dsc {

#ifdef DSC_HOST_EXECUTOR

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Args&&... args) {
    host::run_grid({.grid = grid, .block = block, .shared_bytes = shared_bytes}, kernel,
                   static_cast<Args&&>(args)...);
}

template <typename... Params, typename... Args>
void launch_overlapped(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                       Args&&... args) {
    host::run_grid({.grid = grid, .block = block, .shared_bytes = shared_bytes, .is_overlapped = true},
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
    throw LaunchError(concat(step, ": ", cudaGetErrorString(status)));
}

inline int current_device() {
    int device = 0;
    check_launch(cudaGetDevice(&device), "cudaGetDevice");
    return device;
}

template <cudaDeviceAttr kAttribute>
int device_attribute(int device) {
    static DeviceValues known;
    return known.get(device, [&] {
        int value = 0;
        check_launch(cudaDeviceGetAttribute(&value, kAttribute, device), "cudaDeviceGetAttribute");
        return value;
    });
}

// On the current device.
inline void allow_shared_bytes(const void* kernel, size_t num_bytes) {
    static SharedLimits limits;
    limits.raise(kernel, current_device(), num_bytes, [&] {
        check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(num_bytes)),
                     "cudaFuncSetAttribute");
    });
}

template <typename... Params, typename... Args>
void launch_configured(void (*kernel)(Params...), cudaLaunchConfig_t config, Args&&... args) {
    constexpr size_t kSharedWithoutOptIn = 48 * 1024;
    if (config.dynamicSmemBytes > kSharedWithoutOptIn) {
        allow_shared_bytes(reinterpret_cast<const void*>(kernel), config.dynamicSmemBytes);
    }
    check_launch(cudaLaunchKernelEx(&config, kernel, static_cast<Args&&>(args)...), "cudaLaunchKernelEx");
}

inline cudaLaunchConfig_t launch_config(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return config;
}

// Whether kernels may start early on the current device: machine code with the wait in it runs there.
inline bool can_overlap_launches() {
    return device_attribute<cudaDevAttrComputeCapabilityMajor>(current_device()) >= 9;
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Args&&... args) {
    launch_configured(kernel, launch_config(grid, block, shared_bytes, stream), static_cast<Args&&>(args)...);
}

// The kernel keeps the rule of core/overlap.h. Capturing a graph makes the early start part of it.
template <typename... Params, typename... Args>
void launch_overlapped(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                       cudaStream_t stream, Args&&... args) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = launch_config(grid, block, shared_bytes, stream);
    config.attrs = &attribute;
    config.numAttrs = can_overlap_launches() ? 1 : 0;
    launch_configured(kernel, config, static_cast<Args&&>(args)...);
}

// All blocks of the grid are alive at once, so cooperative_groups::this_grid().sync() may be used.
template <typename... Params, typename... Args>
void launch_cooperative(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                        cudaStream_t stream, Args&&... args) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config = launch_config(grid, block, shared_bytes, stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    launch_configured(kernel, config, static_cast<Args&&>(args)...);
}

#endif

}  // namespace dsc
