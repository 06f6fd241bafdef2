// The words by which Python chooses a kernel.
#pragma once

#include <string>

#include "core/check.h"
#include "gemm/grouped_gemm_plan.h"

namespace dsc::bind {

inline GemmArch gemm_arch(const char* op, const std::string& arch) {
    if (arch == "auto") return GemmArch::kAuto;
    if (arch == "sm80") return GemmArch::kSm80;
    DSC_CHECK(arch == "sm90", op, ": arch must be auto, sm80 or sm90, got ", arch);
    return GemmArch::kSm90;
}

}  // namespace dsc::bind
