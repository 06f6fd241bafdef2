// The gemm family: checks what memory safety asks for, fills the params by name, launches on the caller's
// stream. What the arguments mean to each other is checked in dscoder.ops; outputs come in allocated.
#include "gemm/gemm.h"

#include "bind/gemm_choice.h"
#include "bind/tensor.h"

namespace py = pybind11;

namespace dsc {
namespace bind {
namespace {

constexpr int64_t kMostRows = (int64_t{1} << 31) - 4096;  // so that the end of a tile is an int32 too

FloatType half_type_of(Call& call, const char* op, const char* name, py::handle tensor) {
    const FloatType type = call.float_type_of(name, tensor);
    DSC_CHECK_TYPE(type != FloatType::kFloat32, op, ": ", name, " must be bfloat16 or float16, got float32");
    return type;
}

// A size that copies of 16 bytes can cut.
int width_of(const char* op, const char* name, int64_t size) {
    DSC_CHECK(size % 8 == 0, op, ": ", name, " must be a multiple of 8, got ", size);
    DSC_CHECK(size < 1 << 24, op, ": ", name, " must be < 2^24, got ", size);
    return static_cast<int>(size);
}

template <int kRank>
void check_aligned(const char* op, const char* name, const Array<kRank>& array) {
    const auto misaligned = reinterpret_cast<uintptr_t>(array.data) % 16;
    DSC_CHECK(misaligned == 0, op, ": ", name, " must start at a multiple of 16 bytes, is ", misaligned,
              " past one");
}

// The rows in expert order, and where each comes from.
struct Rows {
    const int32_t* offsets;
    const int32_t* row_idx;  // or null
    int num_rows, num_source_rows, num_experts;
};

// M comes from row_idx where there is one, else from x.
Rows read_rows(Call& call, const char* op, py::handle offsets, py::handle row_idx, int64_t num_source_rows) {
    const auto offsets_E = call.read<1>("offsets", offsets, kInt32);
    const int64_t num_experts = offsets_E.shape[0];
    DSC_CHECK(num_experts <= kGemmMaxExperts, op, ": offsets must have at most ", kGemmMaxExperts,
              " elements, got ", num_experts);
    Rows rows{.offsets = offsets_E.template as<const int32_t>(),
              .row_idx = nullptr,
              .num_rows = 0,
              .num_source_rows = static_cast<int>(num_source_rows),
              .num_experts = static_cast<int>(num_experts)};
    int64_t num_rows = num_source_rows;
    if (not row_idx.is_none()) {
        const auto row_idx_M = call.read<1>("row_idx", row_idx, kInt32);
        rows.row_idx = row_idx_M.template as<const int32_t>();
        num_rows = row_idx_M.shape[0];
    }
    const int64_t most = std::max(num_rows, num_source_rows);
    DSC_CHECK(most <= kMostRows, op, ": at most ", kMostRows, " rows, got ", most);
    rows.num_rows = static_cast<int>(num_rows);
    return rows;
}

void grouped_gemm_forward(py::handle x, py::handle w, py::handle y, py::handle offsets, py::handle row_idx,
                          bool is_w_transposed, const std::string& arch, const std::string& tile) {
    constexpr const char* kOp = "grouped_gemm";
    Call call(kOp);
    const FloatType type = half_type_of(call, kOp, "x", x);
    const auto x_TK = call.read<2>("x", x, dtype_of(type));
    const auto [num_source_rows, depth] = x_TK.shape;
    const Rows rows = read_rows(call, kOp, offsets, row_idx, num_source_rows);
    const auto y_MN = call.read<2>("y", y, dtype_of(type), {rows.num_rows, kAnySize});
    const int64_t num_columns = y_MN.shape[1];
    const auto w_ENK = call.read<3>(
        "w", w, dtype_of(type),
        {rows.num_experts, is_w_transposed ? depth : num_columns, is_w_transposed ? num_columns : depth});
    check_aligned(kOp, "x", x_TK);
    check_aligned(kOp, "w", w_ENK);
    check_aligned(kOp, "y", y_MN);
    const GroupedGemmParams params{.x = x_TK.data,
                                   .w = w_ENK.data,
                                   .y = y_MN.data,
                                   .offsets = rows.offsets,
                                   .row_idx = rows.row_idx,
                                   .num_rows = rows.num_rows,
                                   .num_source_rows = rows.num_source_rows,
                                   .num_experts = rows.num_experts,
                                   .num_columns = width_of(kOp, "the number of columns", num_columns),
                                   .depth = width_of(kOp, "the depth", depth),
                                   .is_w_transposed = is_w_transposed,
                                   .type = type};
    const GemmChoice choice{.arch = gemm_arch(kOp, arch), .tile = tile};
    call.launch([&](cudaStream_t stream) { launch_grouped_gemm(params, choice, stream); });
}

void grouped_swiglu_forward(py::handle x, py::handle w, py::handle hidden, py::handle gate_up,
                            py::handle offsets, py::handle row_idx, const std::string& arch,
                            const std::string& tile) {
    constexpr const char* kOp = "grouped_swiglu";
    Call call(kOp);
    const FloatType type = half_type_of(call, kOp, "x", x);
    const auto x_TK = call.read<2>("x", x, dtype_of(type));
    const auto [num_source_rows, depth] = x_TK.shape;
    const Rows rows = read_rows(call, kOp, offsets, row_idx, num_source_rows);
    const auto hidden_MF = call.read<2>("hidden", hidden, dtype_of(type), {rows.num_rows, kAnySize});
    const int64_t width = hidden_MF.shape[1];
    const auto w_EFK = call.read<3>("w", w, dtype_of(type), {rows.num_experts, 2 * width, depth});
    void* gate_up_MF = nullptr;
    if (not gate_up.is_none()) {
        const auto array = call.read<2>("gate_up", gate_up, dtype_of(type), {rows.num_rows, 2 * width});
        check_aligned(kOp, "gate_up", array);
        gate_up_MF = array.data;
    }
    check_aligned(kOp, "x", x_TK);
    check_aligned(kOp, "w", w_EFK);
    check_aligned(kOp, "hidden", hidden_MF);
    const GroupedSwigluParams params{.x = x_TK.data,
                                     .w = w_EFK.data,
                                     .hidden = hidden_MF.data,
                                     .gate_up = gate_up_MF,
                                     .offsets = rows.offsets,
                                     .row_idx = rows.row_idx,
                                     .num_rows = rows.num_rows,
                                     .num_source_rows = rows.num_source_rows,
                                     .num_experts = rows.num_experts,
                                     .width = width_of(kOp, "the width", width),
                                     .depth = width_of(kOp, "the depth", depth),
                                     .type = type};
    const GemmChoice choice{.arch = gemm_arch(kOp, arch), .tile = tile};
    call.launch([&](cudaStream_t stream) { launch_grouped_swiglu(params, choice, stream); });
}

void grouped_swiglu_backward(py::handle grad, py::handle w, py::handle gate_up, py::handle grad_gate_up,
                             py::handle offsets, const std::string& arch, const std::string& tile) {
    constexpr const char* kOp = "grouped_swiglu backward";
    Call call(kOp);
    const FloatType type = half_type_of(call, kOp, "grad", grad);
    const auto grad_MD = call.read<2>("grad", grad, dtype_of(type));
    const auto [num_rows, depth] = grad_MD.shape;
    const Rows rows = read_rows(call, kOp, offsets, py::none(), num_rows);
    const auto w_EDF = call.read<3>("w", w, dtype_of(type), {rows.num_experts, depth, kAnySize});
    const int64_t width = w_EDF.shape[2];
    const auto gate_up_MF = call.read<2>("gate_up", gate_up, dtype_of(type), {num_rows, 2 * width});
    const auto out_MF = call.read<2>("grad_gate_up", grad_gate_up, dtype_of(type), {num_rows, 2 * width});
    check_aligned(kOp, "grad", grad_MD);
    check_aligned(kOp, "w", w_EDF);
    check_aligned(kOp, "gate_up", gate_up_MF);
    check_aligned(kOp, "grad_gate_up", out_MF);
    const GroupedSwigluBackwardParams params{.grad = grad_MD.data,
                                             .w = w_EDF.data,
                                             .gate_up = gate_up_MF.data,
                                             .grad_gate_up = out_MF.data,
                                             .offsets = rows.offsets,
                                             .num_rows = rows.num_rows,
                                             .num_experts = rows.num_experts,
                                             .width = width_of(kOp, "the width", width),
                                             .depth = width_of(kOp, "the depth", depth),
                                             .type = type};
    const GemmChoice choice{.arch = gemm_arch(kOp, arch), .tile = tile};
    call.launch([&](cudaStream_t stream) { launch_grouped_swiglu_backward(params, choice, stream); });
}

void grouped_gemm_weight_gradient(py::handle grad, py::handle x, py::handle grad_w, py::handle offsets,
                                  py::handle row_idx, bool accumulates, const std::string& arch,
                                  const std::string& tile) {
    constexpr const char* kOp = "grouped_gemm_weight_gradient";
    Call call(kOp);
    const FloatType type = half_type_of(call, kOp, "x", x);
    const auto x_TK = call.read<2>("x", x, dtype_of(type));
    const auto [num_source_rows, depth] = x_TK.shape;
    const Rows rows = read_rows(call, kOp, offsets, row_idx, num_source_rows);
    const auto grad_MN = call.read<2>("grad", grad, dtype_of(type), {rows.num_rows, kAnySize});
    const int64_t num_columns = grad_MN.shape[1];
    const bool is_float32 = call.float_type_of("grad_w", grad_w) == FloatType::kFloat32;
    const auto grad_ENK = call.read<3>("grad_w", grad_w, is_float32 ? kFloat32 : dtype_of(type),
                                       {rows.num_experts, num_columns, depth});
    check_aligned(kOp, "grad", grad_MN);
    check_aligned(kOp, "x", x_TK);
    check_aligned(kOp, "grad_w", grad_ENK);
    const GroupedWeightGradientParams params{
        .grad = grad_MN.data,
        .x = x_TK.data,
        .grad_w = grad_ENK.data,
        .offsets = rows.offsets,
        .row_idx = rows.row_idx,
        .num_rows = rows.num_rows,
        .num_source_rows = rows.num_source_rows,
        .num_experts = rows.num_experts,
        .num_columns = width_of(kOp, "the number of columns", num_columns),
        .depth = width_of(kOp, "the depth", depth),
        .is_float32 = is_float32,
        .accumulates = accumulates,
        .type = type};
    const GemmChoice choice{.arch = gemm_arch(kOp, arch), .tile = tile};
    call.launch([&](cudaStream_t stream) { launch_grouped_weight_gradient(params, choice, stream); });
}

}  // namespace
}  // namespace bind

void register_gemm(py::module_& module) {
    module.def("grouped_gemm_forward", bind::grouped_gemm_forward, py::arg("x"), py::arg("w"), py::arg("y"),
               py::arg("offsets"), py::arg("row_idx"), py::arg("is_w_transposed"), py::arg("arch"),
               py::arg("tile") = "auto");
    module.def("grouped_gemm_weight_gradient", bind::grouped_gemm_weight_gradient, py::arg("grad"),
               py::arg("x"), py::arg("grad_w"), py::arg("offsets"), py::arg("row_idx"),
               py::arg("accumulates"), py::arg("arch"), py::arg("tile") = "auto");
    module.def("grouped_swiglu_forward", bind::grouped_swiglu_forward, py::arg("x"), py::arg("w"),
               py::arg("hidden"), py::arg("gate_up"), py::arg("offsets"), py::arg("row_idx"), py::arg("arch"),
               py::arg("tile") = "auto");
    module.def("grouped_swiglu_backward", bind::grouped_swiglu_backward, py::arg("grad"), py::arg("w"),
               py::arg("gate_up"), py::arg("grad_gate_up"), py::arg("offsets"), py::arg("arch"),
               py::arg("tile") = "auto");
}

}  // namespace dsc
