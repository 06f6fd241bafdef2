// moe_permute and moe_unpermute: checks what memory safety asks for, fills the params by name, launches on
// the caller's stream. What the arguments mean to each other is checked in dscoder.ops; outputs come in
// allocated.
#include "bind/tensor.h"
#include "moe/moe.h"

namespace py = pybind11;

namespace dsc {
namespace bind {
namespace {

Array<1> read_offsets(Call& call, const char* op, py::handle offsets) {
    const auto offsets_E = call.read<1>("offsets", offsets, kInt32);
    DSC_CHECK(offsets_E.shape[0] > 0, op, ": offsets must have at least 1 element, got 0");
    return offsets_E;
}

struct Maps {
    MoePermuteMapsParams params;
    int64_t num_tokens;
    int num_topk;
};

Maps read_maps(Call& call, const char* op, py::handle idx, py::handle offsets, py::handle row,
               py::handle token, py::handle counts) {
    const auto idx_TK = call.read<2>("idx", idx, kInt32);
    const auto [num_tokens, num_topk] = idx_TK.shape;
    const auto offsets_E = read_offsets(call, op, offsets);
    const int64_t num_experts = offsets_E.shape[0];
    const auto row_TK = call.read<2>("row", row, kInt32, {num_tokens, num_topk});
    const int64_t num_choices = num_tokens * num_topk;
    const auto token_M = call.read<1>("token", token, kInt32, {num_choices});
    const auto counts_E =
        call.read<2>("counts", counts, kInt32, {moe_permute_num_counts(num_choices), num_experts});
    return {.params = {.idx = idx_TK.as<const int32_t>(),
                       .offsets = offsets_E.as<int32_t>(),
                       .row = row_TK.as<int32_t>(),
                       .token = token_M.as<int32_t>(),
                       .counts = counts_E.as<int32_t>(),
                       .num_choices = num_choices,
                       .num_experts = static_cast<int>(num_experts),
                       .num_topk = static_cast<int>(num_topk)},
            .num_tokens = num_tokens,
            .num_topk = static_cast<int>(num_topk)};
}

void moe_permute_maps_forward(py::handle idx, py::handle offsets, py::handle row, py::handle token,
                              py::handle counts) {
    constexpr const char* kOp = "moe_permute_maps";
    Call call(kOp);
    const Maps maps = read_maps(call, kOp, idx, offsets, row, token, counts);
    call.launch([&](cudaStream_t stream) { launch_moe_permute_maps(maps.params, stream); });
}

void moe_permute_forward(py::handle x, py::handle idx, py::handle rows, py::handle offsets, py::handle row,
                         py::handle token, py::handle counts) {
    constexpr const char* kOp = "moe_permute";
    Call call(kOp);
    const FloatType type = call.float_type_of("x", x);
    const Maps maps = read_maps(call, kOp, idx, offsets, row, token, counts);
    const auto x_TD = call.read<2>("x", x, dtype_of(type), {maps.num_tokens, kAnySize});
    const int64_t width = x_TD.shape[1];
    const auto rows_MD = call.read<2>("rows", rows, dtype_of(type), {maps.params.num_choices, width});
    const MoePermuteParams params{.maps = maps.params,
                                  .x = x_TD.data,
                                  .rows = rows_MD.data,
                                  .num_tokens = maps.num_tokens,
                                  .width = width,
                                  .num_topk = maps.num_topk,
                                  .dtype = type};
    call.launch([&](cudaStream_t stream) { launch_moe_permute(params, stream); });
}

// weight: a tensor, or None for weights of 1.
void launch_weighted_sum(const char* op, const char* name, py::handle y, py::handle weight, py::handle row,
                         py::handle out) {
    Call call(op);
    const FloatType type = call.float_type_of(name, y);
    const auto row_TK = call.read<2>("row", row, kInt32);
    const auto [num_tokens, num_topk] = row_TK.shape;
    const auto y_MD = call.read<2>(name, y, dtype_of(type), {num_tokens * num_topk, kAnySize});
    const int64_t width = y_MD.shape[1];
    const auto out_TD = call.read<2>("out", out, dtype_of(type), {num_tokens, width});
    const float* weight_TK = nullptr;
    if (not weight.is_none()) {
        weight_TK = call.read<2>("weight", weight, kFloat32, {num_tokens, num_topk}).as<const float>();
    }
    const MoeUnpermuteParams params{.y = y_MD.data,
                                    .weight = weight_TK,
                                    .row = row_TK.as<const int32_t>(),
                                    .out = out_TD.data,
                                    .num_tokens = num_tokens,
                                    .width = width,
                                    .num_topk = static_cast<int>(num_topk),
                                    .dtype = type};
    call.launch([&](cudaStream_t stream) { launch_moe_unpermute(params, stream); });
}

void moe_permute_backward(py::handle grad, py::handle row, py::handle grad_x) {
    launch_weighted_sum("moe_permute backward", "grad", grad, py::none(), row, grad_x);
}

void moe_unpermute_forward(py::handle y, py::handle weight, py::handle row, py::handle out) {
    launch_weighted_sum("moe_unpermute", "y", y, weight, row, out);
}

void moe_unpermute_backward(py::handle grad, py::handle y, py::handle weight, py::handle row,
                            py::handle offsets, py::handle grad_y, py::handle grad_weight) {
    constexpr const char* kOp = "moe_unpermute backward";
    Call call(kOp);
    const FloatType type = call.float_type_of("y", y);
    const auto row_TK = call.read<2>("row", row, kInt32);
    const auto [num_tokens, num_topk] = row_TK.shape;
    const auto y_MD = call.read<2>("y", y, dtype_of(type), {num_tokens * num_topk, kAnySize});
    const auto [num_rows, width] = y_MD.shape;
    const auto grad_TD = call.read<2>("grad", grad, dtype_of(type), {num_tokens, width});
    const auto weight_TK = call.read<2>("weight", weight, kFloat32, {num_tokens, num_topk});
    const auto offsets_E = read_offsets(call, kOp, offsets);
    const auto grad_y_MD = call.read<2>("grad_y", grad_y, dtype_of(type), {num_rows, width});
    const auto grad_weight_TK = call.read<2>("grad_weight", grad_weight, kFloat32, {num_tokens, num_topk});
    const MoeUnpermuteBackwardParams params{.grad = grad_TD.data,
                                            .y = y_MD.data,
                                            .weight = weight_TK.as<const float>(),
                                            .row = row_TK.as<const int32_t>(),
                                            .offsets = offsets_E.as<const int32_t>(),
                                            .grad_y = grad_y_MD.data,
                                            .grad_weight = grad_weight_TK.as<float>(),
                                            .num_tokens = num_tokens,
                                            .width = width,
                                            .num_topk = static_cast<int>(num_topk),
                                            .num_experts = static_cast<int>(offsets_E.shape[0]),
                                            .dtype = type};
    call.launch([&](cudaStream_t stream) { launch_moe_unpermute_backward(params, stream); });
}

}  // namespace
}  // namespace bind

void register_moe_permute(py::module_& module) {
    module.def("moe_permute_num_counts", moe_permute_num_counts, py::arg("num_choices"));
    module.def("moe_permute_maps_forward", bind::moe_permute_maps_forward, py::arg("idx"), py::arg("offsets"),
               py::arg("row"), py::arg("token"), py::arg("counts"));
    module.def("moe_permute_forward", bind::moe_permute_forward, py::arg("x"), py::arg("idx"),
               py::arg("rows"), py::arg("offsets"), py::arg("row"), py::arg("token"), py::arg("counts"));
    module.def("moe_permute_backward", bind::moe_permute_backward, py::arg("grad"), py::arg("row"),
               py::arg("grad_x"));
    module.def("moe_unpermute_forward", bind::moe_unpermute_forward, py::arg("y"), py::arg("weight"),
               py::arg("row"), py::arg("out"));
    module.def("moe_unpermute_backward", bind::moe_unpermute_backward, py::arg("grad"), py::arg("y"),
               py::arg("weight"), py::arg("row"), py::arg("offsets"), py::arg("grad_y"),
               py::arg("grad_weight"));
}

}  // namespace dsc
