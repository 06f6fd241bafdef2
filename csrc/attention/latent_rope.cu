// latent_rope, latent_append and the gradient (attention.h): the RMSNorm of the latent, and the rotation of
// the shared key and of the queries (DeepSeek-V2, arXiv 2405.04434, eqs 9-15), in one launch.
//
// The first blocks of a grid have rows of latents, a warp each: its lanes hold the whole latent in registers
// between the sum of squares and the product, so that it is read once. The other blocks have the words of the
// query (rotary.cuh). The two meet nowhere, and one wave of blocks holds both.
//
// The gradient of the weight is a sum over all tokens. Warps add up theirs in registers, a block its warps'
// in shared memory, a second launch the blocks': each time in an order that the number of tokens alone
// decides. No atomics: the same bits every time.
#include <algorithm>

#include "attention/rotary.cuh"
#include "core/warp.h"

namespace dsc {
namespace {

constexpr int kNumWarps = kRotaryThreads / kWarpSize;
constexpr int64_t kMaxPartials = 128;  // about one block an SM, and few enough to add up

// A lane's words of the latent: word, word + kWarpSize, ..
template <typename T>
constexpr int kRowWords = kLatentWidth / kWarpSize / kPerWord<T>;

// ---- device ----

template <typename T>
__device__ __forceinline__ const Word* word_of(const void* rows, int64_t element) {
    return reinterpret_cast<const Word*>(static_cast<const T*>(rows) + element);
}

template <typename T>
__device__ __forceinline__ Word* word_of(void* rows, int64_t element) {
    return reinterpret_cast<Word*>(static_cast<T*>(rows) + element);
}

// Behind the row's end there are zeros.
template <typename T>
__device__ __forceinline__ void load_row(const Word* row, int width, Word (&words)[kRowWords<T>]) {
    DSC_UNROLL
    for (int i = 0; i < kRowWords<T>; ++i) {
        const int word = threadIdx.x % kWarpSize + i * kWarpSize;
        words[i] = make_uint4(0, 0, 0, 0);
        if (word * kPerWord<T> < width) words[i] = row[word];
    }
}

// The weights of a word of the latent.
template <typename T>
__device__ __forceinline__ void load_weight(const void* weight, bool is_float32, int word,
                                            float (&values)[kPerWord<T>]) {
    if (not is_float32) return unpack<T>(static_cast<const Word*>(weight)[word], values);
    load_floats(static_cast<const float*>(weight) + word * kPerWord<T>, values);
}

// The shared key: the lanes of a warp have a word each.
template <typename T>
__device__ __forceinline__ void turn_key(const Angles& angles, int64_t token, const Word* from, Word* to) {
    const int num_words = 2 * angles.num_pairs / kPerWord<T>;
    for (int word = threadIdx.x % kWarpSize; word < num_words; word += kWarpSize) {
        Word words[1] = {from[word]};
        constexpr int kPairs = Neighbours<T>::kPairs;
        Neighbours<T>::turn(words, load_turn<kPairs>(angles, angles.positions[token], word * kPairs));
        to[word] = words[0];
    }
}

// What a warp makes of a token's latent and shared key; scale: 1 / rms, or nullptr.
template <typename T, typename Params>
__device__ __forceinline__ void write_row(const Params& p, const Angles& angles, int64_t token, Word* row,
                                          float* scale) {
    const int width = p.latent_width, lane = threadIdx.x % kWarpSize;
    const Word* const latent = word_of<T>(p.latent, token * p.latent_token_stride);
    Word words[kRowWords<T>];
    load_row<T>(latent, width, words);
    turn_key<T>(angles, token, latent + width / kPerWord<T>, row + width / kPerWord<T>);
    let_next_kernel_start();

    float squares = 0.0f;
    DSC_UNROLL
    for (int i = 0; i < kRowWords<T>; ++i) {
        float values[kPerWord<T>];
        unpack<T>(words[i], values);
        DSC_UNROLL
        for (int j = 0; j < kPerWord<T>; ++j) squares += values[j] * values[j];
    }
    const float factor = 1.0f / sqrtf(row_sum<kWarpSize>(squares) * (1.0f / width) + p.eps);
    if (scale != nullptr and lane == 0) *scale = factor;
    DSC_UNROLL
    for (int i = 0; i < kRowWords<T>; ++i) {
        const int word = lane + i * kWarpSize;
        if (word * kPerWord<T> >= width) continue;
        float values[kPerWord<T>], weight[kPerWord<T>];
        unpack<T>(words[i], values);
        load_weight<T>(p.weight, p.is_weight_float32, word, weight);
        DSC_UNROLL
        for (int j = 0; j < kPerWord<T>; ++j) values[j] = values[j] * factor * weight[j];
        row[word] = pack<T>(values);
    }
}

template <typename T>
__global__ void __launch_bounds__(kRotaryThreads)
    latent_rope_kernel(const LatentRopeParams p, const HeadUnits units, int num_row_blocks) {
    const Angles angles = angles_of(p, p.rope_width, false);
    const int64_t token = static_cast<int64_t>(blockIdx.x) * kNumWarps + threadIdx.x / kWarpSize;
    const int row_width = p.latent_width + p.rope_width, head_width = p.nope_width + p.rope_width;
    wait_for_previous_kernel();
    if (static_cast<int>(blockIdx.x) < num_row_blocks) {
        if (token >= p.num_tokens) return;
        float* const scale = p.scale_out == nullptr ? nullptr : p.scale_out + token;
        return write_row<T>(p, angles, token, word_of<T>(p.row_out, token * row_width), scale);
    }
    turn_units<Neighbours<T>>(
        angles, units, blockIdx.x - num_row_blocks,
        [&](const UnitPlace& at) {
            return static_cast<const T*>(p.query) + at.token * p.query_token_stride + at.head * head_width +
                   at.unit * kPerWord<T>;
        },
        [&](const UnitPlace& at) {
            return static_cast<T*>(p.query_out) + (at.token * p.num_heads + at.head) * head_width +
                   at.unit * kPerWord<T>;
        });
}

template <typename T>
__global__ void __launch_bounds__(kRotaryThreads)
    latent_append_kernel(const LatentAppendParams p, const HeadUnits units, int num_row_blocks) {
    const Angles angles = angles_of(p, p.rope_width, false);
    const int64_t token = static_cast<int64_t>(blockIdx.x) * kNumWarps + threadIdx.x / kWarpSize;
    const int row_width = p.latent_width + p.rope_width, head_width = p.nope_width + p.rope_width;
    wait_for_previous_kernel();
    if (static_cast<int>(blockIdx.x) < num_row_blocks) {
        const int64_t slot = token < p.num_tokens ? p.slots[token] : -1;
        if (slot < 0 or slot >= p.num_slots) return;
        return write_row<T>(p, angles, token, word_of<T>(p.cache, slot * row_width), nullptr);
    }
    turn_units<Neighbours<T>>(
        angles, units, blockIdx.x - num_row_blocks,
        [&](const UnitPlace& at) {
            return static_cast<const T*>(p.query) + at.token * p.query_token_stride + at.head * head_width +
                   p.nope_width + at.unit * kPerWord<T>;
        },
        [&](const UnitPlace& at) {
            return static_cast<T*>(p.query_out) + (at.token * p.num_heads + at.head) * row_width +
                   p.latent_width + at.unit * kPerWord<T>;
        });
}

// The gradient of a token's latent and key, and the token's part of the weight's: with y = x s w and
// s = (mean(x^2) + eps)^-1/2, grad x = s (g w - x s^2 mean(g w x)) and grad w = g x s.
template <typename T>
__device__ __forceinline__ void write_row_gradient(const LatentRopeBackwardParams& p, const Angles& angles,
                                                   int64_t token,
                                                   float (&grad_weight)[kRowWords<T>][kPerWord<T>]) {
    const int width = p.latent_width, lane = threadIdx.x % kWarpSize;
    const int64_t row = token * (width + p.rope_width);
    const Word* const grad_row = word_of<T>(p.grad_row, row);
    Word* const grad_latent = word_of<T>(p.grad_latent, row);
    Word latent[kRowWords<T>], grad[kRowWords<T>];
    load_row<T>(word_of<T>(p.latent, token * p.latent_token_stride), width, latent);
    load_row<T>(grad_row, width, grad);
    const float scale = p.scale[token];
    turn_key<T>(angles, token, grad_row + width / kPerWord<T>, grad_latent + width / kPerWord<T>);

    float x[kRowWords<T>][kPerWord<T>], along[kRowWords<T>][kPerWord<T>], product = 0.0f;
    DSC_UNROLL
    for (int i = 0; i < kRowWords<T>; ++i) {
        const int word = lane + i * kWarpSize;
        float weight[kPerWord<T>] = {};
        if (word * kPerWord<T> < width) load_weight<T>(p.weight, p.is_weight_float32, word, weight);
        unpack<T>(latent[i], x[i]);
        unpack<T>(grad[i], along[i]);
        DSC_UNROLL
        for (int j = 0; j < kPerWord<T>; ++j) {
            grad_weight[i][j] += along[i][j] * x[i][j] * scale;
            along[i][j] *= weight[j];
            product += along[i][j] * x[i][j];
        }
    }
    const float factor = -row_sum<kWarpSize>(product) * scale * scale * (1.0f / width);
    DSC_UNROLL
    for (int i = 0; i < kRowWords<T>; ++i) {
        const int word = lane + i * kWarpSize;
        DSC_UNROLL
        for (int j = 0; j < kPerWord<T>; ++j) along[i][j] = (along[i][j] + x[i][j] * factor) * scale;
        if (word * kPerWord<T> < width) grad_latent[word] = pack<T>(along[i]);
    }
}

template <typename T>
__global__ void __launch_bounds__(kRotaryThreads)
    latent_rope_backward_kernel(const LatentRopeBackwardParams p, const HeadUnits units) {
    DSC_SHARED(float[kNumWarps][kLatentWidth], sums);
    const Angles angles = angles_of(p, p.rope_width, true);
    const int warp = threadIdx.x / kWarpSize, head_width = p.nope_width + p.rope_width;
    wait_for_previous_kernel();
    if (static_cast<int>(blockIdx.x) >= p.num_partials) {
        const auto offset = [&](const UnitPlace& at) {
            return (at.token * p.num_heads + at.head) * head_width + at.unit * kPerWord<T>;
        };
        return turn_units<Neighbours<T>>(
            angles, units, blockIdx.x - p.num_partials,
            [&](const UnitPlace& at) { return static_cast<const T*>(p.grad_query) + offset(at); },
            [&](const UnitPlace& at) { return static_cast<T*>(p.grad_query_out) + offset(at); });
    }

    float grad_weight[kRowWords<T>][kPerWord<T>] = {};
    const int64_t step = static_cast<int64_t>(p.num_partials) * kNumWarps;
    for (int64_t token = static_cast<int64_t>(blockIdx.x) * kNumWarps + warp; token < p.num_tokens;
         token += step) {
        write_row_gradient<T>(p, angles, token, grad_weight);
    }
    let_next_kernel_start();

    // The warps' sums, in their order.
    DSC_UNROLL
    for (int i = 0; i < kRowWords<T>; ++i) {
        const int word = threadIdx.x % kWarpSize + i * kWarpSize;
        DSC_UNROLL
        for (int j = 0; j < kPerWord<T>; ++j) sums[warp][word * kPerWord<T> + j] = grad_weight[i][j];
    }
    __syncthreads();
    for (int column = threadIdx.x; column < p.latent_width; column += kRotaryThreads) {
        float sum = 0.0f;
        for (int i = 0; i < kNumWarps; ++i) sum += sums[i][column];
        p.partial_weight[static_cast<int64_t>(blockIdx.x) * p.latent_width + column] = sum;
    }
}

// A lane has a column, a warp every kNumWarps-th part.
__global__ void __launch_bounds__(kRotaryThreads)
    latent_weight_gradient_kernel(const LatentRopeBackwardParams p) {
    DSC_SHARED(float[kNumWarps][kWarpSize], sums);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int column = blockIdx.x * kWarpSize + lane;
    wait_for_previous_kernel();
    float sum = 0.0f;
    for (int partial = warp; partial < p.num_partials and column < p.latent_width; partial += kNumWarps) {
        sum += p.partial_weight[static_cast<int64_t>(partial) * p.latent_width + column];
    }
    let_next_kernel_start();
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 or column >= p.latent_width) return;
    for (int i = 1; i < kNumWarps; ++i) sum += sums[i][lane];
    p.grad_weight[column] = sum;
}

// ---- host ----

template <typename Params>
WordRows checked_rows(const char* op, const Params& p) {
    const WordRows rows{.op = op, .dtype = p.dtype};
    rows.check_width("the latent", p.latent_width);
    rows.check_width("the rotated part", p.rope_width);
    rows.check_width("the part of the query that is not rotated", p.nope_width);
    rows.check_stride("latent", p.latent_token_stride);
    DSC_CHECK(p.latent_width <= kLatentWidth, op, ": weight must have at most ", kLatentWidth,
              " elements, got ", p.latent_width);
    check_aligned(op, "latent", p.latent);
    check_aligned(op, "weight", p.weight);
    check_aligned(op, "cos", p.cos);
    check_aligned(op, "sin", p.sin);
    return rows;
}

int64_t num_row_blocks(int64_t num_tokens) {
    return ceil_div<int64_t>(num_tokens, kNumWarps);
}

}  // namespace

