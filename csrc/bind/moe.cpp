// The moe family: checks what memory safety asks for, fills the params by name, launches on the caller's
// stream. What the arguments mean to each other is checked in dscoder.ops; outputs come in allocated.
#include "moe/moe.h"

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <utility>

#include "bind/tensor.h"

namespace py = pybind11;

namespace dsc {
namespace bind {
namespace {

void check_groups(const char* op, int64_t num_experts, int num_groups, int num_groups_kept) {
    DSC_CHECK(num_experts > 0, op, ": num_experts must be >= 1, got 0");
    DSC_CHECK(num_groups > 0 and num_experts % num_groups == 0, op,
              ": num_experts must be a multiple of num_groups, got ", num_experts, " and ", num_groups);
    DSC_CHECK(num_groups_kept > 0 and num_groups_kept <= num_groups, op, ": num_groups_kept must be in [1, ",
              num_groups, "], got ", num_groups_kept);
}

// Of the three terms in their sum; none: the terms apart.
using Weights = std::optional<std::array<float, 3>>;

struct GateOptions {
    int num_groups, num_groups_kept;
    float scale;
    bool renormalize;
};

MoeGateParams gate_params(Call& call, const char* op, const Array<2>& logits_TE, const Array<2>& idx_TK,
                          py::handle weight, const GateOptions& options) {
    const auto [num_tokens, num_experts] = logits_TE.shape;
    const int64_t num_topk = idx_TK.shape[1];
    const auto& [num_groups, num_groups_kept, scale, renormalize] = options;
    check_groups(op, num_experts, num_groups, num_groups_kept);
    const int64_t num_candidates = num_experts / num_groups * num_groups_kept;
    DSC_CHECK(num_topk <= num_candidates, op, ": num_topk must be <= ", num_candidates,
              " (experts in the kept groups), got ", num_topk);
    return {.logits = logits_TE.as<const float>(),
            .idx = idx_TK.as<int32_t>(),
            .weight = call.read<2>("weight", weight, kFloat32, {num_tokens, num_topk}).as<float>(),
            .num_tokens = num_tokens,
            .num_experts = static_cast<int>(num_experts),
            .num_topk = static_cast<int>(num_topk),
            .num_groups = num_groups,
            .num_groups_kept = num_groups_kept,
            .scale = scale,
            .renormalize = renormalize};
}

MoeGateBackwardParams gate_backward_params(Call& call, py::handle logits, py::handle idx,
                                           py::handle grad_weight, py::handle grad_logits, float scale,
                                           bool renormalize) {
    const auto logits_TE = call.read<2>("logits", logits, kFloat32);
    const auto [num_tokens, num_experts] = logits_TE.shape;
    const auto idx_TK = call.read<2>("idx", idx, kInt32, {num_tokens, kAnySize});
    const auto grad_weight_TK = call.read<2>("grad_weight", grad_weight, kFloat32, idx_TK.shape);
    const auto grad_logits_TE = call.read<2>("grad_logits", grad_logits, kFloat32, logits_TE.shape);
    return {.logits = logits_TE.as<const float>(),
            .idx = idx_TK.as<const int32_t>(),
            .grad_weight = grad_weight_TK.as<const float>(),
            .grad_logits = grad_logits_TE.as<float>(),
            .num_tokens = num_tokens,
            .num_experts = static_cast<int>(num_experts),
            .num_topk = static_cast<int>(idx_TK.shape[1]),
            .scale = scale,
            .renormalize = renormalize};
}

void moe_gate_forward(py::handle logits, py::handle idx, py::handle weight, int num_groups,
                      int num_groups_kept, float scale, bool renormalize) {
    constexpr const char* kOp = "moe_gate";
    Call call(kOp);
    const auto logits_TE = call.read<2>("logits", logits, kFloat32);
    const auto idx_TK = call.read<2>("idx", idx, kInt32, {logits_TE.shape[0], kAnySize});
    const MoeGateParams params =
        gate_params(call, kOp, logits_TE, idx_TK, weight, {num_groups, num_groups_kept, scale, renormalize});
    call.launch([&](cudaStream_t stream) { launch_moe_gate(params, stream); });
}

void moe_gate_backward(py::handle logits, py::handle idx, py::handle grad_weight, py::handle grad_logits,
                       float scale, bool renormalize) {
    constexpr const char* kOp = "moe_gate backward";
    Call call(kOp);
    const MoeGateBackwardParams params =
        gate_backward_params(call, logits, idx, grad_weight, grad_logits, scale, renormalize);
    call.launch([&](cudaStream_t stream) { launch_moe_gate_backward(params, stream); });
}

// The tensors of MoeBalanceParams in their order; B and C are those of the first, L that of the third.
MoeBalanceParams read_balance(Call& call, const char* op, const py::tuple& balance, const Array<2>& tokens_TE,
                              const Array<2>& idx_TK, int num_groups, int num_groups_kept,
                              const Weights& weights = std::nullopt) {
    DSC_CHECK(balance.size() == 6, op, ": balance must hold 6 tensors, got ", balance.size());
    const auto [num_tokens, num_experts] = tokens_TE.shape;
    DSC_CHECK(idx_TK.shape[1] > 0, op, ": num_topk must be >= 1, got 0");
    check_groups(op, num_experts, num_groups, num_groups_kept);
    const auto prob_sum = call.read<3>("prob_sum", balance[0], kFloat32, {kAnySize, kAnySize, num_experts});
    const auto [num_sequences, num_chunks, _] = prob_sum.shape;
    constexpr int64_t kMaxBlocks = 0x7fffffff;
    DSC_CHECK(num_sequences > 0 and num_chunks > 0 and num_sequences * num_chunks <= kMaxBlocks, op,
              ": prob_sum must have from 1 to 2^31 - 1 chunks, got ", num_sequences, " x ", num_chunks);
    DSC_CHECK(num_tokens % num_sequences == 0, op, ": num_tokens must be a multiple of num_sequences, got ",
              num_tokens, " and ", num_sequences);
    const int64_t num_terms = weights ? 1 : 3;
    const auto slice_terms =
        call.read<4>("slice_terms", balance[2], kFloat32, {num_sequences, num_groups, kAnySize, num_terms});
    const int64_t num_slices = slice_terms.shape[2];
    DSC_CHECK(num_slices > 0 and num_slices <= num_experts and
                  num_sequences * num_groups * num_slices <= kMaxBlocks,
              op, ": slice_terms must have from 1 to num_experts ", num_experts,
              " slices a group and at most 2^31 - 1 in all, got ", num_slices);
    const std::array<int64_t, 3> counts{num_sequences, num_chunks, num_experts + 2 * num_groups};
    const std::array<int64_t, 3> loads{num_terms, num_sequences, num_experts};
    const auto [expert, device, communication] = weights.value_or(std::array<float, 3>{});
    return {.prob_sum = prob_sum.as<float>(),
            .count = call.read<3>("count", balance[1], kInt32, counts).as<int32_t>(),
            .slice_terms = slice_terms.as<float>(),
            .num_finished = call.read<1>("num_finished", balance[3], kInt32, {1}).as<int32_t>(),
            .terms = call.read<1>("terms", balance[4], kFloat32, {num_terms}).as<float>(),
            .load = call.read<3>("load", balance[5], kFloat32, loads).as<float>(),
            .num_tokens = num_tokens,
            .num_sequences = static_cast<int>(num_sequences),
            .num_chunks = static_cast<int>(num_chunks),
            .num_slices = static_cast<int>(num_slices),
            .num_experts = static_cast<int>(num_experts),
            .num_topk = static_cast<int>(idx_TK.shape[1]),
            .num_groups = num_groups,
            .num_groups_kept = num_groups_kept,
            .num_terms = static_cast<int>(num_terms),
            .weight = {expert, device, communication}};
}

MoeBalanceBackwardParams read_balance_backward(Call& call, const char* op, py::handle grad_terms,
                                               py::handle load, int64_t num_terms, int64_t num_tokens,
                                               int64_t num_experts) {
    const auto load_NBE = call.read<3>("load", load, kFloat32, {num_terms, kAnySize, num_experts});
    const int64_t num_sequences = load_NBE.shape[1];
    DSC_CHECK(num_experts > 0, op, ": num_experts must be >= 1, got 0");
    DSC_CHECK(num_sequences > 0 and num_tokens % num_sequences == 0, op,
              ": num_tokens must be a multiple of num_sequences, got ", num_tokens, " and ", num_sequences);
    const int num_chunks = moe_balance_num_chunks(num_tokens, static_cast<int>(num_sequences));
    return {.grad_terms = call.read<1>("grad_terms", grad_terms, kFloat32, {num_terms}).as<const float>(),
            .load = load_NBE.as<const float>(),
            .num_tokens = num_tokens,
            .num_sequences = static_cast<int>(num_sequences),
            .num_chunks = num_chunks,
            .num_experts = static_cast<int>(num_experts),
            .num_terms = static_cast<int>(num_terms)};
}

void moe_gate_with_balance_forward(py::handle logits, py::handle idx, py::handle weight,
                                   const py::tuple& balance, int num_groups, int num_groups_kept, float scale,
                                   bool renormalize) {
    constexpr const char* kOp = "moe_gate_with_balance";
    Call call(kOp);
    const auto logits_TE = call.read<2>("logits", logits, kFloat32);
    const auto idx_TK = call.read<2>("idx", idx, kInt32, {logits_TE.shape[0], kAnySize});
    const MoeGateParams gate =
        gate_params(call, kOp, logits_TE, idx_TK, weight, {num_groups, num_groups_kept, scale, renormalize});
    const MoeBalanceParams params =
        read_balance(call, kOp, balance, logits_TE, idx_TK, num_groups, num_groups_kept);
    call.launch([&](cudaStream_t stream) { launch_moe_gate_with_balance(gate, params, stream); });
}

void moe_gate_with_balance_backward(py::handle logits, py::handle idx, const py::tuple& grads,
                                    py::handle load, py::handle grad_logits, float scale, bool renormalize) {
    constexpr const char* kOp = "moe_gate_with_balance backward";
    DSC_CHECK(grads.size() == 2, kOp, ": grads must hold 2 tensors, got ", grads.size());
    Call call(kOp);
    const MoeGateBackwardParams gate =
        gate_backward_params(call, logits, idx, grads[0], grad_logits, scale, renormalize);
    const MoeBalanceBackwardParams balance =
        read_balance_backward(call, kOp, grads[1], load, 3, gate.num_tokens, gate.num_experts);
    call.launch([&](cudaStream_t stream) { launch_moe_gate_with_balance_backward(gate, balance, stream); });
}

void moe_balance_loss_forward(py::handle probs, py::handle idx, const py::tuple& balance, int num_groups,
                              int num_groups_kept, const Weights& weights) {
    constexpr const char* kOp = "moe_balance_loss";
    Call call(kOp);
    const FloatType dtype = call.float_type_of("probs", probs);
    const auto probs_TE = call.read<2>("probs", probs, dtype_of(dtype));
    const auto idx_TK = call.read<2>("idx", idx, kInt32, {probs_TE.shape[0], kAnySize});
    const MoeBalanceLossParams params{
        .balance = read_balance(call, kOp, balance, probs_TE, idx_TK, num_groups, num_groups_kept, weights),
        .probs = probs_TE.data,
        .idx = idx_TK.as<const int32_t>(),
        .dtype = dtype};
    call.launch([&](cudaStream_t stream) { launch_moe_balance(params, stream); });
}

// As many terms as grad_terms holds.
void moe_balance_loss_backward(py::handle grad_terms, py::handle load, py::handle grad_probs) {
    constexpr const char* kOp = "moe_balance_loss backward";
    Call call(kOp);
    const FloatType dtype = call.float_type_of("grad_probs", grad_probs);
    const auto grad_TE = call.read<2>("grad_probs", grad_probs, dtype_of(dtype));
    const auto [num_tokens, num_experts] = grad_TE.shape;
    const int64_t num_terms = call.read<1>("grad_terms", grad_terms, kFloat32).shape[0];
    DSC_CHECK(num_terms == 1 or num_terms == 3, kOp, ": grad_terms must have 1 or 3 elements, got ",
              num_terms);
    const MoeBalanceLossBackwardParams params{
        .balance = read_balance_backward(call, kOp, grad_terms, load, num_terms, num_tokens, num_experts),
        .grad_probs = grad_TE.data,
        .dtype = dtype};
    call.launch([&](cudaStream_t stream) { launch_moe_balance_backward(params, stream); });
}

// C and L for these sizes.
std::pair<int, int> moe_balance_plan(int64_t num_tokens, int num_experts, int num_sequences, int num_groups) {
    constexpr const char* kOp = "moe_balance_loss";
    DSC_CHECK(num_tokens >= 0 and num_sequences > 0, kOp,
              ": num_tokens must be >= 0 and num_sequences >= 1, got ", num_tokens, " and ", num_sequences);
    check_groups(kOp, num_experts, num_groups, 1);
    return {moe_balance_num_chunks(num_tokens, num_sequences),
            moe_balance_num_slices(num_sequences, num_experts, num_groups)};
}

}  // namespace
}  // namespace bind

void register_moe(py::module_& module) {
    module.def("moe_gate_forward", bind::moe_gate_forward, py::arg("logits"), py::arg("idx"),
               py::arg("weight"), py::arg("num_groups"), py::arg("num_groups_kept"), py::arg("scale"),
               py::arg("renormalize"));
    module.def("moe_gate_backward", bind::moe_gate_backward, py::arg("logits"), py::arg("idx"),
               py::arg("grad_weight"), py::arg("grad_logits"), py::arg("scale"), py::arg("renormalize"));
    module.def("moe_gate_with_balance_forward", bind::moe_gate_with_balance_forward, py::arg("logits"),
               py::arg("idx"), py::arg("weight"), py::arg("balance"), py::arg("num_groups"),
               py::arg("num_groups_kept"), py::arg("scale"), py::arg("renormalize"));
    module.def("moe_gate_with_balance_backward", bind::moe_gate_with_balance_backward, py::arg("logits"),
               py::arg("idx"), py::arg("grads"), py::arg("load"), py::arg("grad_logits"), py::arg("scale"),
               py::arg("renormalize"));
    module.def("moe_balance_loss_forward", bind::moe_balance_loss_forward, py::arg("probs"), py::arg("idx"),
               py::arg("balance"), py::arg("num_groups"), py::arg("num_groups_kept"),
               py::arg("weights") = py::none());
    module.def("moe_balance_loss_backward", bind::moe_balance_loss_backward, py::arg("grad_terms"),
               py::arg("load"), py::arg("grad_probs"));
    module.def("moe_balance_plan", bind::moe_balance_plan, py::arg("num_tokens"), py::arg("num_experts"),
               py::arg("num_sequences"), py::arg("num_groups"));
}

}  // namespace dsc
