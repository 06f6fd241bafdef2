// The gradients of mla_prefill: checks what memory safety asks for, fills the params by name, launches on the
// caller's stream. Outputs and scratch come in allocated.
#include "attention/mla_prefill_rows.h"

#include <pybind11/stl.h>

#include <algorithm>

#include "bind/mla_prefill_operands.h"

namespace py = pybind11;

namespace dsc {
namespace bind {
namespace {

template <int kCount>
using Tensors = std::array<py::object, kCount>;

PrefillArch prefill_arch(const char* op, const std::string& arch) {
    if (arch == "auto") return PrefillArch::kAuto;
    if (arch == "sm80") return PrefillArch::kSm80;
    if (arch == "sm90 one stage") return PrefillArch::kSm90OneStage;
    DSC_CHECK(arch == "sm90", op, ": arch must be auto, sm80 or sm90, got ", arch);
    return PrefillArch::kSm90;
}

// What the forward pass had and made: q, k, v, out and lse.
void read_saved(Call& call, const char* op, py::handle grad_out, const Tensors<5>& saved,
                MlaPrefillBackwardParams& p) {
    const auto& [q, k, v, out, lse] = saved;
    p.dtype = call.float_type_of("q", q);
    DSC_CHECK_TYPE(p.dtype != FloatType::kFloat32, op, ": q must be bfloat16 or float16, got float32");
    const HeadArray q_THd = read_heads(call, op, "q", q, p.dtype, {kAnySize, kAnySize, kAnySize});
    const auto [num_queries, num_heads, width] = q_THd.shape;
    const HeadArray k_TGd = read_heads(call, op, "k", k, p.dtype, {kAnySize, kAnySize, width});
    const auto [num_keys, num_key_heads, key_width] = k_TGd.shape;
    const HeadArray v_TGv = read_heads(call, op, "v", v, p.dtype, {num_keys, num_key_heads, kAnySize});
    const int64_t value_width = v_TGv.shape[2];
    for (const int64_t size : {num_queries, num_keys, num_heads, width, value_width}) {
        check_int(op, "each size of q, k and v", size);
    }
    DSC_CHECK(num_key_heads > 0 ? num_heads % num_key_heads == 0 : num_heads == 0, op,
              ": heads of q must be a multiple of those of k, got ", num_heads, " and ", num_key_heads);
    const std::array<int64_t, 3> out_shape{num_queries, num_heads, value_width};
    const auto out_THv = call.read<3>("out", out, dtype_of(p.dtype), out_shape);
    check_multiple(op, "out", out_THv.data, 16);
    p.q = q_THd.rows;
    p.k = k_TGd.rows;
    p.v = v_TGv.rows;
    p.grad_out = read_heads(call, op, "grad_out", grad_out, p.dtype, out_shape).rows;
    p.out = out_THv.data;
    p.lse = call.read<2>("lse", lse, kFloat32, {num_queries, num_heads}).as<const float>();
    p.num_queries = num_queries;
    p.num_keys = num_keys;
    p.num_heads = static_cast<int>(num_heads);
    p.num_key_heads = static_cast<int>(num_key_heads);
    p.width = static_cast<int>(width);
    p.value_width = static_cast<int>(value_width);
}

// Plan, row values and, unless deterministic, sums of grad_q.
void read_scratch(Call& call, const char* op, const Tensors<3>& scratch, MlaPrefillBackwardParams& p) {
    const auto& [plan, row_values, sums_q] = scratch;
    p.plan =
        read_plan(call, op, plan, prefill_plan_size(std::max(p.num_queries, p.num_keys), p.num_sequences));
    p.row_values =
        call.read<3>("row_values", row_values, kFloat32, {2, p.num_heads, p.num_queries}).as<float>();
    const int64_t num_sums = p.deterministic ? 0 : kSumRows * num_sum_blocks(p.num_queries, p.num_sequences);
    const auto sums_THd = call.read<3>("sums_q", sums_q, kFloat32, {num_sums, p.num_heads, p.width});
    check_multiple(op, "sums_q", sums_THd.data, 16);
    p.sums_q = sums_THd.as<float>();
}

void* read_grad(Call& call, const char* op, const char* name, py::handle grad, FloatType type,
                const std::array<int64_t, 3>& shape) {
    const auto array = call.read<3>(name, grad, dtype_of(type), shape);
    check_multiple(op, name, array.data, 16);
    return array.data;
}

void mla_prefill_backward(py::handle grad_out, const Tensors<5>& saved, const Tensors<2>& cu_seqlens,
                          const Tensors<3>& scratch, const Tensors<3>& grads, float scale, bool causal,
                          bool deterministic, const std::string& arch) {
    constexpr const char* kOp = "mla_prefill backward";
    Call call(kOp);
    MlaPrefillBackwardParams p{};
    read_saved(call, kOp, grad_out, saved, p);
    const PrefillEnds ends = read_ends(call, kOp, cu_seqlens[0], cu_seqlens[1]);
    p.cu_seqlens_q = ends.q;
    p.cu_seqlens_k = ends.k;
    p.num_sequences = ends.num_sequences;
    p.deterministic = deterministic;
    read_scratch(call, kOp, scratch, p);
    p.grad_q = read_grad(call, kOp, "grad_q", grads[0], p.dtype, {p.num_queries, p.num_heads, p.width});
    p.grad_k = read_grad(call, kOp, "grad_k", grads[1], p.dtype, {p.num_keys, p.num_key_heads, p.width});
    p.grad_v =
        read_grad(call, kOp, "grad_v", grads[2], p.dtype, {p.num_keys, p.num_key_heads, p.value_width});
    p.scale = scale;
    p.causal = causal;
    const PrefillArch wanted = prefill_arch(kOp, arch);
    call.launch([&](cudaStream_t stream) { launch_mla_prefill_backward(p, wanted, stream); });
}

}  // namespace
}  // namespace bind

void register_mla_prefill_backward(py::module_& module) {
    module.def("mla_prefill_backward", bind::mla_prefill_backward, py::arg("grad_out"), py::arg("saved"),
               py::arg("cu_seqlens"), py::arg("scratch"), py::arg("grads"), py::arg("scale"),
               py::arg("causal"), py::arg("deterministic"), py::arg("arch"));
    module.def(
        "mla_prefill_num_sums",
        [](int64_t num_queries, int num_sequences) {
            return kSumRows * num_sum_blocks(num_queries, num_sequences);
        },
        py::arg("num_queries"), py::arg("num_sequences"));
}

}  // namespace dsc
