// silu(gate) * up and its gradient, a word of each at a time, in float32.
//
// sigmoid(x) = 1 / (1 + exp(-x)). Far below zero the exponential overflows to infinity and the sigmoid is 0,
// so that silu is -0 and its slope 0; far above zero both are exact. Only an infinite gate gives NaN.
#pragma once

#include "core/vec.h"

namespace dsc {

__device__ __forceinline__ float sigmoid(float x) {
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

// hidden = silu(gate) * up.
template <typename T>
__device__ __forceinline__ Word swiglu(const Word& gate_word, const Word& up_word) {
    float gate[kPerWord<T>], up[kPerWord<T>];
    unpack<T>(gate_word, gate);
    unpack<T>(up_word, up);
    DSC_UNROLL
    for (int i = 0; i < kPerWord<T>; ++i) up[i] *= gate[i] * sigmoid(gate[i]);
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
        const float share = sigmoid(gate[i]), silu = gate[i] * share;
        gate[i] = grad[i] * up[i] * (share + silu * (1.0f - share));
        up[i] = grad[i] * silu;
    }
    gate_word = pack<T>(gate);
    up_word = pack<T>(up);
}

}  // namespace dsc
