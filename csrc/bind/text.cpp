// Bindings of the text family. Everything that touches a text or a length runs without the GIL.
#include "text/text.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>

namespace py = pybind11;

namespace dsc {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// An array over the vector's own memory, which lives as long as the array does.
py::array_t<int64_t> as_array(std::vector<int64_t>&& values) {
    auto owner = std::make_unique<std::vector<int64_t>>(std::move(values));
    const auto* data = owner->data();
    const auto size = static_cast<py::ssize_t>(owner->size());
    const py::capsule capsule(owner.get(), [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
    owner.release();
    return py::array_t<int64_t>(size, data, capsule);
}

// The UTF-8 of a str, which the str itself keeps.
std::string_view utf8_of(py::handle text, size_t index) {
    const std::string name = "apply_fim: texts[" + std::to_string(index) + "]";
    if (not PyUnicode_Check(text.ptr())) {
        throw py::type_error(name + " must be str, got " + Py_TYPE(text.ptr())->tp_name);
    }
    Py_ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (data == nullptr) {
        PyErr_Clear();
        throw py::value_error(name + " must be valid Unicode, got a lone surrogate");
    }
    return {data, static_cast<size_t>(size)};
}

py::tuple fim_plan(const py::tuple& texts, const Array<uint64_t>& keys, std::vector<std::string> sentinels,
                   double rate, double spm_share, bool cut_at_lines, uint64_t seed) {
    const size_t num_documents = texts.size();
    if (static_cast<size_t>(keys.size()) != num_documents) {
        throw py::value_error("apply_fim: document_ids must be as many as texts, got " +
                              std::to_string(keys.size()) + " and " + std::to_string(num_documents));
    }
    std::vector<std::string_view> views;  // the tuple keeps the texts alive
    views.reserve(num_documents);
    for (size_t i = 0; i < num_documents; ++i) views.push_back(utf8_of(texts[i], i));

    const auto n = static_cast<py::ssize_t>(num_documents);
    py::array_t<uint8_t> order(n);
    py::array_t<int64_t> middle({n, py::ssize_t{2}});
    const uint64_t* key_ptr = keys.data();
    uint8_t* order_ptr = order.mutable_data();
    int64_t* middle_ptr = middle.mutable_data();
    const FimParams params{rate, spm_share, cut_at_lines, seed, std::move(sentinels)};
    {
        const py::gil_scoped_release release;
        for (size_t i = 0; i < num_documents; ++i) {
            const FimCut cut = cut_document(views[i], key_ptr[i], params);
            order_ptr[i] = static_cast<uint8_t>(cut.order);
            middle_ptr[2 * i] = cut.begin;
            middle_ptr[2 * i + 1] = cut.end;
        }
    }
    return py::make_tuple(order, middle);
}

py::tuple pack_plan(const Array<int64_t>& lengths, int64_t window) {
    if (window < 1 or window > kMaxWindow) {
        throw py::value_error("pack: window must be between 1 and " + std::to_string(kMaxWindow) + ", got " +
                              std::to_string(window));
    }
    const std::span<const int64_t> span(lengths.data(), static_cast<size_t>(lengths.size()));
    for (const int64_t length : span) {
        if (length < 0) throw py::value_error("pack: lengths must be >= 0, got " + std::to_string(length));
    }
    PackPlan plan;
    {
        const py::gil_scoped_release release;
        plan = pack_best_fit(span, window);
    }
    return py::make_tuple(as_array(std::move(plan.document)), as_array(std::move(plan.start)),
                          as_array(std::move(plan.length)), as_array(std::move(plan.begin)));
}

}  // namespace

void register_text(py::module_& module) {
    module.def("fim_plan", &fim_plan);
    module.def("pack_plan", &pack_plan);
}

}  // namespace dsc
