// The extension module dscoder._C: one register function per family, nothing else.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, module) {
    module.attr("version") = DSC_VERSION;
}
