// The extension module dscoder._C: what this build is, and one register function per family.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <string>
#include <vector>

#include "core/check.h"

namespace py = pybind11;

namespace dsc {
namespace {

#ifdef DSC_CUDA_ARCHS
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#define DSC_CUDA_ARCHS ""
#define DSC_CUDA_VERSION ""
#endif

py::tuple archs() {
    return py::tuple(py::str(DSC_CUDA_ARCHS).attr("split")());
}

void translate(std::exception_ptr error) {
    try {
        if (error) std::rethrow_exception(error);
    } catch (const WrongType& wrong) {
        py::set_error(PyExc_TypeError, wrong.what());
    }
}

}  // namespace

void register_moe(py::module_& module);
void register_moe_permute(py::module_& module);
void register_gemm(py::module_& module);
void register_gemm_plan(py::module_& module);
void register_rope(py::module_& module);
void register_mla_decode(py::module_& module);
void register_mla_decode_plan(py::module_& module);
void register_mla_prefill(py::module_& module);
void register_mla_prefill_backward(py::module_& module);
void register_mla_prefill_plan(py::module_& module);
void register_comm(py::module_& module);
void register_comm_buffer(py::module_& module);
void register_comm_plan(py::module_& module);
void register_text(py::module_& module);

}  // namespace dsc

PYBIND11_MODULE(DSC_MODULE, module) {
    module.attr("version") = DSC_VERSION;
    module.attr("compiler") = DSC_COMPILER;
    module.attr("has_cuda") = dsc::kHasCuda;
    module.attr("cuda_version") = DSC_CUDA_VERSION;
    module.attr("cuda_archs") = dsc::archs();
    module.attr("absent_hint") = DSC_ABSENT_HINT;  // how to get kernels, for the error where there are none
    py::register_exception_translator(dsc::translate);
    dsc::register_moe(module);
    dsc::register_moe_permute(module);
    dsc::register_gemm(module);
    dsc::register_gemm_plan(module);
    dsc::register_rope(module);
    dsc::register_mla_decode(module);
    dsc::register_mla_decode_plan(module);
    dsc::register_mla_prefill(module);
    dsc::register_mla_prefill_backward(module);
    dsc::register_mla_prefill_plan(module);
    dsc::register_comm_buffer(module);
    dsc::register_comm(module);
    dsc::register_comm_plan(module);
    dsc::register_text(module);
}
