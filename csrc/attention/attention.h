// The attention family: which kernels there are and what each reads and writes; those of prefill attention,
// forward and backward, are in mla_prefill.h.
#pragma once

#include "attention/mla_decode_plan.h"
#include "core/device.h"
#include "core/dtype.h"

namespace dsc {

// rope: pairs of a head's elements, rotated by the angles in row positions[t] of the tables (RoFormer, arXiv
// 2104.09864, eq 34). Arithmetic in float32. The rows of q and k may lie apart, their elements may not.
struct RopeParams {
    const void* q;             // [T, H, r], token and head strides below
    const void* k;             // [T, G, r]
    void* q_out;               // [T, H, r], contiguous
    void* k_out;               // [T, G, r], contiguous
    const float* cos;          // [L, r / 2]
    const float* sin;          // [L, r / 2]
    const int64_t* positions;  // [T]; a token whose position is not in [0, L) gets NaN
    int64_t q_token_stride, q_head_stride, k_token_stride, k_head_stride;  // elements
    int64_t num_tokens, num_positions;
    int num_q_heads, num_k_heads, width;
    bool interleaved;  // pairs are neighbours (V2), else r / 2 apart (v1)
    bool inverse;      // rotates back: the gradient
    FloatType dtype;
};

void launch_rope(const RopeParams& p, cudaStream_t stream);

// latent_rope: what latent attention does to its projections before it attends (DeepSeek-V2, eqs 9-15): the
// latent's RMSNorm, and the rotation (neighbours) of the shared key and of each query head's last r elements.
struct LatentRopeParams {
    const void* query;         // [T, H, n + r], token stride below
    const void* latent;        // [T, C + r], token stride below: the latent, then the key before its rotation
    const void* weight;        // [C], of the norm; its type is below
    void* query_out;           // [T, H, n + r], contiguous: the first n as they were
    void* row_out;             // [T, C + r], contiguous: the normed latent, then the rotated key
    float* scale_out;          // [T], 1 / rms of the latent, for the backward pass; or nullptr
    const float* cos;          // [L, r / 2]
    const float* sin;          // [L, r / 2]
    const int64_t* positions;  // [T]
    int64_t query_token_stride, latent_token_stride;  // elements
    int64_t num_tokens, num_positions;
    int num_heads, nope_width, rope_width, latent_width;
    float eps;
    bool is_weight_float32;  // else of `dtype`
    FloatType dtype;
};

// The same while decoding: rows go to their slots of the paged cache, and rotated queries to the last r
// columns of rows whose first columns hold the query in the latent space.
struct LatentAppendParams {
    const void* query;         // [T, H, n + r], token stride below
    const void* latent;        // [T, C + r], token stride below
    const void* weight;        // [C]
    void* query_out;           // [T, H, C + r], contiguous: columns C and on are written
    void* cache;               // [P, L, C + r], contiguous
    const int64_t* slots;      // [T], row of the cache; one outside it is not written
    const float* cos;          // [positions, r / 2]
    const float* sin;          // [positions, r / 2]
    const int64_t* positions;  // [T]
    int64_t query_token_stride, latent_token_stride;  // elements
    int64_t num_tokens, num_positions, num_slots;
    int num_heads, nope_width, rope_width, latent_width;
    float eps;
    bool is_weight_float32;  // else of `dtype`
    FloatType dtype;
};

struct LatentRopeBackwardParams {
    const void* grad_query;       // [T, H, n + r], contiguous
    const void* grad_row;         // [T, C + r], contiguous
    const void* latent;           // [T, C + r], token stride below, as the forward pass read it
    const void* weight;           // [C]
    const float* scale;           // [T], as the forward pass wrote it
    void* grad_query_out;         // [T, H, n + r]
    void* grad_latent;            // [T, C + r]
    float* grad_weight;           // [C]
    float* partial_weight;        // scratch [num_partials, C], see latent_rope_num_partials
    const float* cos;             // [positions, r / 2]
    const float* sin;             // [positions, r / 2]
    const int64_t* positions;     // [T]
    int64_t latent_token_stride;  // elements
    int64_t num_tokens, num_positions;
    int num_heads, nope_width, rope_width, latent_width, num_partials;
    bool is_weight_float32;  // else of `dtype`
    FloatType dtype;
};

// Into how many sums the weight's gradient is divided: the same for the same number of tokens.
int latent_rope_num_partials(int64_t num_tokens);

void launch_latent_rope(const LatentRopeParams& p, cudaStream_t stream);
void launch_latent_append(const LatentAppendParams& p, cudaStream_t stream);
void launch_latent_rope_backward(const LatentRopeBackwardParams& p, cudaStream_t stream);

// mla_decode: absorbed latent attention of S new tokens per sequence over its pages (DeepSeek-V2, section 2.1
// and appendix C): scores over whole rows of the cache, values are their first C columns.
//
// A sequence's S * H queries are the rows of tiles of kDecodeRows, row s * H + h; its cache is cut into
// blocks of kDecodeBlock rows. The plan (mla_decode_plan.h) deals all sequences' blocks out to the parts of
// the grid; a sequence that several parts share leaves a partial result from each, which a second kernel adds
// up.
struct MlaDecodeParams {
    const void* q;              // [B, S, H, C + r], contiguous
    const void* cache;          // [P, L, C + r], page stride below
    const int32_t* page_table;  // [B, N], row stride below
    const int32_t* seq_lens;    // [B]
    const int32_t* plan;        // [parts + 1 + B, 2], see mla_decode_plan.h
    void* out;                  // [B, S, H, C]
    float* lse;                 // [B, S, H]
    float* partial_out;         // scratch [2 * parts, S * H, C], none for one part
    float* partial_lse;         // scratch [2 * parts, S * H]
    int64_t page_stride;        // elements
    int64_t table_stride;
    int num_sequences, num_new, num_heads;
    int num_pages, page_size, table_width;  // page_size: 16, 32, 64 or 128
    int num_parts;
    float scale;      // multiplies the scores
    FloatType dtype;  // bfloat16 or float16
};

// The last three are steps of bringing kSm90 up (docs/mla_decode_sm90.md).
enum class DecodeArch { kAuto, kSm80, kSm90, kSm90OneBuffer, kSm90InOrder, kSm90ScoresFirst };

struct MlaDecodePlanParams {
    const int32_t* seq_lens;  // [B]
    int32_t* plan;            // [parts + 1 + B, 2]
    int num_sequences, num_parts;
    int64_t most_rows;  // longer sequences count as this long: N * L
};

void launch_mla_decode_plan(const MlaDecodePlanParams& p, cudaStream_t stream);
// The decode kernel, then the one that adds up the parts.
void launch_mla_decode(const MlaDecodeParams& p, DecodeArch arch, cudaStream_t stream);

}  // namespace dsc
