// mla_prefill: attention over packed sequences whose values may be narrower than their keys (DeepSeek-V2,
// arXiv 2405.04434, eqs 9-19), forward and backward. What the kernels read and write; attention.h says the
// rest of the family.
//
// Sequence b is rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1] of the queries and the like of the keys. Where
// causal, the ends are aligned: query i of n_q sees keys 0 .. n_k - n_q + i. Query head h reads key head
// h / (H / G). Rows that belong to no sequence are neither read nor written.
//
// The work of a kernel is tiles: rows of one sequence and one head. Which tiles there are is known on the
// device alone, so a plan (mla_prefill_plan.h) lists them, those with the most work first.
#pragma once

#include "attention/mla_prefill_plan.h"
#include "core/device.h"
#include "core/dtype.h"

namespace dsc {

// Rows of one operand, [T, heads, width]: elements from one token, and from one head, to the next. Elements
// of a head lie side by side, and every step is a multiple of 16 bytes.
struct HeadRows {
    const void* data;
    int64_t token_stride, head_stride;
};

struct MlaPrefillPlanParams {
    const int32_t* cu_seqlens_q;  // [B + 1]
    const int32_t* cu_seqlens_k;  // [B + 1]
    int32_t* plan;                // [2 * (1 + most tiles) + B]
    int64_t num_queries, num_keys;
    int num_sequences;
    PrefillTiling tiling;
};

struct MlaPrefillParams {
    HeadRows q, k, v;             // [Tq, H, d], [Tk, G, d], [Tk, G, v]
    const int32_t* cu_seqlens_q;  // [B + 1]
    const int32_t* cu_seqlens_k;  // [B + 1]
    int32_t* plan;                // scratch [prefill_plan_size(Tq, B)]
    void* out;                    // [Tq, H, v], contiguous
    float* lse;                   // [Tq, H]: -inf for a query that sees nothing, whose out is 0
    int64_t num_queries, num_keys;
    int num_sequences, num_heads, num_key_heads, width, value_width;
    float scale;  // multiplies the scores
    bool causal;
    FloatType dtype;  // bfloat16 or float16
};

// Gradients of out to q, k and v. lse carries none. Those of rows that belong to no sequence are 0.
struct MlaPrefillBackwardParams {
    HeadRows q, k, v, grad_out;   // [Tq, H, d], [Tk, G, d], [Tk, G, v], [Tq, H, v]
    const void* out;              // [Tq, H, v], contiguous, as the forward pass left it
    const float* lse;             // [Tq, H]
    const int32_t* cu_seqlens_q;  // [B + 1]
    const int32_t* cu_seqlens_k;  // [B + 1]
    int32_t* plan;                // scratch [prefill_plan_size(max(Tq, Tk), B)]
    float* row_values;            // scratch [2, H, Tq]: log2(e) * lse, and delta = sum(grad_out * out)
    float* sums_q;                // scratch, see mla_prefill_rows.h: sums of grad_q; none where deterministic
    void* grad_q;                 // [Tq, H, d], contiguous
    void* grad_k;                 // [Tk, G, d]
    void* grad_v;                 // [Tk, G, v]
    int64_t num_queries, num_keys;
    int num_sequences, num_heads, num_key_heads, width, value_width;
    float scale;
    bool causal;
    bool deterministic;  // the same bits every time: grad_q is summed by its own kernel, not by atomics
    FloatType dtype;
};

// kAuto: what is proven on the device. kSm80Keys32 and kSm80Keys64 are kSm80 with blocks of so many keys in
// the forward pass, whatever the device has room for. Those behind kSm90 are the steps of its bring-up in the
// forward pass (docs/mla_prefill_sm90.md).
enum class PrefillArch {
    kAuto,
    kSm80,
    kSm80Keys32,
    kSm80Keys64,
    kSm90,
    kSm90OneStage,
    kSm90OneTile,
    kSm90WithoutTurns
};

// Whether a GPU has run the forward kernel of sm_90a and its tests passed: until then kAuto takes that of
// sm_80.
constexpr bool kMlaPrefillSm90IsProven = false;

void launch_mla_prefill_plan(const MlaPrefillPlanParams& p, cudaStream_t stream);

void launch_mla_prefill(const MlaPrefillParams& p, PrefillArch arch, cudaStream_t stream);
void launch_mla_prefill_backward(const MlaPrefillBackwardParams& p, PrefillArch arch, cudaStream_t stream);

}  // namespace dsc
