// Which kernel a grouped product would get: in every build, since it takes no kernel to tell.
#include <pybind11/pybind11.h>

#include <limits>
#include <string>
#include <string_view>
#include <utility>

#include "bind/gemm_choice.h"

namespace py = pybind11;

namespace dsc {
namespace bind {
namespace {

constexpr const char* kOp = "grouped_gemm_plan";

// The archs that this build has kernels for; one without kernels answers for all of them.
#ifdef DSC_CUDA_ARCHS
constexpr std::string_view kArchs = DSC_CUDA_ARCHS;
#else
constexpr std::string_view kArchs = "80 90a";
#endif

constexpr bool has_sm90(std::string_view archs) {
    return archs.find("90a") != std::string_view::npos;
}
static_assert(has_sm90("80 90a") and has_sm90("90a") and not has_sm90("80 89"));

GemmStep step_of(const std::string& step) {
    if (step == "forward") return GemmStep::kForward;
    if (step == "input_gradient") return GemmStep::kInputGradient;
    if (step == "swiglu") return GemmStep::kSwiglu;
    if (step == "swiglu_backward") return GemmStep::kSwigluBackward;
    DSC_CHECK(step == "weight_gradient", kOp,
              ": step must be forward, input_gradient, swiglu, swiglu_backward or weight_gradient, got ",
              step);
    return GemmStep::kWeightGradient;
}

py::dict grouped_gemm_plan(const std::string& step, int64_t num_rows, int num_experts, int num_columns,
                           int depth, std::pair<int, int> capability, int num_sms, const std::string& arch) {
    DSC_CHECK(num_rows <= std::numeric_limits<int>::max(), kOp, ": num_rows must fit an int32, got ",
              num_rows);
    const GemmSizes sizes{.step = step_of(step),
                          .num_rows = num_rows,
                          .num_experts = num_experts,
                          .num_columns = num_columns,
                          .depth = depth};
    GemmDevice device = gemm_device(capability.first, capability.second, num_sms);
    device.is_sm90 = device.is_sm90 and has_sm90(kArchs);
    const GemmPlan plan = plan_gemm(sizes, device, {.arch = gemm_arch(kOp, arch)});
    py::dict seen;
    seen["arch"] = plan.arch == GemmArch::kSm90 ? "sm90" : "sm80";
    seen["tile"] = std::string(plan.tile);
    seen["stages"] = plan.num_stages;
    seen["cluster"] = plan.cluster;
    seen["threads"] = plan.num_threads;
    seen["registers"] = plan.registers;
    seen["shared_bytes"] = plan.shared_bytes;
    seen["blocks_per_sm"] = plan.blocks_per_sm;
    seen["blocks"] = plan.num_blocks;
    return seen;
}

}  // namespace
}  // namespace bind

void register_gemm_plan(py::module_& module) {
    module.def("grouped_gemm_plan", bind::grouped_gemm_plan, py::arg("step"), py::arg("num_rows"),
               py::arg("num_experts"), py::arg("num_columns"), py::arg("depth"), py::arg("capability"),
               py::arg("num_sms"), py::arg("arch") = "auto");
}

}  // namespace dsc
