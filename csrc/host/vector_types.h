// CUDA's vector types with CUDA's alignment, which vectorised loads rely on.
#pragma once

#define DSC_VECTOR_TYPES(T, name, alignment2, alignment4)  \
    struct name##1 {                                       \
        T x;                                               \
    };                                                     \
    struct alignas(alignment2) name##2 {                   \
        T x, y;                                            \
    };                                                     \
    struct name##3 {                                       \
        T x, y, z;                                         \
    };                                                     \
    struct alignas(alignment4) name##4 {                   \
        T x, y, z, w;                                      \
    };                                                     \
    constexpr name##1 make_##name##1(T x) {                \
        return {x};                                        \
    }                                                      \
    constexpr name##2 make_##name##2(T x, T y) {           \
        return {x, y};                                     \
    }                                                      \
    constexpr name##3 make_##name##3(T x, T y, T z) {      \
        return {x, y, z};                                  \
    }                                                      \
    constexpr name##4 make_##name##4(T x, T y, T z, T w) { \
        return {x, y, z, w};                               \
    }

DSC_VECTOR_TYPES(signed char, char, 2, 4)
DSC_VECTOR_TYPES(unsigned char, uchar, 2, 4)
DSC_VECTOR_TYPES(short, short, 4, 8)
DSC_VECTOR_TYPES(unsigned short, ushort, 4, 8)
DSC_VECTOR_TYPES(int, int, 8, 16)
DSC_VECTOR_TYPES(unsigned, uint, 8, 16)
DSC_VECTOR_TYPES(long long, longlong, 16, 16)
DSC_VECTOR_TYPES(unsigned long long, ulonglong, 16, 16)
DSC_VECTOR_TYPES(float, float, 8, 16)
DSC_VECTOR_TYPES(double, double, 16, 16)
#undef DSC_VECTOR_TYPES

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr operator uint3() const { return {x, y, z}; }
};
