// mla_prefill: checks what memory safety asks for, fills the params by name, launches on the caller's stream.
// What the arguments mean to each other is checked in dscoder.ops; outputs and scratch come in allocated.
#include "attention/mla_prefill.h"

#include <limits>

#include "bind/mla_prefill_tiling.h"
#include "bind/tensor.h"

namespace py = pybind11;

namespace dsc {
namespace bind {
namespace {

constexpr int64_t kMostInt = std::numeric_limits<int32_t>::max();

void check_int(const char* op, const char* name, int64_t size) {
    DSC_CHECK(size <= kMostInt, op, ": ", name, " must fit an int32, got ", size);
}

// Both cu_seqlens, and how many sequences they bound.
struct Ends {
    const int32_t *q, *k;
    int num_sequences;
};

Ends read_ends(Call& call, const char* op, py::handle cu_seqlens_q, py::handle cu_seqlens_k) {
    const auto ends_q = call.read<1>("cu_seqlens_q", cu_seqlens_q, kInt32);
    const int64_t num_ends = ends_q.shape[0];
    DSC_CHECK(num_ends > 0, op, ": cu_seqlens_q must have at least one element, got 0");
    check_int(op, "the number of sequences", num_ends);
    const auto ends_k = call.read<1>("cu_seqlens_k", cu_seqlens_k, kInt32, {num_ends});
    return {ends_q.as<const int32_t>(), ends_k.as<const int32_t>(), static_cast<int>(num_ends) - 1};
}

int32_t* read_plan(Call& call, const char* op, py::handle plan, int64_t size) {
    const auto plan_N = call.read<1>("plan", plan, kInt32);
    DSC_CHECK(plan_N.shape[0] >= size, op, ": plan must have at least ", size, " elements, got ",
              plan_N.shape[0]);
    const auto misaligned = reinterpret_cast<uintptr_t>(plan_N.data) % 8;
    DSC_CHECK(misaligned == 0, op, ": plan must start at a multiple of 8 bytes, is ", misaligned,
              " past one");
    return plan_N.as<int32_t>();
}

void mla_prefill_plan(py::handle cu_seqlens_q, py::handle cu_seqlens_k, py::handle plan, int64_t num_queries,
                      int64_t num_keys, const std::string& side, int tile_rows, int block_rows, bool causal) {
    constexpr const char* kOp = "mla_prefill_plan";
    Call call(kOp);
    const Ends ends = read_ends(call, kOp, cu_seqlens_q, cu_seqlens_k);
    const PrefillTiling tiling = prefill_tiling(kOp, side, tile_rows, block_rows, causal);
    const int64_t num_rows = tiling.side == PrefillSide::kQueries ? num_queries : num_keys;
    const int64_t most = most_prefill_tiles(num_rows, ends.num_sequences, tile_rows);
    const MlaPrefillPlanParams params{
        .cu_seqlens_q = ends.q,
        .cu_seqlens_k = ends.k,
        .plan = read_plan(call, kOp, plan, 2 * (1 + most) + ends.num_sequences),
        .num_queries = num_queries,
        .num_keys = num_keys,
        .num_sequences = ends.num_sequences,
        .tiling = tiling,
    };
    call.launch([&](cudaStream_t stream) { launch_mla_prefill_plan(params, stream); });
}

}  // namespace
}  // namespace bind

void register_mla_prefill(py::module_& module) {
    module.def("mla_prefill_plan", bind::mla_prefill_plan, py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"),
               py::arg("plan"), py::arg("num_queries"), py::arg("num_keys"), py::arg("side"),
               py::arg("tile_rows"), py::arg("block_rows"), py::arg("causal"));
}

}  // namespace dsc
