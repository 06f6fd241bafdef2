// How latent decoding is dealt out: in every build, since it takes no kernel to tell.
#include "attention/mla_decode_plan.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace dsc {
namespace bind {
namespace {

int64_t num_rows_of(const char* op, int64_t num_new, int64_t num_heads) {
    DSC_CHECK(num_new > 0 and num_heads > 0, op, ": num_new and num_heads must be positive, got ", num_new,
              " and ", num_heads);
    DSC_CHECK(num_new <= std::numeric_limits<int>::max() / num_heads, op,
              ": num_new * num_heads must fit an int32, got ", num_new, " and ", num_heads);
    return num_new * num_heads;
}

int mla_decode_num_parts(int64_t num_new, int64_t num_heads, int num_sms) {
    return dsc::mla_decode_num_parts(num_rows_of("mla_decode_num_parts", num_new, num_heads), num_sms);
}

std::vector<std::pair<int, int>> mla_decode_plan_of(const std::vector<int>& seq_lens, int num_parts,
                                                    int64_t max_rows) {
    constexpr const char* kOp = "mla_decode_plan_of";
    DSC_CHECK(num_parts > 0, kOp, ": num_parts must be positive, got ", num_parts);
    DSC_CHECK(max_rows >= 0, kOp, ": max_rows must be >= 0, got ", max_rows);
    const int num_sequences = static_cast<int>(seq_lens.size());
    std::vector<std::array<int, 2>> rows(seq_lens.size() + num_parts + 1);
    fill_mla_decode_plan(seq_lens, num_sequences, num_parts, max_rows, rows);
    std::vector<std::pair<int, int>> plan;
    for (const auto& [first, second] : rows) plan.emplace_back(first, second);
    return plan;
}

// What the kernel of sm_80 takes of a device whose blocks may have so many bytes of shared memory.
py::dict mla_decode_sm80_plan(int64_t num_new, int64_t num_heads, int max_shared_bytes) {
    const DecodeSm80Plan plan =
        plan_decode_sm80(num_rows_of("mla_decode_sm80_plan", num_new, num_heads), max_shared_bytes);
    py::dict seen;
    seen["rows"] = plan.tile_rows;
    seen["tiles"] = plan.num_tiles;
    seen["stages"] = plan.num_stages;
    seen["shared_bytes"] = plan.shared_bytes;
    return seen;
}

}  // namespace
}  // namespace bind

void register_mla_decode_plan(py::module_& module) {
    module.def("mla_decode_num_parts", bind::mla_decode_num_parts, py::arg("num_new"), py::arg("num_heads"),
               py::arg("num_sms"));
    module.def("mla_decode_plan_of", bind::mla_decode_plan_of, py::arg("seq_lens"), py::arg("num_parts"),
               py::arg("max_rows"));
    module.def("mla_decode_sm80_plan", bind::mla_decode_sm80_plan, py::arg("num_new"), py::arg("num_heads"),
               py::arg("max_shared_bytes"));
}

}  // namespace dsc
