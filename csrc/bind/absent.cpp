// A build without kernels, in place of the bindings that launch them: each name exists, and its call says
// what is missing and how to get it.
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace dsc {
namespace {

void define_absent(py::module_& module, const std::string& op, std::initializer_list<const char*> names) {
    const auto raise = [op](const py::args&, const py::kwargs&) {
        throw std::runtime_error(op + ": " + DSC_ABSENT_HINT);
    };
    for (const char* name : names) module.def(name, raise);
}

}  // namespace

void register_moe(py::module_& module) {
    define_absent(module, "moe_gate", {"moe_gate_forward", "moe_gate_backward"});
    define_absent(module, "moe_gate_with_balance",
                  {"moe_gate_with_balance_forward", "moe_gate_with_balance_backward"});
    define_absent(module, "moe_balance_loss",
                  {"moe_balance_loss_forward", "moe_balance_loss_backward", "moe_balance_plan"});
}

void register_moe_permute(py::module_& module) {
    define_absent(module, "moe_permute",
                  {"moe_permute_num_counts", "moe_permute_maps_forward", "moe_permute_forward",
                   "moe_permute_backward"});
    define_absent(module, "moe_unpermute", {"moe_unpermute_forward", "moe_unpermute_backward"});
}

void register_rope(py::module_& module) {
    define_absent(module, "rope", {"rope_forward"});
    define_absent(module, "latent_rope",
                  {"latent_rope_num_partials", "latent_rope_forward", "latent_rope_backward"});
    define_absent(module, "latent_append", {"latent_append_forward"});
}

void register_gemm(py::module_& module) {
    define_absent(module, "grouped_gemm", {"grouped_gemm_forward", "grouped_gemm_weight_gradient"});
    define_absent(module, "grouped_swiglu", {"grouped_swiglu_forward", "grouped_swiglu_backward"});
}

void register_mla_decode(py::module_& module) {
    define_absent(module, "mla_decode", {"mla_decode_plan", "mla_decode_forward"});
}

void register_mla_prefill(py::module_& module) {
    define_absent(module, "mla_prefill", {"mla_prefill_plan", "mla_prefill_forward"});
}

void register_mla_prefill_backward(py::module_& module) {
    define_absent(module, "mla_prefill backward", {"mla_prefill_backward", "mla_prefill_num_sums"});
}

void register_comm_buffer(py::module_& module) {
    define_absent(module, "CommBuffer", {"CommBuffer"});
}

void register_comm(py::module_& module) {
    for (const char* const name :
         {"expert_routes", "dispatch_send", "dispatch_counts", "dispatch_receive", "dispatch_together",
          "combine_send", "combine_receive", "combine_together"}) {
        define_absent(module, name, {name});
    }
}

}  // namespace dsc
