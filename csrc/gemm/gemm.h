// The matrix product family: which kernels there are and what each reads and writes. Rows come in expert
// order; `offsets` holds each expert's END row and is read on the device alone. Elements are bfloat16 or
// float16 (the params' type), sums are float32. K, N and F are multiples of 8, pointers of 16 bytes.
#pragma once

#include "core/device.h"
#include "core/dtype.h"

namespace dsc {

constexpr int kGemmMaxExperts = 512;

// y[m] = x[m] @ w[e].T for the rows m of expert e; rows from offsets[E - 1] on are zero, and not read.
struct GroupedGemmParams {
    const void* x;                        // [M, K], or [T, K] with row_idx
    const void* w;                        // [E, N, K]; with is_w_transposed [E, K, N], and y[m] = x[m] @ w[e]
    void* y;                              // [M, N]
    const int32_t* offsets;               // [E]
    const int32_t* row_idx;               // [M], the row of x for each row of y; null: the same
    int64_t num_rows;                     // M
    int num_experts, num_columns, depth;  // E, N, K
    bool is_w_transposed;
    FloatType type;
};

// hidden[m] = silu(gate) * up with [gate, up] = x[m] @ w[e].T, each rounded before it is used.
struct GroupedSwigluParams {
    const void* x;           // [M, K], or [T, K] with row_idx
    const void* w;           // [E, 2 F, K], the gate's rows first
    void* hidden;            // [M, F]
    void* gate_up;           // [M, 2 F], kept for the gradient; or null
    const int32_t* offsets;  // [E]
    const int32_t* row_idx;  // [M] or null
    int64_t num_rows;
    int num_experts, width, depth;  // E, F, K
    FloatType type;
};

// The gradient of gate_up: grad_hidden[m] = grad[m] @ w[e] is never stored.
struct GroupedSwigluBackwardParams {
    const void* grad;        // [M, D]
    const void* w;           // [E, D, F], the projection after the SwiGLU
    const void* gate_up;     // [M, 2 F]
    void* grad_gate_up;      // [M, 2 F]
    const int32_t* offsets;  // [E]
    int64_t num_rows;
    int num_experts, width, depth;  // E, F, D
    FloatType type;
};

// grad_w[e] = sum over the rows m of expert e of grad[m]^T x[m]; zeros for an expert without rows.
struct GroupedWeightGradientParams {
    const void* grad;        // [M, N]
    const void* x;           // [M, K], or [T, K] with row_idx
    void* grad_w;            // [E, N, K], of the elements' type or float32
    const int32_t* offsets;  // [E]
    const int32_t* row_idx;  // [M] or null
    int64_t num_rows;
    int num_experts, num_columns, depth;  // E, N, K
    bool is_float32;                      // grad_w's type
    bool accumulates;                     // onto what grad_w holds
    FloatType type;
};

void launch_grouped_gemm(const GroupedGemmParams& p, cudaStream_t stream);
void launch_grouped_swiglu(const GroupedSwigluParams& p, cudaStream_t stream);
void launch_grouped_swiglu_backward(const GroupedSwigluBackwardParams& p, cudaStream_t stream);
void launch_grouped_weight_gradient(const GroupedWeightGradientParams& p, cudaStream_t stream);

}  // namespace dsc
