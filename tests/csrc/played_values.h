// bfloat16 numbers as bits, for the programs that play sm_90a's hardware.
#pragma once

#include <algorithm>
#include <cmath>
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

// How far attention's rows are from float64.
struct Distance {
    double difference = 0, size = 1e-30, worst_lse = 0;

    // One row's output and log-sum-exp; `wanted` holds the log-sum-exp behind the output.
    void add(const uint16_t* out, double lse, const std::vector<double>& wanted) {
        const size_t width = wanted.size() - 1;
        for (size_t i = 0; i < width; ++i) {
            const double got = float_of(out[i]);
            difference += (got - wanted[i]) * (got - wanted[i]);
            size += wanted[i] * wanted[i];
        }
        const bool is_same = lse == wanted[width];  // -inf of a query that sees nothing
        const double error =
            is_same ? 0 : std::abs(lse - wanted[width]) / std::max(1.0, std::abs(wanted[width]));
        worst_lse = error <= worst_lse ? worst_lse : error;  // NaN too
    }
    bool is_small() const { return difference <= 2e-5 * size and worst_lse <= 1e-5; }
};

}  // namespace dsc::tests
