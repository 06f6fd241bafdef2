// Bit, conversion and fast-maths intrinsics. The fast ones are exact here: tolerances are set by the GPU.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

// ---- min and max of mixed arithmetic types, as CUDA's overloads ----

template <typename A, typename B>
    requires std::is_arithmetic_v<A> and std::is_arithmetic_v<B>
constexpr auto min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>)
        return std::fmin(static_cast<T>(a), static_cast<T>(b));
    else
        return std::min(static_cast<T>(a), static_cast<T>(b));
}

template <typename A, typename B>
    requires std::is_arithmetic_v<A> and std::is_arithmetic_v<B>
constexpr auto max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>)
        return std::fmax(static_cast<T>(a), static_cast<T>(b));
    else
        return std::max(static_cast<T>(a), static_cast<T>(b));
}

// ---- bits ----

constexpr int __popc(unsigned value) {
    return std::popcount(value);
}
constexpr int __popcll(unsigned long long value) {
    return std::popcount(value);
}
constexpr int __clz(int value) {
    return std::countl_zero(static_cast<unsigned>(value));
}
constexpr int __clzll(long long value) {
    return std::countl_zero(static_cast<unsigned long long>(value));
}
constexpr int __ffs(int value) {
    return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1;
}
constexpr int __ffsll(long long value) {
    return value == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(value)) + 1;
}
constexpr unsigned __brev(unsigned value) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= (value >> i & 1) << (31 - i);
    return reversed;
}
constexpr unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
constexpr int __mulhi(int a, int b) {
    return static_cast<int>(int64_t{a} * b >> 32);
}

constexpr int __float_as_int(float value) {
    return std::bit_cast<int>(value);
}
constexpr unsigned __float_as_uint(float value) {
    return std::bit_cast<unsigned>(value);
}
constexpr float __int_as_float(int bits) {
    return std::bit_cast<float>(bits);
}
constexpr float __uint_as_float(unsigned bits) {
    return std::bit_cast<float>(bits);
}
constexpr long long __double_as_longlong(double value) {
    return std::bit_cast<long long>(value);
}
constexpr double __longlong_as_double(long long bits) {
    return std::bit_cast<double>(bits);
}

// ---- memory: the cache hints change nothing here ----

template <typename T>
T __ldg(const T* address) {
    return *address;
}
template <typename T>
T __ldcs(const T* address) {
    return *address;
}
template <typename T>
T __ldcg(const T* address) {
    return *address;
}
template <typename T>
void __stcs(T* address, std::type_identity_t<T> value) {
    *address = value;
}
template <typename T>
void __stcg(T* address, std::type_identity_t<T> value) {
    *address = value;
}

// ---- float to int: saturates, NaN gives 0 ----

namespace dsc::host {

inline int saturate_to_int(float rounded) {
    if (rounded != rounded) return 0;
    if (rounded >= 0x1p31f) return std::numeric_limits<int>::max();
    if (rounded < -0x1p31f) return std::numeric_limits<int>::min();
    return static_cast<int>(rounded);
}

}  // namespace dsc::host

inline int __float2int_rn(float value) {
    return dsc::host::saturate_to_int(std::nearbyint(value));
}
inline int __float2int_rz(float value) {
    return dsc::host::saturate_to_int(std::trunc(value));
}
inline int __float2int_rd(float value) {
    return dsc::host::saturate_to_int(std::floor(value));
}
inline int __float2int_ru(float value) {
    return dsc::host::saturate_to_int(std::ceil(value));
}
constexpr float __int2float_rn(int value) {
    return static_cast<float>(value);
}
constexpr float __uint2float_rn(unsigned value) {
    return static_cast<float>(value);
}

// ---- arithmetic ----

namespace dsc::host {

// The GPU's arithmetic gives one NaN, whatever NaN went in; the CPU's keeps sign and payload.
constexpr float with_device_nan(float value) {
    return value != value ? std::bit_cast<float>(0x7fffffff) : value;
}

}  // namespace dsc::host

constexpr float __fadd_rn(float a, float b) {
    return dsc::host::with_device_nan(a + b);
}
constexpr float __fsub_rn(float a, float b) {
    return dsc::host::with_device_nan(a - b);
}
constexpr float __fmul_rn(float a, float b) {
    return dsc::host::with_device_nan(a * b);
}
constexpr float __fdiv_rn(float a, float b) {
    return dsc::host::with_device_nan(a / b);
}
inline float __fmaf_rn(float a, float b, float c) {
    return dsc::host::with_device_nan(std::fma(a, b, c));
}
inline float __fsqrt_rn(float value) {
    return dsc::host::with_device_nan(std::sqrt(value));
}
constexpr float __frcp_rn(float value) {
    return __fdiv_rn(1.0f, value);
}
constexpr float __fdividef(float a, float b) {
    return a / b;
}
inline float __saturatef(float value) {
    return std::fmin(std::fmax(value, 0.0f), 1.0f);
}
inline float rsqrtf(float value) {
    return 1.0f / std::sqrt(value);
}
inline double rsqrt(double value) {
    return 1.0 / std::sqrt(value);
}

// glibc's headers name these as functions of C that it does not have: the declarations must agree.
extern "C" {
inline float __expf(float value) noexcept {
    return std::exp(value);
}
inline float __exp10f(float value) noexcept {
    return std::pow(10.0f, value);
}
inline float __logf(float value) noexcept {
    return std::log(value);
}
inline float __log2f(float value) noexcept {
    return std::log2(value);
}
inline float __log10f(float value) noexcept {
    return std::log10(value);
}
inline float __sinf(float value) noexcept {
    return std::sin(value);
}
inline float __cosf(float value) noexcept {
    return std::cos(value);
}
inline float __tanf(float value) noexcept {
    return std::tan(value);
}
inline float __powf(float base, float exponent) noexcept {
    return std::pow(base, exponent);
}
}
