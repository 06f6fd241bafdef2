// The floating point types that kernels take, chosen at run time: one enum, and the step from it to a
// template argument.
//     with_float_type(p.dtype, [&]<typename T>() { launch(my_kernel<T>, grid, block, 0, stream, p); });
#pragma once

#include "core/device.h"

namespace dsc {

enum class FloatType { kFloat32, kBfloat16, kFloat16 };

constexpr int size_of(FloatType type) {
    return type == FloatType::kFloat32 ? 4 : 2;
}

constexpr const char* name_of(FloatType type) {
    if (type == FloatType::kFloat32) return "float32";
    return type == FloatType::kBfloat16 ? "bfloat16" : "float16";
}

// Calls function.operator()<T>() with the C++ type.
template <typename Function>
void with_float_type(FloatType type, const Function& function) {
    if (type == FloatType::kFloat32) return function.template operator()<float>();
    if (type == FloatType::kBfloat16) return function.template operator()<__nv_bfloat16>();
    function.template operator()<__half>();
}

}  // namespace dsc
