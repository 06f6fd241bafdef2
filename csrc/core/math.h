// Integer arithmetic for launches.
#pragma once

namespace dsc {

template <typename Int>
constexpr Int ceil_div(Int a, Int b) {
    return (a + b - 1) / b;
}

}  // namespace dsc
