// The test module _host_kernels: the executor's seed and the test kernels, on numpy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "bind/tensor.h"
#include "host/executor.h"
#include "host_kernels.h"

namespace py = pybind11;

namespace dsc::tests {
namespace {

template <typename T>
using In = py::array_t<T, py::array::c_style>;

template <typename T>
int size_of(const In<T>& array) {
    return static_cast<int>(array.size());
}

template <typename T>
In<T> zeros(py::ssize_t size) {
    In<T> array(size);
    std::fill_n(array.mutable_data(), size, T{});
    return array;
}

In<float> bind_transpose(const In<float>& x) {
    In<float> y({x.shape(1), x.shape(0)});
    transpose(x.data(), y.mutable_data(), static_cast<int>(x.shape(0)), static_cast<int>(x.shape(1)));
    return y;
}

In<int> bind_prefix(const In<int>& x, int num_blocks) {
    auto prefix = zeros<int>(2 * num_blocks);  // the second half is the kernel's scratch
    prefix_of_blocks(x.data(), prefix.mutable_data(), num_blocks, size_of(x) / num_blocks);
    return prefix;
}

In<int> bind_coordinates(const std::array<unsigned, 3>& grid, const std::array<unsigned, 3>& block) {
    py::ssize_t num_threads = 1;
    for (const unsigned extent : grid) num_threads *= extent;
    for (const unsigned extent : block) num_threads *= extent;
    auto counts = zeros<int>(num_threads);
    coordinates(counts.mutable_data(), grid.data(), block.data());
    return counts;
}

template <typename T>
void bind_shuffle(py::module_& module) {
    module.def("shuffle", [](const std::string& kind, const In<T>& x, int argument, int width) {
        const auto idx = std::string("idx  up   down xor  ").find(kind + " ") / 5;
        In<T> y(x.size());
        shuffle(static_cast<Shuffle>(idx), x.data(), y.mutable_data(), argument, width);
        return y;
    });
}

template <typename T>
void bind_atomics(py::module_& module) {
    module.def("atomics", [](In<T>& cells, int num_threads) {
        auto seen = zeros<T>(num_threads);
        atomics(cells.mutable_data(), seen.mutable_data(), num_threads);
        return seen;
    });
}

template <typename From, typename To>
void bind_convert(py::module_& module, const char* name, void (*convert)(const From*, To*, int)) {
    module.def(name, [convert](const In<From>& x) {
        In<To> y(x.size());
        convert(x.data(), y.mutable_data(), size_of(x));
        return y;
    });
}

void bind_blocks(py::module_& module) {
    module.def("block_sum", [](const In<float>& x, int num_blocks) {
        float sum = 0.0f;
        block_sum(x.data(), &sum, size_of(x), num_blocks);
        return sum;
    });
    module.def("transpose", bind_transpose);
    module.def("histogram", [](const In<int>& x, int num_bins) {
        auto counts = zeros<unsigned>(num_bins);
        histogram(x.data(), counts.mutable_data(), size_of(x), num_bins);
        return counts;
    });
    module.def("votes", [](const In<int>& x) {
        auto result = zeros<int>(x.size());
        votes(x.data(), result.mutable_data(), size_of(x));
        return result;
    });
    module.def("prefix_of_blocks", bind_prefix);
    module.def("pass_token", [](int num_blocks) {
        auto log = zeros<int>(1 + num_blocks);
        pass_token(log.mutable_data(), num_blocks);
        return log;
    });
    module.def("arrival_order", [](int num_blocks, int num_threads) {
        auto order = zeros<int>(1 + 2 * num_blocks * num_threads);
        arrival_order(order.mutable_data(), num_blocks, num_threads);
        return order;
    });
    module.def("fresh_shared", fresh_shared);
    module.def("coordinates", bind_coordinates);
}

void bind_warps(py::module_& module) {
    bind_shuffle<int>(module);
    bind_shuffle<float>(module);
    bind_shuffle<double>(module);
    bind_shuffle<int64_t>(module);
    module.def("warp_queries", [](const In<int>& x, unsigned mask) {
        auto result = zeros<unsigned>(x.size() * 10);
        warp_queries(x.data(), result.mutable_data(), mask);
        return result;
    });
    module.def("half_warps", [](const In<int>& x) {
        auto result = zeros<int>(x.size());
        half_warps(x.data(), result.mutable_data());
        return result;
    });
}

void bind_ptx(py::module_& module) {
    py::enum_<Copying>(module, "Copying")
        .value("WAITED", Copying::kWaited)
        .value("UNWAITED", Copying::kUnwaited)
        .value("OLDEST_WAITED", Copying::kOldestWaited)
        .value("UNCOMMITTED", Copying::kUncommitted)
        .value("ZERO_FILL", Copying::kZeroFill)
        .value("NEIGHBOUR", Copying::kNeighbour)
        .value("NEIGHBOUR_UNSYNCED", Copying::kNeighbourUnsynced)
        .value("MISALIGNED", Copying::kMisaligned)
        .value("INTO_GLOBAL", Copying::kIntoGlobal);
    module.def("load_matrices", [](const In<uint16_t>& matrices, bool is_transposed) {
        auto registers = zeros<uint32_t>(128);
        run_load_matrices(matrices.data(), registers.mutable_data(), is_transposed);
        return registers;
    });
    module.def("quad_words", [](const In<float>& tile, bool is_alternating) {
        auto y = zeros<uint16_t>(2 * 16 * 32);
        run_quad_words(tile.data(), y.mutable_data(), is_alternating);
        return y;
    });
    module.def("multiply_add",
               [](const In<uint16_t>& a, const In<uint16_t>& b, const In<float>& acc, bool is_bfloat16) {
                   In<float> sums({16, 8});
                   std::copy_n(acc.data(), acc.size(), sums.mutable_data());
                   run_multiply_add(a.data(), b.data(), sums.mutable_data(), is_bfloat16);
                   return sums;
               });
    module.def("copies", [](const In<float>& x, Copying kind) {
        auto y = zeros<float>(x.size());
        run_copies(x.data(), y.mutable_data(), size_of(x) / 8, kind);
        return y;
    });
}

void bind_bulk(py::module_& module) {
    py::enum_<Bulk>(module, "Bulk")
        .value("WAITED", Bulk::kWaited)
        .value("LOAD_UNWAITED", Bulk::kLoadUnwaited)
        .value("LOAD_LEFT", Bulk::kLoadLeft)
        .value("NEXT_PHASE", Bulk::kNextPhase)
        .value("OVERWRITTEN", Bulk::kOverwritten)
        .value("STORE_UNWAITED", Bulk::kStoreUnwaited)
        .value("READ_ALONE", Bulk::kReadAlone)
        .value("STORE_LEFT", Bulk::kStoreLeft)
        .value("UNCOMMITTED", Bulk::kUncommitted)
        .value("MISALIGNED", Bulk::kMisaligned)
        .value("EMPTY", Bulk::kEmpty)
        .value("INTO_GLOBAL", Bulk::kIntoGlobal);
    module.def("bulk", [](const In<float>& x, Bulk kind) {
        auto y = zeros<float>(x.size()), seen = zeros<float>(x.size());
        run_bulk(x.data(), y.mutable_data(), seen.mutable_data(), size_of(x), kind);
        return py::make_tuple(y, seen);
    });
}

void bind_faults(py::module_& module) {
    py::list names;
    for (int i = 0; i < kNumFaults; ++i) names.append(kFaults[i].name);
    module.attr("FAULTS") = names;
    const auto run = [](const std::string& name, const float* x, float* y, int num_values) {
        for (int i = 0; i < kNumFaults; ++i) {
            if (name == kFaults[i].name) kFaults[i].launch(x, y, num_values);
        }
    };
    module.def("run_fault", [run](const std::string& name, const In<float>& x) {
        auto y = zeros<float>(x.size());
        run(name, x.data(), y.mutable_data(), size_of(x));
        return y;
    });
    // As the binding of an op, which takes tensors.
    module.def("run_fault_of", [run](const std::string& op, const std::string& name, py::handle tensor) {
        bind::Call call(op.c_str());
        const auto x = call.read<1>("x", tensor, bind::kFloat32);
        std::vector<float> y(x.shape[0]);
        call.launch(
            [&](cudaStream_t) { run(name, x.as<const float>(), y.data(), static_cast<int>(x.shape[0])); });
    });
}

}  // namespace
}  // namespace dsc::tests

PYBIND11_MODULE(_host_kernels, module) {
    using namespace dsc::tests;
    module.def("set_order", dsc::host::set_order);
    bind_blocks(module);
    bind_warps(module);
    bind_atomics<int>(module);
    bind_atomics<unsigned>(module);
    bind_atomics<unsigned long long>(module);
    bind_atomics<float>(module);
    bind_atomics<double>(module);
    bind_convert(module, "to_bfloat16", to_bfloat16);
    bind_convert(module, "to_half", to_half);
    bind_convert(module, "from_bfloat16", from_bfloat16);
    bind_convert(module, "from_half", from_half);
    bind_ptx(module);
    bind_bulk(module);
    bind_faults(module);
}
