// The extension module dscoder._C: one register function per family, nothing else.
#include <pybind11/pybind11.h>

namespace dsc {
void register_text(pybind11::module_& module);
}

PYBIND11_MODULE(_C, module) {
    module.attr("version") = DSC_VERSION;
    dsc::register_text(module);
}
