// bfloat16 numbers as bits, for the programs that play sm_90a's hardware.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace dsc::tests {

using Bits = std::vector<uint16_t>;
constexpr uint16_t kPoison = 0x7fff;  // NaN

inline float float_of(uint16_t bits) {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
}

}  // namespace dsc::tests