int latent_rope_num_partials(int64_t num_tokens) {
    return static_cast<int>(std::min(num_row_blocks(num_tokens), kMaxPartials));
}

void launch_latent_rope(const LatentRopeParams& p, cudaStream_t stream) {
    const WordRows rows = checked_rows("latent_rope", p);
    rows.check_stride("query", p.query_token_stride);
    check_aligned(rows.op, "query", p.query);
    check_aligned(rows.op, "query_out", p.query_out);
    check_aligned(rows.op, "row_out", p.row_out);
    if (p.num_tokens == 0) return;
    const int nope_words = p.nope_width / rows.per_word(), rope_words = p.rope_width / rows.per_word();
    const HeadUnits units = rows.units(p.num_tokens, p.num_heads, nope_words + rope_words, nope_words);
    const int64_t row_blocks = num_row_blocks(p.num_tokens);
    const dim3 grid(static_cast<unsigned>(row_blocks + units.num_blocks()));
    with_float_type(p.dtype, [&]<typename T>() {
        launch_overlapped(latent_rope_kernel<T>, grid, dim3(kRotaryThreads), 0, stream, p, units,
                          static_cast<int>(row_blocks));
    });
}

void launch_latent_append(const LatentAppendParams& p, cudaStream_t stream) {
    const WordRows rows = checked_rows("latent_append", p);
    rows.check_stride("query", p.query_token_stride);
    check_aligned(rows.op, "query", p.query);
    check_aligned(rows.op, "query_out", p.query_out);
    check_aligned(rows.op, "cache", p.cache);
    if (p.num_tokens == 0) return;
    const HeadUnits units = rows.units(p.num_tokens, p.num_heads, p.rope_width / rows.per_word(), 0);
    const int64_t row_blocks = num_row_blocks(p.num_tokens);
    const dim3 grid(static_cast<unsigned>(row_blocks + units.num_blocks()));
    with_float_type(p.dtype, [&]<typename T>() {
        launch_overlapped(latent_append_kernel<T>, grid, dim3(kRotaryThreads), 0, stream, p, units,
                          static_cast<int>(row_blocks));
    });
}

void launch_latent_rope_backward(const LatentRopeBackwardParams& p, cudaStream_t stream) {
    const WordRows rows = checked_rows("latent_rope backward", p);
    check_aligned(rows.op, "grad_query", p.grad_query);
    check_aligned(rows.op, "grad_row", p.grad_row);
    check_aligned(rows.op, "grad_query_out", p.grad_query_out);
    check_aligned(rows.op, "grad_latent", p.grad_latent);
    const int nope_words = p.nope_width / rows.per_word(), rope_words = p.rope_width / rows.per_word();
    const HeadUnits units = rows.units(p.num_tokens, p.num_heads, nope_words + rope_words, nope_words);
    if (p.num_tokens > 0) {
        const dim3 grid(static_cast<unsigned>(p.num_partials + units.num_blocks()));
        with_float_type(p.dtype, [&]<typename T>() {
            launch_overlapped(latent_rope_backward_kernel<T>, grid, dim3(kRotaryThreads), 0, stream, p,
                              units);
        });
    }
    if (p.latent_width > 0) {
        launch_overlapped(latent_weight_gradient_kernel, dim3(ceil_div(p.latent_width, kWarpSize)),
                          dim3(kRotaryThreads), 0, stream, p);
    }
}

}  // namespace dsc
