// __half and __nv_bfloat16: storage, conversions that round to nearest even, and arithmetic by way of float,
// which rounds once (float has more than twice the bits of either).
#pragma once

#include <bit>
#include <cstdint>

#include "host/vector_types.h"

namespace dsc::host {

struct BfloatFormat {
    static constexpr float to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
    static constexpr uint16_t from_float(float value) {
        const auto bits = std::bit_cast<uint32_t>(value);
        if (value != value) return 0x7fff;
        return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};

struct HalfFormat {
    static constexpr int kMantissaBits = 10, kFloatMantissaBits = 23, kMinExponent = -14, kMaxExponent = 15;

    static constexpr float to_float(uint16_t bits) {
        const uint32_t sign = uint32_t(bits >> 15) << 31, exponent = bits >> 10 & 31, mantissa = bits & 1023;
        if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
        if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in float
            const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
            return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
        }
        return std::bit_cast<float>(sign | (exponent + 127 - 15) << 23 | mantissa << 13);
    }

    static constexpr uint16_t from_float(float value) {
        const auto bits = std::bit_cast<uint32_t>(value);
        const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
        if (value != value) return 0x7fff;
        if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // 2^16 and above, infinity
        if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves a multiple of 2^-24 in the low bits
            const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
            return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000));
        }
        const uint32_t rounded = magnitude - (uint32_t{127 - 15} << 23) + 0xfff + (magnitude >> 13 & 1);
        return static_cast<uint16_t>(sign | rounded >> 13);  // may carry into infinity, as it should
    }
};

template <typename Format>
struct Float16 {
    uint16_t bits;

    Float16() = default;
    constexpr Float16(float value) : bits(Format::from_float(value)) {}
    constexpr operator float() const { return Format::to_float(bits); }

    friend constexpr Float16 operator+(Float16 a, Float16 b) { return float(a) + float(b); }
    friend constexpr Float16 operator-(Float16 a, Float16 b) { return float(a) - float(b); }
    friend constexpr Float16 operator*(Float16 a, Float16 b) { return float(a) * float(b); }
    friend constexpr Float16 operator/(Float16 a, Float16 b) { return float(a) / float(b); }
    friend constexpr bool operator==(Float16 a, Float16 b) { return float(a) == float(b); }
    friend constexpr bool operator<(Float16 a, Float16 b) { return float(a) < float(b); }
    friend constexpr bool operator>(Float16 a, Float16 b) { return float(a) > float(b); }
    friend constexpr bool operator<=(Float16 a, Float16 b) { return float(a) <= float(b); }
    friend constexpr bool operator>=(Float16 a, Float16 b) { return float(a) >= float(b); }
};

template <typename Format>
struct alignas(4) Float16Pair {
    Float16<Format> x, y;
};

}  // namespace dsc::host

using __half = dsc::host::Float16<dsc::host::HalfFormat>;
using __half2 = dsc::host::Float16Pair<dsc::host::HalfFormat>;
using __nv_bfloat16 = dsc::host::Float16<dsc::host::BfloatFormat>;
using __nv_bfloat162 = dsc::host::Float16Pair<dsc::host::BfloatFormat>;
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

constexpr float __half2float(__half value) {
    return value;
}
constexpr __half __float2half(float value) {
    return value;
}
constexpr __half __float2half_rn(float value) {
    return value;
}
constexpr float2 __half22float2(__half2 pair) {
    return {pair.x, pair.y};
}
constexpr __half2 __floats2half2_rn(float x, float y) {
    return {x, y};
}
constexpr __half2 __float22half2_rn(float2 pair) {
    return {pair.x, pair.y};
}

constexpr float __bfloat162float(__nv_bfloat16 value) {
    return value;
}
constexpr __nv_bfloat16 __float2bfloat16(float value) {
    return value;
}
constexpr __nv_bfloat16 __float2bfloat16_rn(float value) {
    return value;
}
constexpr float2 __bfloat1622float2(__nv_bfloat162 pair) {
    return {pair.x, pair.y};
}
constexpr __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {x, y};
}
constexpr __nv_bfloat162 __float22bfloat162_rn(float2 pair) {
    return {pair.x, pair.y};
}
