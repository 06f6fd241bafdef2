// CommBuffer as a class of Python.
#include "comm/comm_buffer.h"

#include <pybind11/pybind11.h>

#include <string>

#include "core/check.h"

namespace py = pybind11;

namespace dsc {
namespace bind {
namespace {

CommCopy copy_of(const std::string& copy) {
    if (copy == "auto") return CommCopy::kAuto;
    if (copy == "words") return CommCopy::kWords;
    DSC_CHECK(copy == "bulk", "CommBuffer: copy must be auto, words or bulk, got ", copy);
    return CommCopy::kBulk;
}

const char* phase_of(CommPhase phase) {
    switch (phase) {
        case CommPhase::kDispatchFree:
            return "dispatch_free";
        case CommPhase::kDispatchArrival:
            return "dispatch_arrival";
        case CommPhase::kDispatchCount:
            return "dispatch_count";
        case CommPhase::kCombineFree:
            return "combine_free";
        case CommPhase::kCombineArrival:
            return "combine_arrival";
        case CommPhase::kCombineCount:
            return "combine_count";
    }
    return "unknown";
}

std::unique_ptr<CommBuffer> make_buffer(int rank, int num_ranks, int max_tokens, int64_t row_bytes,
                                        int num_topk, double timeout, int device, const std::string& copy,
                                        int num_blocks) {
    const CommShape shape{
        .num_ranks = num_ranks, .max_tokens = max_tokens, .num_topk = num_topk, .row_bytes = row_bytes};
    const CommSettings settings{.copy = copy_of(copy), .num_blocks = num_blocks};
    return std::make_unique<CommBuffer>(
        rank, shape, CommBufferOptions{.settings = settings, .timeout = timeout, .device = device});
}

py::object status_of(const CommBuffer& buffer) {
    const std::optional<CommStatus> status = buffer.status();
    if (not status) return py::none();
    py::dict seen;
    seen["rank"] = status->rank;
    seen["peer"] = status->peer;
    seen["phase"] = phase_of(status->phase);
    seen["expected"] = status->expected;
    seen["seen"] = status->seen;
    return seen;
}

}  // namespace
}  // namespace bind

void register_comm_buffer(py::module_& module) {
    // Local: a process may load the extension beside the one of the host executor.
    py::class_<CommBuffer>(module, "CommBuffer", py::module_local())
        .def(py::init(&bind::make_buffer), py::kw_only(), py::arg("rank"), py::arg("num_ranks"),
             py::arg("max_tokens"), py::arg("row_bytes"), py::arg("num_topk"), py::arg("timeout"),
             py::arg("device") = 0, py::arg("copy") = "auto", py::arg("num_blocks") = 0)
        .def("handle", [](CommBuffer& buffer) { return py::bytes(buffer.handle()); })
        .def("open", &CommBuffer::open, py::arg("peer"), py::arg("handle"))
        .def("connect", &CommBuffer::connect, py::arg("peer"))
        .def("status", bind::status_of)
        .def("fail", &CommBuffer::fail)
        .def("disconnect", &CommBuffer::disconnect)
        .def("close", &CommBuffer::close)
        .def_property_readonly("rank", &CommBuffer::rank)
        .def_property_readonly("num_bytes", &CommBuffer::num_bytes)
        .def_property_readonly("address", [](const CommBuffer& buffer) {
            return reinterpret_cast<uintptr_t>(buffer.address());
        });
}

}  // namespace dsc
