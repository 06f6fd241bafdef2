// The two memory-bound kernels round the gradients of prefill attention (mla_prefill_rows.h).
//
// row_values reads a head's row of dO and of the output on 16 lanes and turns what it finds, [Tq, H] by its
// order of work, into [H, Tq]: 32 tokens by 8 heads a block, through shared memory. The zeros that the sums
// of grad_q begin with, and those of rows of no sequence, are dealt out to all blocks alike.
// round_sums reads sums where the warps left them and writes whole sectors: 8 rows by 4 words a warp.
#include "attention/mla_prefill_rows.h"

#include <algorithm>
#include <limits>

#include "core/check.h"
#include "core/launch.h"
#include "core/math.h"
#include "core/overlap.h"
#include "core/vec.h"
#include "core/warp.h"

namespace dsc {
namespace {

constexpr int kNumThreads = 256, kMinBlocks = 4;   // of an SM: enough loads in flight
constexpr int kBlockTokens = 32, kBlockHeads = 8;  // a thread for each pair
constexpr int kValueWidth = 128, kRowLanes = kValueWidth / kPerWord<__half>;
constexpr float kLog2E = 1.4426950408889634f, kInfinity = std::numeric_limits<float>::infinity();
static_assert(kBlockTokens * kBlockHeads == kNumThreads and kNumThreads / kWarpSize == kBlockHeads);

// ---- device ----

// Zeros from word `first` up to `end`, dealt out to all blocks of the grid.
__device__ __forceinline__ void clear_words(void* words, int64_t first, int64_t end) {
    const int64_t num_blocks = int64_t{gridDim.x} * gridDim.y;
    const int64_t block = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
    for (int64_t i = first + block * kNumThreads + threadIdx.x; i < end; i += num_blocks * kNumThreads) {
        static_cast<Word*>(words)[i] = make_uint4(0, 0, 0, 0);
    }
}

// Of a gradient [num_rows, heads, width], the rows ahead of the first sequence and behind the last one.
__device__ __forceinline__ void clear_stray_rows(void* grad, const int32_t* cu_seqlens, int num_sequences,
                                                 int64_t num_rows, int64_t row_elements) {
    const int64_t row_words = row_elements / kPerWord<__half>;
    const int begin = prefill_end(cu_seqlens[0], 0, num_rows);
    const int end = prefill_end(cu_seqlens[num_sequences], begin, num_rows);
    clear_words(grad, 0, begin * row_words);
    clear_words(grad, end * row_words, num_rows * row_words);
}

// sum(dO * out) of a row, on its 16 lanes.
template <typename T>
__device__ __forceinline__ float dot_row(const Word& grad_word, const Word& out_word) {
    float grad[kPerWord<T>], out[kPerWord<T>];
    unpack<T>(grad_word, grad);
    unpack<T>(out_word, out);
    float sum = 0.0f;
    DSC_UNROLL
    for (int i = 0; i < kPerWord<T>; ++i) sum += grad[i] * out[i];
    return row_sum<kRowLanes>(sum);
}

// The block's deltas, [token][head].
template <typename T>
__device__ __forceinline__ void sum_rows(const MlaPrefillBackwardParams& p, int64_t first_token,
                                         int first_head, float (*delta)[kBlockHeads + 1]) {
    constexpr int kRoundRows = kNumThreads / kRowLanes, kUnrolled = 4;
    const int lane = threadIdx.x % kRowLanes;
    for (int first = 0; first < kBlockTokens * kBlockHeads; first += kUnrolled * kRoundRows) {
        Word grad[kUnrolled], out[kUnrolled];
        DSC_UNROLL
        for (int i = 0; i < kUnrolled; ++i) {
            const int row = first + i * kRoundRows + threadIdx.x / kRowLanes;
            const int64_t token = first_token + row / kBlockHeads;
            const int head = first_head + row % kBlockHeads;
            grad[i] = out[i] = make_uint4(0, 0, 0, 0);
            if (token >= p.num_queries or head >= p.num_heads) continue;
            const T* const grad_row = static_cast<const T*>(p.grad_out.data) +
                                      token * p.grad_out.token_stride + head * p.grad_out.head_stride;
            const T* const out_row =
                static_cast<const T*>(p.out) + (token * p.num_heads + head) * kValueWidth;
            grad[i] = reinterpret_cast<const Word*>(grad_row)[lane];
            out[i] = reinterpret_cast<const Word*>(out_row)[lane];
        }
        DSC_UNROLL
        for (int i = 0; i < kUnrolled; ++i) {
            const int row = first + i * kRoundRows + threadIdx.x / kRowLanes;
            const float sum = dot_row<T>(grad[i], out[i]);
            if (lane == 0) delta[row / kBlockHeads][row % kBlockHeads] = sum;
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kNumThreads, kMinBlocks)
    mla_prefill_row_values_kernel(const MlaPrefillBackwardParams p, const int64_t num_sum_words) {
    DSC_SHARED(float[2][kBlockTokens][kBlockHeads + 1], values);
    const int thread = threadIdx.x;
    const int64_t first_token = int64_t{blockIdx.x} * kBlockTokens;
    const int first_head = blockIdx.y * kBlockHeads;
    wait_for_previous_kernel();
    const int64_t lse_token = first_token + thread / kBlockHeads;
    const int lse_head = first_head + thread % kBlockHeads;
    float lse = -kInfinity;
    if (lse_token < p.num_queries and lse_head < p.num_heads) lse = p.lse[lse_token * p.num_heads + lse_head];
    sum_rows<T>(p, first_token, first_head, values[1]);
    let_next_kernel_start();

    // A query that sees nothing has weights exp2(s - inf) = 0.
    values[0][thread / kBlockHeads][thread % kBlockHeads] = lse == -kInfinity ? kInfinity : lse * kLog2E;
    __syncthreads();
    const int64_t token = first_token + thread % kBlockTokens;
    const int head = first_head + thread / kBlockTokens;
    if (token < p.num_queries and head < p.num_heads) {
        float* const target = p.row_values + head * p.num_queries + token;
        target[0] = values[0][thread % kBlockTokens][thread / kBlockTokens];
        target[p.num_heads * p.num_queries] = values[1][thread % kBlockTokens][thread / kBlockTokens];
    }

    clear_words(p.sums_q, 0, num_sum_words);
    clear_stray_rows(p.grad_q, p.cu_seqlens_q, p.num_sequences, p.num_queries,
                     int64_t{p.num_heads} * p.width);
    clear_stray_rows(p.grad_k, p.cu_seqlens_k, p.num_sequences, p.num_keys,
                     int64_t{p.num_key_heads} * p.width);
    clear_stray_rows(p.grad_v, p.cu_seqlens_k, p.num_sequences, p.num_keys,
                     int64_t{p.num_key_heads} * p.value_width);
}

// The last sequence whose sums begin in block `block` or ahead of it; the first one where there is none.
__device__ __forceinline__ int find_sequence(const MlaPrefillBackwardParams& p, int64_t block) {
    int low = 0, high = p.num_sequences - 1;
    while (low < high) {
        const int middle = low + (high - low + 1) / 2;
        if (first_sum_block(prefill_end(p.cu_seqlens_q[middle], 0, p.num_queries), middle) <= block) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// Columns 8 * n and on of a row of sums: the even ones are neighbours, and so are the odd ones.
template <typename T>
__device__ __forceinline__ Word gathered(const float4& even, const float4& odd, float factor) {
    return make_uint4(
        rounded_pair<T>(even.x * factor, odd.x * factor), rounded_pair<T>(even.y * factor, odd.y * factor),
        rounded_pair<T>(even.z * factor, odd.z * factor), rounded_pair<T>(even.w * factor, odd.w * factor));
}

// Block: 16 rows of one sequence and 8 heads, a warp each.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kNumThreads, kMinBlocks)
    mla_prefill_round_sums_kernel(const MlaPrefillBackwardParams p) {
    constexpr int kWarpWords = 4, kGroups = kWidth / (kWarpWords * kPerWord<T>);
    const int lane = threadIdx.x % kWarpSize, line = lane % 8, word = lane / 8;
    const int head = blockIdx.y * kBlockHeads + threadIdx.x / kWarpSize;
    const int64_t block = blockIdx.x;
    wait_for_previous_kernel();
    if (head >= p.num_heads) return;
    const int sequence_idx = find_sequence(p, block);
    const int first_query = prefill_end(p.cu_seqlens_q[sequence_idx], 0, p.num_queries);
    const int end_query = prefill_end(p.cu_seqlens_q[sequence_idx + 1], first_query, p.num_queries);
    const int64_t first_block = first_sum_block(first_query, sequence_idx);
    const int64_t first_row = first_query + (block - first_block) * kSumRows;
    if (block < first_block or first_row >= end_query) return;
    const float* const sums = p.sums_q + (block * p.num_heads + head) * kSumRows * kWidth;
    DSC_UNROLL
    for (int half = 0; half < 2; ++half) {
        float4 even[kGroups], odd[kGroups];
        DSC_UNROLL
        for (int i = 0; i < kGroups; ++i) {
            const int column = i * kWarpWords + word;  // in words
            const int at = sum_place(column / 2, column % 2 * 4 + 2 * half, 4 * line);
            even[i] = *reinterpret_cast<const float4*>(sums + at);
            odd[i] = *reinterpret_cast<const float4*>(sums + at + kWarpSize);
        }
        if (half == 1) let_next_kernel_start();
        const int64_t row = first_row + 8 * half + line;
        if (row >= end_query) continue;
        Word* const target =
            reinterpret_cast<Word*>(static_cast<T*>(p.grad_q) + (row * p.num_heads + head) * kWidth);
        DSC_UNROLL
        for (int i = 0; i < kGroups; ++i) {
            target[i * kWarpWords + word] = gathered<T>(even[i], odd[i], p.scale);
        }
    }
}

// ---- host ----

template <typename Function>
void with_half_type(FloatType type, const Function& function) {
    if (type == FloatType::kBfloat16) return function.template operator()<__nv_bfloat16>();
    function.template operator()<__half>();
}

dim3 blocks_of(int64_t num_blocks, int num_heads) {
    constexpr int kMostHeads = 65535 * kBlockHeads;  // as high as a grid may be
    DSC_CHECK(num_heads <= kMostHeads, "mla_prefill backward: at most ", kMostHeads, " heads, got ",
              num_heads);
    DSC_CHECK(num_blocks <= std::numeric_limits<int>::max(), "mla_prefill backward: too many blocks, ",
              num_blocks);
    return dim3(static_cast<unsigned>(std::max(num_blocks, int64_t{1})),
                static_cast<unsigned>(std::max(ceil_div(num_heads, kBlockHeads), 1)));
}

}  // namespace

void launch_mla_prefill_row_values(const MlaPrefillBackwardParams& p, cudaStream_t stream) {
    DSC_CHECK(p.value_width == kValueWidth, "mla_prefill backward: values must be ", kValueWidth,
              " wide, got ", p.value_width);
    const int64_t num_sums =
        p.deterministic ? 0
                        : num_sum_blocks(p.num_queries, p.num_sequences) * kSumRows * p.num_heads * p.width;
    with_half_type(p.dtype, [&]<typename T>() {
        launch_overlapped(mla_prefill_row_values_kernel<T>,
                          blocks_of(ceil_div<int64_t>(p.num_queries, kBlockTokens), p.num_heads),
                          dim3(kNumThreads), 0, stream, p, num_sums / kPerWord<float>);
    });
}

void launch_mla_prefill_round_sums(const MlaPrefillBackwardParams& p, cudaStream_t stream) {
    const dim3 grid = blocks_of(num_sum_blocks(p.num_queries, p.num_sequences), p.num_heads);
    if (p.num_queries == 0 or p.num_sequences == 0) return;
    with_half_type(p.dtype, [&]<typename T>() {
        const auto start = [&](auto kernel) {
            launch_overlapped(kernel, grid, dim3(kNumThreads), 0, stream, p);
        };
        if (p.width == 192) return start(mla_prefill_round_sums_kernel<T, 192>);
        start(mla_prefill_round_sums_kernel<T, 128>);
    });
}

}  // namespace dsc
