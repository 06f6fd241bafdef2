// Reading one tensor: its type's exchange API, and every check a kernel's memory safety rests on.
#include "bind/tensor.h"

#include <algorithm>

namespace py = pybind11;

namespace dsc::bind {
namespace {

// The API of the tensor's type. Types are few and are kept alive here, so that an address names one type
// forever.
const dlpack::ExchangeApi* api_of(py::handle tensor) {
    struct Entry {
        PyTypeObject* type;
        const dlpack::ExchangeApi* api;
    };
    static std::array<Entry, 8> known{};
    static size_t num_known = 0;
    PyTypeObject* const type = Py_TYPE(tensor.ptr());
    for (size_t i = 0; i < num_known; ++i) {
        if (known[i].type == type) return known[i].api;
    }
    const py::object capsule =
        py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
    if (capsule.is_none()) return nullptr;
    void* const pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (pointer == nullptr) throw py::error_already_set();
    const auto* const api = static_cast<const dlpack::ExchangeApi*>(pointer);
    if (api->header.major != dlpack::kMajorVersion or api->view_object == nullptr) return nullptr;
    if (num_known < known.size()) {
        Py_INCREF(type);
        known[num_known++] = {type, api};
    }
    return api;
}

std::string shape_text(const int64_t* sizes, int rank) {
    std::string text;
    for (int i = 0; i < rank; ++i) {
        text += (i ? ", " : "") + (sizes[i] == kAnySize ? "any" : std::to_string(sizes[i]));
    }
    return "[" + text + "]";
}

// Whether the last `num_dense` dimensions are contiguous.
bool is_contiguous(const dlpack::Tensor& tensor, int num_dense) {
    const int first = tensor.rank - num_dense;
    for (int i = 0; i < tensor.rank; ++i) {
        if (tensor.shape[i] == 0) return true;
    }
    int64_t wanted = 1;
    for (int i = tensor.rank - 1; i >= first; --i) {
        if (tensor.shape[i] != 1 and tensor.strides[i] != wanted) return false;
        wanted *= tensor.shape[i];
    }
    return true;
}

std::string name_of(dlpack::DataType dtype) {
    static constexpr const char* kNames[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
    if (dtype.code >= std::size(kNames))
        return concat("dlpack code ", int{dtype.code}, ", ", int{dtype.bits}, " bits");
    return dtype.code == 6 ? "bool" : concat(kNames[dtype.code], int{dtype.bits});
}

std::string name_of(dlpack::Device device) {
    if (device.type == dlpack::kCpu) return "cpu";
    if (device.type == dlpack::kCuda) return concat("cuda:", device.idx);
    return concat("dlpack device ", static_cast<int>(device.type), ":", device.idx);
}

}  // namespace

const dlpack::ExchangeApi* Call::see(const char* name, py::handle tensor, dlpack::Tensor& seen) const {
    const dlpack::ExchangeApi* const api = api_of(tensor);
    DSC_CHECK_TYPE(api != nullptr, op_, ": ", name, " must be a torch tensor (torch >= 2.11), got ",
                   Py_TYPE(tensor.ptr())->tp_name);
    if (api->view_object(tensor.ptr(), &seen) != 0) throw py::error_already_set();
    return api;
}

FloatType Call::float_type_of(const char* name, py::handle tensor) {
    dlpack::Tensor seen;
    see(name, tensor, seen);
    for (const FloatType type : {FloatType::kFloat32, FloatType::kBfloat16, FloatType::kFloat16}) {
        if (seen.dtype == dtype_of(type)) return type;
    }
    throw WrongType(
        concat(op_, ": ", name, " must be float32, bfloat16 or float16, got ", name_of(seen.dtype)));
}

dlpack::Tensor Call::view(const char* name, py::handle tensor, dlpack::DataType dtype, int rank,
                          int num_dense) {
    dlpack::Tensor seen;
    const dlpack::ExchangeApi* const api = see(name, tensor, seen);
    const dlpack::Device wanted{kKernelDevice, device_idx_};
    DSC_CHECK(seen.device.type == kKernelDevice, op_, ": ", name, " must be on a ",
              kKernelDevice == dlpack::kCpu ? "CPU" : "CUDA", " device, got ", name_of(seen.device));
    DSC_CHECK(first_name_ == nullptr or seen.device.idx == device_idx_, op_, ": ", name, " must be on ",
              name_of(wanted), " like ", first_name_, ", got ", name_of(seen.device));
    DSC_CHECK_TYPE(seen.dtype == dtype, op_, ": ", name, " must be ", name_of(dtype), ", got ",
                   name_of(seen.dtype));
    DSC_CHECK(seen.rank == rank, op_, ": ", name, " must have ", rank, " dimensions, got ", seen.rank);
    DSC_CHECK(is_contiguous(seen, num_dense), op_, ": ", name, " must be contiguous",
              num_dense < rank ? concat(" in its last ", num_dense, " dimensions") : "", ", got shape ",
              shape_text(seen.shape, rank), " with strides ", shape_text(seen.strides, rank));
    if (first_name_ == nullptr) {
        first_name_ = name;
        device_idx_ = seen.device.idx;
        api_ = api;
    }
    return seen;
}

void Call::check_shape(const char* name, const int64_t* wanted, const int64_t* seen, int rank) const {
    const auto fits = [](int64_t want, int64_t got) { return want == kAnySize or want == got; };
    DSC_CHECK(std::equal(wanted, wanted + rank, seen, fits), op_, ": ", name, " must have shape ",
              shape_text(wanted, rank), ", got ", shape_text(seen, rank));
}

cudaStream_t Call::current_stream() const {
    void* stream = nullptr;
    if (api_->current_stream(kKernelDevice, device_idx_, &stream) != 0) throw py::error_already_set();
    return static_cast<cudaStream_t>(stream);
}

}  // namespace dsc::bind
