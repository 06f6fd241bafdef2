// What becomes of a tile's sums on sm_80: rounded into shared memory, over the ring of the product, then
// moved row by row in words of 16 bytes. A tile writes the rows and columns that exist, nothing else: the
// rows behind an expert's last are the next expert's.
#pragma once

#include "core/math.h"
#include "core/vec.h"
#include "gemm/grouped_gemm_schedule.cuh"
#include "gemm/tile_product_sm80.cuh"

namespace dsc {

// Words of a staged row are swizzled as those of a stage: word w of row r lies at w ^ (r % 8).
template <typename Out, int kColumns>
__device__ __forceinline__ Out* staged_word(Out* staged, int row, int word) {
    return staged + row * kColumns + (word ^ (row % 8)) * kPerWord<Out>;
}

// All threads; a barrier before it (nobody reads the ring any more) and one after it.
template <typename S, typename Out>
__device__ __forceinline__ void stage_sums(Out* staged, const Accumulators<S>& acc) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int first_row = warp / S::kWarpsN * S::kWarpM + lane / 4;
    const int first_column = warp % S::kWarpsN * S::kWarpN + 2 * (lane % 4);
    DSC_UNROLL
    for (int i = 0; i < S::kFragmentsM; ++i) {
        DSC_UNROLL
        for (int j = 0; j < S::kFragmentsN; ++j) {
            DSC_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int row = first_row + 16 * i + 8 * half, column = first_column + 8 * j;
                Out* const pair =
                    staged_word<Out, S::kN>(staged, row, column / kPerWord<Out>) + column % kPerWord<Out>;
                const float low = acc[i][j][2 * half], high = acc[i][j][2 * half + 1];
                if constexpr (std::is_same_v<Out, float>) {
                    *reinterpret_cast<float2*>(pair) = make_float2(low, high);
                } else {
                    *reinterpret_cast<uint32_t*>(pair) = rounded_pair<Out>(low, high);
                }
            }
        }
    }
}

// store(row, column, words) for each kWords neighbouring words of the tile, `column` in elements.
template <typename S, typename Out, int kWords, typename Store>
__device__ __forceinline__ void for_each_word(Out* staged, int num_rows, const Store& store) {
    constexpr int kRowItems = S::kN / kPerWord<Out> / kWords;
    for (int item = threadIdx.x; item < num_rows * kRowItems; item += S::kNumThreads) {
        const int row = item / kRowItems, word = item % kRowItems * kWords;
        Word words[kWords];
        DSC_UNROLL
        for (int i = 0; i < kWords; ++i) {
            words[i] = *reinterpret_cast<const Word*>(staged_word<Out, S::kN>(staged, row, word + i));
        }
        store(row, word * kPerWord<Out>, words);
    }
}

template <typename T>
__device__ __forceinline__ Word& word_at(void* base, int64_t element) {
    return *reinterpret_cast<Word*>(static_cast<T*>(base) + element);
}
template <typename T>
__device__ __forceinline__ Word word_at(const void* base, int64_t element) {
    return *reinterpret_cast<const Word*>(static_cast<const T*>(base) + element);
}

// hidden = silu(gate) * up, a word of each.
template <typename T>
__device__ __forceinline__ Word swiglu(const Word& gate_word, const Word& up_word) {
    float gate[kPerWord<T>], up[kPerWord<T>];
    unpack<T>(gate_word, gate);
    unpack<T>(up_word, up);
    DSC_UNROLL
    for (int i = 0; i < kPerWord<T>; ++i) up[i] *= gate[i] / (1.0f + __expf(-gate[i]));
    return pack<T>(up);
}

// The gradients of gate and up, in place of them.
template <typename T>
__device__ __forceinline__ void swiglu_backward(const Word& grad_word, Word& gate_word, Word& up_word) {
    float grad[kPerWord<T>], gate[kPerWord<T>], up[kPerWord<T>];
    unpack<T>(grad_word, grad);
    unpack<T>(gate_word, gate);
    unpack<T>(up_word, up);
    DSC_UNROLL
    for (int i = 0; i < kPerWord<T>; ++i) {
        const float sigmoid = 1.0f / (1.0f + __expf(-gate[i]));
        const float silu = gate[i] * sigmoid;
        gate[i] = grad[i] * up[i] * (sigmoid + silu * (1.0f - sigmoid));
        up[i] = grad[i] * silu;
    }
    gate_word = pack<T>(gate);
    up_word = pack<T>(up);
}

}  // namespace dsc
