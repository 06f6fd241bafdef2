// What the kernels of the rotary family share: heads cut into words of 16 bytes, and the rotation of one.
//
// All of them are bound by memory, so threads are laid out for it alone: the units that a launch rotates or
// copies, of all heads and tokens, form one list, and a block takes kUnitsPerThread of them for each of its
// threads, neighbours by neighbouring threads. No thread idles but in the last block, whatever the number of
// heads and tokens. The way from a unit's number to its token, head and place is two multiplications. A
// thread has the loads of all its units, and of their angles, under way before it uses the first. A token's
// angles are read by each of its heads: the cache answers all but the first.
#pragma once

#include "attention/attention.h"
#include "core/check.h"
#include "core/launch.h"
#include "core/math.h"
#include "core/overlap.h"
#include "core/vec.h"

namespace dsc {

constexpr int kRotaryThreads = 256;
constexpr int kUnitsPerThread = 2;
constexpr int kUnitsPerBlock = kRotaryThreads * kUnitsPerThread;
constexpr int kMaxTokenUnits = 1 << 15;  // 512 KiB of words, and what Divider is exact for

// n / divisor as a multiplication, exact while n * divisor < 2^32: the multiplier is too large by less than
// 2^-32 of the divisor.
struct Divider {
    uint64_t multiplier;
    int divisor;

    explicit Divider(int divisor)
        : multiplier(((uint64_t{1} << 32) + divisor - 1) / divisor), divisor(divisor) {}

    __device__ int quotient(int n) const {
        return static_cast<int>(static_cast<uint64_t>(n) * multiplier >> 32);
    }
};

struct UnitPlace {
    int64_t token;
    int head, unit;  // unit of the head
    bool is_inside;
};

// The list of units: those of a head, its heads', the tokens'.
struct HeadUnits {
    int64_t num_units;
    Divider token, head;  // units of one
    int num_copied;       // units at the front of a head that are not rotated

    int64_t num_blocks() const { return ceil_div<int64_t>(num_units, kUnitsPerBlock); }

    // Where the thread's i-th unit of block `block` is.
    __device__ __forceinline__ UnitPlace place(int64_t block, int i) const {
        const int64_t first = block * kUnitsPerBlock;
        const int64_t first_token = first / token.divisor;
        const int own = threadIdx.x + i * kRotaryThreads;
        const int in_block = static_cast<int>(first - first_token * token.divisor) + own;
        const int num_tokens = token.quotient(in_block);
        const int in_token = in_block - num_tokens * token.divisor;
        const int head_idx = head.quotient(in_token);
        return {first_token + num_tokens, head_idx, in_token - head_idx * head.divisor,
                first + own < num_units};
    }
};

struct Angles {
    const float* cos;          // [L, f]
    const float* sin;          // [L, f]
    const int64_t* positions;  // [T]
    int64_t num_positions;
    int num_pairs;    // f
    float direction;  // 1, or -1: back
};

template <typename Params>
__host__ __device__ Angles angles_of(const Params& p, int width, bool inverse) {
    return {p.cos, p.sin, p.positions, p.num_positions, width / 2, inverse ? -1.0f : 1.0f};
}

// The cosines and sines of kPairs neighbouring pairs.
template <int kPairs>
struct Turn {
    float cos[kPairs], sin[kPairs];
};

template <int kCount>
__device__ __forceinline__ void load_floats(const float* from, float (&to)[kCount]) {
    if constexpr (kCount == 2) {
        const float2 pair = *reinterpret_cast<const float2*>(from);
        to[0] = pair.x;
        to[1] = pair.y;
    } else {
        DSC_UNROLL
        for (int i = 0; i < kCount; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(from + i);
            to[i] = four.x;
            to[i + 1] = four.y;
            to[i + 2] = four.z;
            to[i + 3] = four.w;
        }
    }
}

// Of a position that the tables do not have: NaN.
template <int kPairs>
__device__ __forceinline__ Turn<kPairs> load_turn(const Angles& angles, int64_t position, int first_pair) {
    Turn<kPairs> turn;
    if (position >= 0 and position < angles.num_positions) {
        const int64_t offset = position * angles.num_pairs + first_pair;
        load_floats(angles.cos + offset, turn.cos);
        load_floats(angles.sin + offset, turn.sin);
    } else {
        DSC_UNROLL
        for (int i = 0; i < kPairs; ++i) turn.cos[i] = turn.sin[i] = __uint_as_float(0x7fffffffu);
    }
    DSC_UNROLL
    for (int i = 0; i < kPairs; ++i) turn.sin[i] *= angles.direction;
    return turn;
}

__device__ __forceinline__ void turn_pair(float& a, float& b, float cos, float sin) {
    const float turned = a * cos - b * sin;
    b = b * cos + a * sin;
    a = turned;
}

// Pairs (0, 1), (2, 3), ..: a unit is one word.
template <typename T>
struct Neighbours {
    using Element = T;
    static constexpr int kWords = 1;
    static constexpr int kPairs = kPerWord<T> / 2;

