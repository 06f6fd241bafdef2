// The matrix product family: which kernels there are and what each reads and writes. Rows come in expert
// order; `offsets` holds each expert's END row and is read on the device alone: offsets that descend or leave
// [0, M] are clamped. Elements are bfloat16 or float16 (the params' type), sums are float32. K, N and F are
// multiples of 8, pointers of 16 bytes, sizes of rows fit an int32. How a call is cut into tiles is decided
// in grouped_gemm_plan.h.
#pragma once

#include "core/device.h"
#include "core/dtype.h"
#include "gemm/grouped_gemm_plan.h"

namespace dsc {

// Rows of x named by an index: row_idx[m] is the row of x [T, K] for row m. An index outside [0, T) reads as
// a row of zeros. Null: row m itself, and T = M.

// y[m] = x[m] @ w[e].T for the rows m of expert e; rows from offsets[E - 1] on are zero, and not read.
struct GroupedGemmParams {
    const void* x;                        // [T, K]
    const void* w;                        // [E, N, K]; with is_w_transposed [E, K, N], and y[m] = x[m] @ w[e]
    void* y;                              // [M, N]
    const int32_t* offsets;               // [E]
    const int32_t* row_idx;               // [M] or null
    int num_rows, num_source_rows;        // M, T
    int num_experts, num_columns, depth;  // E, N, K
    bool is_w_transposed;
    FloatType type;
};

// hidden[m] = silu(gate) * up with [gate, up] = x[m] @ w[e].T, each rounded before it is used.
struct GroupedSwigluParams {
    const void* x;                  // [T, K]
    const void* w;                  // [E, 2 F, K], the gate's rows first
    void* hidden;                   // [M, F]
    void* gate_up;                  // [M, 2 F], kept for the gradient; or null
    const int32_t* offsets;         // [E]
    const int32_t* row_idx;         // [M] or null
    int num_rows, num_source_rows;  // M, T
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
    int num_rows;
    int num_experts, width, depth;  // E, F, D
    FloatType type;
};

// grad_w[e] = sum over the rows m of expert e of grad[m]^T x[m]; zeros for an expert without rows.
struct GroupedWeightGradientParams {
    const void* grad;                     // [M, N]
    const void* x;                        // [T, K]
    void* grad_w;                         // [E, N, K], of the elements' type or float32
    const int32_t* offsets;               // [E]
    const int32_t* row_idx;               // [M] or null
    int num_rows, num_source_rows;        // M, T
    int num_experts, num_columns, depth;  // E, N, K
    bool is_float32;                      // grad_w's type
    bool accumulates;                     // onto what grad_w holds
    FloatType type;
};

void launch_grouped_gemm(const GroupedGemmParams& p, const GemmChoice& choice, cudaStream_t stream);
void launch_grouped_swiglu(const GroupedSwigluParams& p, const GemmChoice& choice, cudaStream_t stream);
void launch_grouped_swiglu_backward(const GroupedSwigluBackwardParams& p, const GemmChoice& choice,
                                    cudaStream_t stream);
void launch_grouped_weight_gradient(const GroupedWeightGradientParams& p, const GemmChoice& choice,
                                    cudaStream_t stream);

}  // namespace dsc
