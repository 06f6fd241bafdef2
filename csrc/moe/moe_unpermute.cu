// The way back from expert order to tokens (moe.h), and its gradient (DeepSeek-V2, arXiv 2405.04434, eq 20).
//
// Both are bound by memory, and by latency unless enough of it is in flight: a thread issues the loads of all
// K rows before it uses the first. Rows of experts are read once and past the cache. The sum runs over k in
// order, in float32 registers; the products of the weight gradient are summed along the row in an order that
// the shape alone decides. No atomics: the same bits every time.
#include "core/check.h"
#include "core/warp.h"
#include "moe/moe_rows.h"

namespace dsc {
namespace {

constexpr int kMaxWarps = kRowMaxColumns / kWarpSize;

// ---- device ----

// One word of each of the token's rows, all loads in flight at once; zero where there is no row.
template <int kMaxTopk>
__device__ __forceinline__ void load_words(const Word* rows, const int (&row)[kMaxTopk], int64_t num_words,
                                           int64_t word, Word (&words)[kMaxTopk]) {
    DSC_UNROLL
    for (int k = 0; k < kMaxTopk; ++k) {
        words[k] = make_uint4(0, 0, 0, 0);
        if (row[k] != kNoRow) words[k] = __ldcs(rows + row[k] * num_words + word);
    }
}

// The weights of a token's rows, 0 where there is no row: what a dropped choice's weight is does not matter.
template <int kMaxTopk>
__device__ __forceinline__ void load_weights(const float* weight_TK, int64_t token, int num_topk,
                                             const int (&row)[kMaxTopk], float (&weight)[kMaxTopk]) {
    DSC_UNROLL
    for (int k = 0; k < kMaxTopk; ++k) {
        weight[k] = row[k] != kNoRow ? 1.0f : 0.0f;
        if (row[k] != kNoRow and weight_TK != nullptr) weight[k] = weight_TK[token * num_topk + k];
    }
}

template <typename T, int kMaxTopk>
__global__ void __launch_bounds__(kRowMaxColumns)
    moe_unpermute_kernel(const MoeUnpermuteParams p, const RowTiles tiles) {
    const int64_t token = static_cast<int64_t>(blockIdx.x / tiles.num_tiles) * tiles.tokens + threadIdx.y;
    const int64_t word = static_cast<int64_t>(blockIdx.x % tiles.num_tiles) * tiles.columns + threadIdx.x;
    wait_for_previous_kernel();
    if (token >= p.num_tokens or word >= tiles.num_words) return;

    int row[kMaxTopk];
    float weight[kMaxTopk];
    Word words[kMaxTopk];
    load_rows(p.row, token, p.num_topk, p.num_tokens * p.num_topk, row);
    load_words(static_cast<const Word*>(p.y), row, tiles.num_words, word, words);
    load_weights(p.weight, token, p.num_topk, row, weight);
    let_next_kernel_start();

    float sum[kPerWord<T>] = {};
    DSC_UNROLL
    for (int k = 0; k < kMaxTopk; ++k) {
        float values[kPerWord<T>];
        unpack<T>(words[k], values);
        DSC_UNROLL
        for (int i = 0; i < kPerWord<T>; ++i) sum[i] += weight[k] * values[i];
    }
    static_cast<Word*>(p.out)[token * tiles.num_words + word] = pack<T>(sum);
}

// One word of a token's gradient: to all its rows, and into the products with what the rows held.
template <typename T, int kMaxTopk>
__device__ __forceinline__ void spread_word(const Word& grad, const Word (&y)[kMaxTopk],
                                            const float (&weight)[kMaxTopk], const int (&row)[kMaxTopk],
                                            Word* grad_y, int64_t num_words, float (&product)[kMaxTopk]) {
    float grads[kPerWord<T>];
    unpack<T>(grad, grads);
    DSC_UNROLL
    for (int k = 0; k < kMaxTopk; ++k) {
        float values[kPerWord<T>];
        unpack<T>(y[k], values);
        DSC_UNROLL
        for (int i = 0; i < kPerWord<T>; ++i) {
            product[k] += grads[i] * values[i];
            values[i] = weight[k] * grads[i];
        }
        if (row[k] != kNoRow) __stcs(grad_y + row[k] * num_words, pack<T>(values));
    }
}

// Blocks of the backward kernel that an SM must have room for: enough loads in flight, as far as the K rows a
// thread holds leave registers for it.
template <int kMaxTopk>
constexpr int kMinBlocks = kMaxTopk <= 6 ? 3 : 1;

// A block holds whole rows of its tokens, and whole warps of each.
template <typename T, int kMaxTopk>
__global__ void __launch_bounds__(kRowMaxColumns, kMinBlocks<kMaxTopk>)
    moe_unpermute_backward_kernel(const MoeUnpermuteBackwardParams p, const RowTiles tiles) {
    DSC_SHARED(float[kMaxWarps][kMaxTopk], warp_product);
    const int64_t token = static_cast<int64_t>(blockIdx.x) * tiles.tokens + threadIdx.y;
    const int64_t end_word = token < p.num_tokens ? tiles.num_words : 0;
    const int64_t num_rows = p.num_tokens * p.num_topk;
    const Word* const grad = static_cast<const Word*>(p.grad) + token * tiles.num_words;
    Word* const grad_y = static_cast<Word*>(p.grad_y);
    wait_for_previous_kernel();

    int row[kMaxTopk];
    float weight[kMaxTopk];
    load_rows(p.row, token, token < p.num_tokens ? p.num_topk : 0, num_rows, row);
    load_weights(p.weight, token, p.num_topk, row, weight);
    const int64_t num_used = num_used_rows(p.offsets, p.num_experts);
    float product[kMaxTopk] = {};
    for (int64_t word = threadIdx.x; word < end_word; word += tiles.columns) {
        Word y[kMaxTopk];
        const Word grad_word = grad[word];
        load_words(static_cast<const Word*>(p.y), row, tiles.num_words, word, y);
        spread_word<T>(grad_word, y, weight, row, grad_y + word, tiles.num_words, product);
    }
    let_next_kernel_start();
    for (int64_t unused = num_used + token; unused < num_rows; unused += p.num_tokens) {
        zero_words(grad_y + unused * tiles.num_words, threadIdx.x, end_word, tiles.columns);
    }

    // The products, over the lanes of each warp and then over the token's warps in order.
    const int num_warps = tiles.columns / kWarpSize;
    const int first_warp = threadIdx.y * num_warps;
    const int lane = threadIdx.x % kWarpSize;
    DSC_UNROLL
    for (int k = 0; k < kMaxTopk; ++k) {
        const float sum = row_sum<kWarpSize>(product[k]);
        if (lane == 0) warp_product[first_warp + threadIdx.x / kWarpSize][k] = sum;
    }
    __syncthreads();
    const int own = threadIdx.x;  // the thread's choice
    if (token >= p.num_tokens or own >= p.num_topk) return;
    float sum = 0.0f;
    for (int warp = 0; warp < num_warps; ++warp) sum += warp_product[first_warp + warp][own];
    p.grad_weight[token * p.num_topk + own] = sum;
}

// ---- host ----

}  // namespace

void launch_moe_unpermute(const MoeUnpermuteParams& p, cudaStream_t stream) {
    constexpr const char* kOp = "moe_unpermute";
    check_limits(kOp, "y", p);
    check_aligned(kOp, "y", p.y);
    check_aligned(kOp, "out", p.out);
    if (p.num_tokens == 0 or p.width == 0) return;
    const RowTiles tiles = plan_row_tiles(words_of_row(p), 1, 1);
    with_float_type(p.dtype, [&]<typename T>() {
        with_max_topk(p.num_topk, [&]<int kMaxTopk>() {
            launch_overlapped(moe_unpermute_kernel<T, kMaxTopk>, tiles.grid(p.num_tokens, tiles.num_tiles),
                              tiles.block(), 0, stream, p, tiles);
        });
    });
}

void launch_moe_unpermute_backward(const MoeUnpermuteBackwardParams& p, cudaStream_t stream) {
    constexpr const char* kOp = "moe_unpermute backward";
    check_limits(kOp, "y", p);
    check_aligned(kOp, "grad", p.grad);
    check_aligned(kOp, "y", p.y);
    check_aligned(kOp, "grad_y", p.grad_y);
    if (p.num_tokens == 0 or p.num_topk == 0) return;
    const RowTiles tiles = plan_row_tiles(words_of_row(p), 1, kWarpSize);
    with_float_type(p.dtype, [&]<typename T>() {
        with_max_topk(p.num_topk, [&]<int kMaxTopk>() {
            launch_overlapped(moe_unpermute_backward_kernel<T, kMaxTopk>, tiles.grid(p.num_tokens, 1),
                              tiles.block(), 0, stream, p, tiles);
        });
    });
}

}  // namespace dsc
