// The moe family: checks what memory safety asks for, fills the params by name, launches on the caller's
// stream. What the arguments mean to each other is checked in dscoder.ops; outputs come in allocated.
#include "moe/moe.h"

#include "bind/tensor.h"

namespace py = pybind11;

namespace dsc {
namespace bind {
namespace {

void moe_gate_forward(py::handle logits, py::handle idx, py::handle weight, int num_groups,
                      int num_groups_kept, float scale, bool renormalize) {
    constexpr const char* kOp = "moe_gate";
    Call call(kOp);
    const auto logits_TE = call.read<2>("logits", logits, kFloat32);
    const auto [num_tokens, num_experts] = logits_TE.shape;
    const auto idx_TK = call.read<2>("idx", idx, kInt32, {num_tokens, kAnySize});
    const int64_t num_topk = idx_TK.shape[1];
    const auto weight_TK = call.read<2>("weight", weight, kFloat32, {num_tokens, num_topk});
    DSC_CHECK(num_groups > 0 and num_experts % num_groups == 0,
              "moe_gate: num_experts must be a multiple of num_groups, got ", num_experts, " and ",
              num_groups);
    DSC_CHECK(num_groups_kept > 0 and num_groups_kept <= num_groups,
              "moe_gate: num_groups_kept must be in [1, ", num_groups, "], got ", num_groups_kept);
    const int64_t num_candidates = num_experts / num_groups * num_groups_kept;
    DSC_CHECK(num_topk <= num_candidates, "moe_gate: num_topk must be <= ", num_candidates,
              " (experts in the kept groups), got ", num_topk);
    const DeviceGuard guard(kOp, call.device_idx());
    launch_moe_gate({.logits = logits_TE.as<const float>(),
                     .idx = idx_TK.as<int32_t>(),
                     .weight = weight_TK.as<float>(),
                     .num_tokens = num_tokens,
                     .num_experts = static_cast<int>(num_experts),
                     .num_topk = static_cast<int>(num_topk),
                     .num_groups = num_groups,
                     .num_groups_kept = num_groups_kept,
                     .scale = scale,
                     .renormalize = renormalize},
                    call.current_stream());
}

void moe_gate_backward(py::handle logits, py::handle idx, py::handle grad_weight, py::handle grad_logits,
                       float scale, bool renormalize) {
    constexpr const char* kOp = "moe_gate backward";
    Call call(kOp);
    const auto logits_TE = call.read<2>("logits", logits, kFloat32);
    const auto [num_tokens, num_experts] = logits_TE.shape;
    const auto idx_TK = call.read<2>("idx", idx, kInt32, {num_tokens, kAnySize});
    const int64_t num_topk = idx_TK.shape[1];
    const auto grad_weight_TK = call.read<2>("grad_weight", grad_weight, kFloat32, {num_tokens, num_topk});
    const auto grad_logits_TE = call.read<2>("grad_logits", grad_logits, kFloat32, {num_tokens, num_experts});
    const DeviceGuard guard(kOp, call.device_idx());
    launch_moe_gate_backward({.logits = logits_TE.as<const float>(),
                              .idx = idx_TK.as<const int32_t>(),
                              .grad_weight = grad_weight_TK.as<const float>(),
                              .grad_logits = grad_logits_TE.as<float>(),
                              .num_tokens = num_tokens,
                              .num_experts = static_cast<int>(num_experts),
                              .num_topk = static_cast<int>(num_topk),
                              .scale = scale,
                              .renormalize = renormalize},
                             call.current_stream());
}

}  // namespace
}  // namespace bind

void register_moe(py::module_& module) {
    module.def("moe_gate_forward", bind::moe_gate_forward, py::arg("logits"), py::arg("idx"),
               py::arg("weight"), py::arg("num_groups"), py::arg("num_groups_kept"), py::arg("scale"),
               py::arg("renormalize"));
    module.def("moe_gate_backward", bind::moe_gate_backward, py::arg("logits"), py::arg("idx"),
               py::arg("grad_weight"), py::arg("grad_logits"), py::arg("scale"), py::arg("renormalize"));
}

}  // namespace dsc
