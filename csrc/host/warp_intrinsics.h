// Shuffles, votes, matches and reductions of a warp. Each waits for exactly the lanes its mask names.
#pragma once

#include <cstring>
#include <functional>
#include <string>

#include "host/executor.h"
#include "host/float16.h"

namespace dsc::host {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kOwnValue = -1;

template <typename T>
concept Matched = OneOf<T, int, unsigned, long, unsigned long, long long, unsigned long long, float, double>;
template <typename T>
concept Shuffled = Matched<T> or OneOf<T, __half, __half2, __nv_bfloat16, __nv_bfloat162>;
template <typename T>
concept Reduced = OneOf<T, int, unsigned>;

template <Shuffled T>
struct ShuffleFrame {
    T value, result;
    int source;  // a lane, or kOwnValue
};

template <Shuffled T>
void complete_shuffle(unsigned mask, void* const* frames) {
    for (int lane = 0; lane < warpSize; ++lane) {
        if ((mask >> lane & 1) == 0) continue;
        auto& frame = *static_cast<ShuffleFrame<T>*>(frames[lane]);
        const int source = frame.source == kOwnValue ? lane : frame.source;
        if (mask >> source & 1) {
            frame.result = static_cast<const ShuffleFrame<T>*>(frames[source])->value;
        } else {  // undefined in CUDA: a NaN, a wild index
            const unsigned char poison[] = {0xff, 0x7f, 0xff, 0x7f, 0xff, 0x7f, 0xff, 0x7f};
            std::memcpy(&frame.result, poison, sizeof(T));
        }
    }
}

inline void check_width(const char* what, int width, const Place& where) {
    const bool is_power_of_two = width > 0 and (width & (width - 1)) == 0;
    if (not is_power_of_two or width > warpSize) fail((std::string(what) + ": wrong width").c_str(), where);
}

template <Shuffled T>
T shuffle(const char* what, unsigned mask, T value, int source, const Place& where) {
    ShuffleFrame<T> frame{value, value, source};
    wait_for_warp(what, mask, &frame, complete_shuffle<T>, where);
    return frame.result;
}

struct VoteFrame {
    bool predicate;
    unsigned ballot;
};

inline void complete_vote(unsigned mask, void* const* frames) {
    unsigned ballot = 0;
    for (int lane = 0; lane < warpSize; ++lane) {
        if (mask >> lane & 1 and static_cast<const VoteFrame*>(frames[lane])->predicate) ballot |= 1u << lane;
    }
    for (int lane = 0; lane < warpSize; ++lane) {
        if (mask >> lane & 1) static_cast<VoteFrame*>(frames[lane])->ballot = ballot;
    }
}

inline unsigned vote(const char* what, unsigned mask, bool predicate, const Place& where) {
    VoteFrame frame{predicate, 0};
    wait_for_warp(what, mask, &frame, complete_vote, where);
    return frame.ballot;
}

template <Matched T>
struct MatchFrame {
    T value;
    unsigned same;  // the lanes with this value
};

template <Matched T>
void complete_match(unsigned mask, void* const* frames) {
    for (int lane = 0; lane < warpSize; ++lane) {
        if ((mask >> lane & 1) == 0) continue;
        auto& frame = *static_cast<MatchFrame<T>*>(frames[lane]);
        frame.same = 0;
        for (int other = 0; other < warpSize; ++other) {
            if ((mask >> other & 1) == 0) continue;
            const T& value = static_cast<const MatchFrame<T>*>(frames[other])->value;
            if (std::memcmp(&value, &frame.value, sizeof(T)) == 0) frame.same |= 1u << other;
        }
    }
}

template <Matched T>
unsigned match(const char* what, unsigned mask, T value, const Place& where) {
    MatchFrame<T> frame{value, 0};
    wait_for_warp(what, mask, &frame, complete_match<T>, where);
    return frame.same;
}

// Op: a default-constructible function of two values, as std::plus.
template <Reduced T, typename Op>
void complete_reduce(unsigned mask, void* const* frames) {
    const int first = __builtin_ctz(mask);
    T result = *static_cast<const T*>(frames[first]);
    for (int lane = first + 1; lane < warpSize; ++lane) {
        if (mask >> lane & 1) result = Op()(result, *static_cast<const T*>(frames[lane]));
    }
    for (int lane = first; lane < warpSize; ++lane) {
        if (mask >> lane & 1) *static_cast<T*>(frames[lane]) = result;
    }
}

template <typename Op, Reduced T>
T reduce(const char* what, unsigned mask, T value, const Place& where) {
    wait_for_warp(what, mask, &value, complete_reduce<T, Op>, where);
    return value;
}

struct Add {  // wraps round, as the hardware's sum does
    template <typename T>
    T operator()(T a, T b) const {
        return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
    }
};
struct Min {
    template <typename T>
    T operator()(T a, T b) const {
        return b < a ? b : a;
    }
};
struct Max {
    template <typename T>
    T operator()(T a, T b) const {
        return a < b ? b : a;
    }
};

}  // namespace dsc::host

