// Tensors from Python without torch's headers: through the C exchange API of DLPack 1.3 (dmlc/dlpack,
// include/dlpack/dlpack.h), which torch >= 2.11 offers as `type(tensor).__dlpack_c_exchange_api__`. Reading a
// tensor this way calls no Python and takes no reference: what is read lives until the binding returns.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

#include "core/check.h"
#include "core/device.h"
#include "core/dtype.h"

namespace dsc::bind {

// The part of DLPack's ABI that is used, under our names.
namespace dlpack {

constexpr uint32_t kMajorVersion = 1;

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };

struct Device {
    DeviceType type;
    int32_t idx;
};

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
    bool operator==(const DataType&) const = default;
};

struct Tensor {
    void* data;
    Device device;
    int32_t rank;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

struct ExchangeApi {
    struct Header {
        uint32_t major, minor;
        const Header* previous;  // the same of an older version
    } header;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*view_object)(PyObject* object, Tensor* out);  // 0, or -1 with a Python error set
    int (*current_stream)(DeviceType type, int32_t device_idx, void** out);
};

}  // namespace dlpack

constexpr dlpack::DataType kFloat32{.code = 2, .bits = 32, .lanes = 1};
constexpr dlpack::DataType kFloat16{.code = 2, .bits = 16, .lanes = 1};
constexpr dlpack::DataType kBfloat16{.code = 4, .bits = 16, .lanes = 1};
constexpr dlpack::DataType kInt32{.code = 0, .bits = 32, .lanes = 1};
constexpr dlpack::DataType kInt64{.code = 0, .bits = 64, .lanes = 1};

// Where the kernels of this build run.
#ifdef DSC_HOST_EXECUTOR
constexpr dlpack::DeviceType kKernelDevice = dlpack::kCpu;
#else
constexpr dlpack::DeviceType kKernelDevice = dlpack::kCuda;
#endif

constexpr dlpack::DataType dtype_of(FloatType type) {
    if (type == FloatType::kFloat32) return kFloat32;
    return type == FloatType::kBfloat16 ? kBfloat16 : kFloat16;
}

constexpr int64_t kAnySize = -1;  // in a wanted shape

// A contiguous tensor on the kernels' device.
template <int kRank>
struct Array {
    void* data;
    std::array<int64_t, kRank> shape;

    template <typename T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

// A tensor on the kernels' device whose first dimensions may lie apart.
template <int kRank>
struct StridedArray : Array<kRank> {
    std::array<int64_t, kRank> strides;  // elements; 0 of a dimension of one, and where there is nothing
};

// Makes the call's device current for a launch, and the previous one again afterwards. Throws
// std::runtime_error when the build has no kernel for that device.
class DeviceGuard {
  public:
    DeviceGuard(const char* op, int device_idx);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = -1;
};

// One call of an op: reads its tensors, which must all be on one device, and launches there.
class Call {
  public:
    explicit Call(const char* op) : op_(op) {}
    int device_idx() const { return device_idx_; }  // of the tensors read so far

    template <int kRank>
    Array<kRank> read(const char* name, pybind11::handle tensor, dlpack::DataType dtype) {
        return read_strided<kRank>(name, tensor, dtype, kRank);
    }

    // A tensor whose shape, or part of it, is known already.
    template <int kRank>
    Array<kRank> read(const char* name, pybind11::handle tensor, dlpack::DataType dtype,
                      const std::array<int64_t, kRank>& wanted) {
        return read_strided<kRank>(name, tensor, dtype, wanted, kRank);
    }

    // A tensor of which the last `num_dense` dimensions are contiguous.
    template <int kRank>
    StridedArray<kRank> read_strided(const char* name, pybind11::handle tensor, dlpack::DataType dtype,
                                     int num_dense = 1) {
        const dlpack::Tensor seen = view(name, tensor, dtype, kRank, num_dense);
        StridedArray<kRank> array{{static_cast<char*>(seen.data) + seen.byte_offset, {}}, {}};
        std::copy_n(seen.shape, kRank, array.shape.begin());
        const bool is_empty = std::find(array.shape.begin(), array.shape.end(), 0) != array.shape.end();
        for (int i = 0; i < kRank; ++i) {
            array.strides[i] = is_empty or array.shape[i] == 1 ? 0 : seen.strides[i];
        }
        return array;
    }

    template <int kRank>
    StridedArray<kRank> read_strided(const char* name, pybind11::handle tensor, dlpack::DataType dtype,
                                     const std::array<int64_t, kRank>& wanted, int num_dense = 1) {
        const StridedArray<kRank> array = read_strided<kRank>(name, tensor, dtype, num_dense);
        check_shape(name, wanted.data(), array.shape.data(), kRank);
        return array;
    }

    // Which of float32, bfloat16 and float16 the tensor holds; to be read next with that dtype.
    FloatType float_type_of(const char* name, pybind11::handle tensor);

    // launch(stream) with the tensors' device current, on the caller's stream there. An error names the op.
    template <typename Launch>
    void launch(const Launch& launch) const {
        const DeviceGuard guard(op_, device_idx_);
        try {
            launch(current_stream());
        } catch (const LaunchError& error) {
            throw std::runtime_error(concat(op_, ": ", error.what()));
        }
    }

  private:
    const dlpack::ExchangeApi* see(const char* name, pybind11::handle tensor, dlpack::Tensor& seen) const;
    dlpack::Tensor view(const char* name, pybind11::handle tensor, dlpack::DataType dtype, int rank,
                        int num_dense);
    cudaStream_t current_stream() const;
    void check_shape(const char* name, const int64_t* wanted, const int64_t* seen, int rank) const;

    const char* op_;
    const char* first_name_ = nullptr;  // of the argument that named the device
    int device_idx_ = -1;
    const dlpack::ExchangeApi* api_ = nullptr;
};

}  // namespace dsc::bind
