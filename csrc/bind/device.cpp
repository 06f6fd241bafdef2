// Where kernels are launched: the device of the call, if this build has kernels for it.
#include "bind/tensor.h"

#ifdef DSC_HOST_EXECUTOR

namespace dsc::bind {

DeviceGuard::DeviceGuard(const char*, int) {}
DeviceGuard::~DeviceGuard() {}

}  // namespace dsc::bind

#else

#include <array>
#include <string_view>

namespace dsc::bind {
namespace {

constexpr std::string_view kArchs = DSC_CUDA_ARCHS;  // as in "80 90a"

void check_cuda(cudaError_t status, const char* op) {
    if (status == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error(concat(op, ": ", cudaGetErrorString(status)));
}

// Machine code for 80 runs on every 8.x from there on, that for 90a on 9.0 alone.
bool has_kernels_for(int major, int minor) {
    for (std::string_view rest = kArchs; not rest.empty();) {
        const std::string_view arch = rest.substr(0, rest.find(' '));
        rest.remove_prefix(std::min(rest.size(), arch.size() + 1));
        const int arch_major = arch[0] - '0', arch_minor = arch[1] - '0';
        const bool is_exact = arch.back() == 'a';
        if (arch_major == major and (is_exact ? arch_minor == minor : arch_minor <= minor)) return true;
    }
    return false;
}

void check_device(const char* op, int device_idx) {
    static std::array<bool, 64> is_checked{};
    const auto slot = static_cast<size_t>(device_idx);
    if (slot < is_checked.size() and is_checked[slot]) return;
    int major = 0, minor = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_idx), op);
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_idx), op);
    if (not has_kernels_for(major, minor)) {
        throw std::runtime_error(concat(op, ": cuda:", device_idx, " is of compute capability ", major, ".",
                                        minor, ", this build of dscoder has kernels for ", kArchs,
                                        " (DSCODER_CUDA_ARCHS; kernels exist for 80 and 90a)"));
    }
    if (slot < is_checked.size()) is_checked[slot] = true;
}

}  // namespace

DeviceGuard::DeviceGuard(const char* op, int device_idx) {
    check_device(op, device_idx);
    int current = 0;
    check_cuda(cudaGetDevice(&current), op);
    if (current == device_idx) return;
    check_cuda(cudaSetDevice(device_idx), op);
    previous_ = current;
}

DeviceGuard::~DeviceGuard() {
    if (previous_ >= 0) cudaSetDevice(previous_);
}

}  // namespace dsc::bind

#endif