#define DSC_HERE const dsc::host::Place where = dsc::host::Place::current()

inline void __syncwarp(unsigned mask = dsc::host::kFullMask, DSC_HERE) {
    dsc::host::wait_for_warp("__syncwarp", mask, nullptr, [](unsigned, void* const*) {}, where);
}

// ---- shuffles ----
// Lanes fall into segments of `width`; a source outside the segment gives the lane's own value.

template <dsc::host::Shuffled T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, DSC_HERE) {
    dsc::host::check_width("__shfl_sync", width, where);
    const int segment = dsc::host::lane_idx() & ~(width - 1);
    return dsc::host::shuffle("__shfl_sync", mask, value, segment | (source & (width - 1)), where);
}

template <dsc::host::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, DSC_HERE) {
    dsc::host::check_width("__shfl_up_sync", width, where);
    const int lane = dsc::host::lane_idx();
    const int source = lane - static_cast<int>(delta % warpSize);
    const bool is_inside = source >= (lane & ~(width - 1));
    return dsc::host::shuffle("__shfl_up_sync", mask, value, is_inside ? source : dsc::host::kOwnValue,
                              where);
}

template <dsc::host::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, DSC_HERE) {
    dsc::host::check_width("__shfl_down_sync", width, where);
    const int lane = dsc::host::lane_idx();
    const int source = lane + static_cast<int>(delta % warpSize);
    const bool is_inside = source <= (lane | (width - 1));
    return dsc::host::shuffle("__shfl_down_sync", mask, value, is_inside ? source : dsc::host::kOwnValue,
                              where);
}

// Lanes of an earlier segment may be read, lanes of a later one may not.
template <dsc::host::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, DSC_HERE) {
    dsc::host::check_width("__shfl_xor_sync", width, where);
    const int lane = dsc::host::lane_idx();
    const int source = lane ^ (lane_mask % warpSize);
    const bool is_inside = source <= (lane | (width - 1));
    return dsc::host::shuffle("__shfl_xor_sync", mask, value, is_inside ? source : dsc::host::kOwnValue,
                              where);
}

// ---- votes and matches ----

inline unsigned __ballot_sync(unsigned mask, int predicate, DSC_HERE) {
    return dsc::host::vote("__ballot_sync", mask, predicate != 0, where);
}

inline int __any_sync(unsigned mask, int predicate, DSC_HERE) {
    return dsc::host::vote("__any_sync", mask, predicate != 0, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate, DSC_HERE) {
    return dsc::host::vote("__all_sync", mask, predicate != 0, where) == mask;
}

// CUDA promises the caller's own lane and no other: code that needs more is wrong.
inline unsigned __activemask() {
    return 1u << dsc::host::lane_idx();
}

template <dsc::host::Matched T>
unsigned __match_any_sync(unsigned mask, T value, DSC_HERE) {
    return dsc::host::match("__match_any_sync", mask, value, where);
}

template <dsc::host::Matched T>
unsigned __match_all_sync(unsigned mask, T value, int* predicate, DSC_HERE) {
    *predicate = dsc::host::match("__match_all_sync", mask, value, where) == mask;
    return *predicate ? mask : 0;
}

// ---- reductions ----

template <dsc::host::Reduced T>
T __reduce_add_sync(unsigned mask, T value, DSC_HERE) {
    return dsc::host::reduce<dsc::host::Add>("__reduce_add_sync", mask, value, where);
}

template <dsc::host::Reduced T>
T __reduce_min_sync(unsigned mask, T value, DSC_HERE) {
    return dsc::host::reduce<dsc::host::Min>("__reduce_min_sync", mask, value, where);
}

template <dsc::host::Reduced T>
T __reduce_max_sync(unsigned mask, T value, DSC_HERE) {
    return dsc::host::reduce<dsc::host::Max>("__reduce_max_sync", mask, value, where);
}

inline unsigned __reduce_and_sync(unsigned mask, unsigned value, DSC_HERE) {
    return dsc::host::reduce<std::bit_and<>>("__reduce_and_sync", mask, value, where);
}

inline unsigned __reduce_or_sync(unsigned mask, unsigned value, DSC_HERE) {
    return dsc::host::reduce<std::bit_or<>>("__reduce_or_sync", mask, value, where);
}

inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, DSC_HERE) {
    return dsc::host::reduce<std::bit_xor<>>("__reduce_xor_sync", mask, value, where);
}

#undef DSC_HERE
