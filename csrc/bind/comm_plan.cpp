// Where things lie in an exchange buffer and how many blocks a launch has: in every build, since it takes no
// kernel to tell.
#include <pybind11/pybind11.h>

#include "comm/comm_layout.h"
#include "core/check.h"

namespace py = pybind11;

namespace dsc {
namespace bind {
namespace {

py::dict comm_buffer_layout(int num_ranks, int max_tokens, int64_t row_bytes, int num_topk) {
    constexpr const char* kOp = "comm_buffer_layout";
    for (const int64_t number : {int64_t{num_ranks}, int64_t{max_tokens}, row_bytes, int64_t{num_topk}}) {
        DSC_CHECK(number >= 0, kOp, ": sizes must be >= 0, got ", number);
    }
    const CommLayout layout = comm_layout(
        {.num_ranks = num_ranks, .max_tokens = max_tokens, .num_topk = num_topk, .row_bytes = row_bytes});
    py::dict seen;
    seen["dispatch_rows"] = layout.rows[0];
    seen["dispatch_floats"] = layout.floats[0];
    seen["combine_rows"] = layout.rows[1];
    seen["combine_floats"] = layout.floats[1];
    seen["idx"] = layout.idx;
    seen["num_bytes"] = layout.num_bytes;
    return seen;
}

int comm_blocks(int num_sms, int num_launched, int num_roles) {
    DSC_CHECK(num_sms > 0 and num_launched > 0 and (num_roles == 1 or num_roles == 2),
              "comm_num_blocks: num_sms and num_launched must be > 0 and num_roles 1 or 2, got ", num_sms,
              ", ", num_launched, " and ", num_roles);
    return comm_num_blocks(num_sms, num_launched, num_roles);
}

}  // namespace
}  // namespace bind

void register_comm_plan(py::module_& module) {
    module.def("comm_buffer_layout", bind::comm_buffer_layout, py::arg("num_ranks"), py::arg("max_tokens"),
               py::arg("row_bytes"), py::arg("num_topk"));
    module.def("comm_num_blocks", bind::comm_blocks, py::arg("num_sms"), py::arg("num_launched"),
               py::arg("num_roles"));
}

}  // namespace dsc
