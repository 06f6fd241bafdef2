// What the programs that read a played ring back through CuTe's layouts share: numbers to tell elements by,
// and what was compared.
#pragma once

#include <cstdint>
#include <cstdio>

namespace dsc::tests {

inline int num_wrong = 0, num_compared = 0;
inline size_t swizzle_lines = 8;  // after which the swizzle repeats; a planted mistake changes it

inline void compare(const char* what, int64_t got, int64_t wanted, int i, int j) {
    ++num_compared;
    if (got == wanted) return;
    if (num_wrong++ < 10) {
        std::printf("%s (%d, %d) is %lld, wanted %lld\n", what, i, j, static_cast<long long>(got),
                    static_cast<long long>(wanted));
    }
}

// Never zero, and seldom that of another element.
inline uint16_t value_at(int64_t element) {
    return static_cast<uint16_t>((static_cast<uint64_t>(element) * 2654435761u >> 13) | 1);
}

template <typename Tensor>
uint16_t bits_at(const Tensor& tensor, auto... coordinates) {
    const auto& element = tensor(coordinates...);
    return reinterpret_cast<const uint16_t&>(element);
}

// Runs `check`, with a wrong swizzle if `is_planted`; says what was compared, and returns the exit status.
template <typename Check>
int main_of(bool is_planted, const Check& check) {
    if (is_planted) swizzle_lines = 4;
    check();
    std::printf("%d compared, %d wrong\n", num_compared, num_wrong);
    return num_wrong == 0 ? 0 : 1;
}

}  // namespace dsc::tests
