// Atomics, with the argument types that CUDA has and no others. Threads run one at a time, so a plain read
// and write is atomic; before it another thread may get its turn, so that orders of atomics differ from seed
// to seed.
#pragma once

#include <type_traits>

#include "host/executor.h"

namespace dsc::host {

template <typename T>
concept Word = OneOf<T, int, unsigned, unsigned long long>;
template <typename T>
concept Ordered = Word<T> or std::is_same_v<T, long long>;
template <typename T>
concept Summed = Word<T> or OneOf<T, float, double>;
template <typename T>
concept Exchanged = Word<T> or std::is_same_v<T, float>;
template <typename T>
concept Compared = Word<T> or std::is_same_v<T, unsigned short>;

template <typename T, typename Function>
T update(T* address, Function function) {
    maybe_yield();
    const T old = *address;
    *address = function(old);
    return old;
}

// Integers wrap round.
template <typename T>
T wrapping_sum(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
        return a + b;
    } else {
        using Unsigned = std::make_unsigned_t<T>;
        return static_cast<T>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b));
    }
}

template <typename T>
using Same = std::type_identity_t<T>;  // the address alone decides the type: atomicAdd(&num_unsigned, 1)

}  // namespace dsc::host

template <dsc::host::Summed T>
T atomicAdd(T* address, dsc::host::Same<T> value) {
    return dsc::host::update(address, [&](T old) { return dsc::host::wrapping_sum(old, value); });
}

template <dsc::host::OneOf<int, unsigned> T>
T atomicSub(T* address, dsc::host::Same<T> value) {
    const auto negated = static_cast<T>(0u - static_cast<unsigned>(value));
    return dsc::host::update(address, [&](T old) { return dsc::host::wrapping_sum(old, negated); });
}

template <dsc::host::Exchanged T>
T atomicExch(T* address, dsc::host::Same<T> value) {
    return dsc::host::update(address, [&](T) { return value; });
}

template <dsc::host::Compared T>
T atomicCAS(T* address, dsc::host::Same<T> expected, dsc::host::Same<T> value) {
    return dsc::host::update(address, [&](T old) { return old == expected ? value : old; });
}

template <dsc::host::Ordered T>
T atomicMin(T* address, dsc::host::Same<T> value) {
    return dsc::host::update(address, [&](T old) { return value < old ? value : old; });
}

template <dsc::host::Ordered T>
T atomicMax(T* address, dsc::host::Same<T> value) {
    return dsc::host::update(address, [&](T old) { return old < value ? value : old; });
}

template <dsc::host::Word T>
T atomicAnd(T* address, dsc::host::Same<T> value) {
    return dsc::host::update(address, [&](T old) { return static_cast<T>(old & value); });
}

template <dsc::host::Word T>
T atomicOr(T* address, dsc::host::Same<T> value) {
    return dsc::host::update(address, [&](T old) { return static_cast<T>(old | value); });
}

template <dsc::host::Word T>
T atomicXor(T* address, dsc::host::Same<T> value) {
    return dsc::host::update(address, [&](T old) { return static_cast<T>(old ^ value); });
}

// Counts up, from `last` back to 0.
inline unsigned atomicInc(unsigned* address, unsigned last) {
    return dsc::host::update(address, [&](unsigned old) { return old >= last ? 0 : old + 1; });
}

// Counts down, from 0 back to `last`.
inline unsigned atomicDec(unsigned* address, unsigned last) {
    return dsc::host::update(address, [&](unsigned old) { return old == 0 or old > last ? last : old - 1; });
}