    static __device__ __forceinline__ void turn(Word (&words)[kWords], const Turn<kPairs>& by) {
        float values[kPerWord<T>];
        unpack<T>(words[0], values);
        DSC_UNROLL
        for (int i = 0; i < kPairs; ++i) turn_pair(values[2 * i], values[2 * i + 1], by.cos[i], by.sin[i]);
        words[0] = pack<T>(values);
    }
};

// Pairs (i, i + r / 2): a unit is a word of each half.
template <typename T>
struct Halves {
    using Element = T;
    static constexpr int kWords = 2;
    static constexpr int kPairs = kPerWord<T>;

    static __device__ __forceinline__ void turn(Word (&words)[kWords], const Turn<kPairs>& by) {
        float a[kPerWord<T>], b[kPerWord<T>];
        unpack<T>(words[0], a);
        unpack<T>(words[1], b);
        DSC_UNROLL
        for (int i = 0; i < kPairs; ++i) turn_pair(a[i], b[i], by.cos[i], by.sin[i]);
        words[0] = pack<T>(a);
        words[1] = pack<T>(b);
    }
};

// The thread's units of block `block`. source(place) and target(place) are where a unit's first word lies; a
// second one lies r / 2 elements on.
template <typename Pairing, typename Source, typename Target>
__device__ __forceinline__ void turn_units(const Angles& angles, const HeadUnits& units, int64_t block,
                                           const Source& source, const Target& target) {
    constexpr int kWords = Pairing::kWords, kPairs = Pairing::kPairs;
    UnitPlace place[kUnitsPerThread];
    Word words[kUnitsPerThread][kWords] = {};
    int64_t position[kUnitsPerThread] = {};
    DSC_UNROLL
    for (int i = 0; i < kUnitsPerThread; ++i) {
        place[i] = units.place(block, i);
        if (not place[i].is_inside) continue;
        const typename Pairing::Element* const from = source(place[i]);
        DSC_UNROLL
        for (int w = 0; w < kWords; ++w) {
            words[i][w] = *reinterpret_cast<const Word*>(from + w * angles.num_pairs);
        }
        position[i] = angles.positions[place[i].token];
    }
    let_next_kernel_start();
    Turn<kPairs> turn[kUnitsPerThread];
    DSC_UNROLL
    for (int i = 0; i < kUnitsPerThread; ++i) {
        const int first_pair = (place[i].unit - units.num_copied) * kPairs;
        if (place[i].is_inside and first_pair >= 0) {
            turn[i] = load_turn<kPairs>(angles, position[i], first_pair);
        }
    }
    DSC_UNROLL
    for (int i = 0; i < kUnitsPerThread; ++i) {
        if (not place[i].is_inside) continue;
        if (place[i].unit >= units.num_copied) Pairing::turn(words[i], turn[i]);
        typename Pairing::Element* const to = target(place[i]);
        DSC_UNROLL
        for (int w = 0; w < kWords; ++w) {
            *reinterpret_cast<Word*>(to + w * angles.num_pairs) = words[i][w];
        }
    }
}

// ---- host ----

// The rows that a kernel reads or writes by words.
struct WordRows {
    const char* op;
    FloatType dtype;

    int per_word() const { return kWordBytes / size_of(dtype); }

    void check_width(const char* name, int64_t width, int num_words = 1) const {
        const int wanted = num_words * per_word();
        DSC_CHECK(width % wanted == 0, op, ": ", name, " in ", name_of(dtype), " must be a multiple of ",
                  wanted, " wide, got ", width);
    }

    void check_stride(const char* name, int64_t stride) const {
        DSC_CHECK(stride % per_word() == 0, op, ": ", name, " in ", name_of(dtype),
                  " must have rows a multiple of ", per_word(), " apart, got ", stride);
    }

    // Of a head's words `num_copied` are not rotated; `words_per_unit` of the others are one unit.
    HeadUnits units(int64_t num_tokens, int num_heads, int num_units, int num_copied) const {
        const int64_t per_token = int64_t{num_heads} * num_units;
        DSC_CHECK(per_token <= kMaxTokenUnits, op, ": a token must have at most ", kMaxTokenUnits,
                  " units of ", kWordBytes, " bytes, got ", per_token);
        return {num_tokens * per_token, Divider(std::max(static_cast<int>(per_token), 1)),
                Divider(std::max(num_units, 1)), num_copied};
    }
};

}  // namespace dsc
