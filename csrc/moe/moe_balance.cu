// The balance losses of DeepSeek-V2 (arXiv 2405.04434, eqs 23-31): for a gate of one's own, and the launch
// that ends both this op and moe_gate_with_balance.
//
// First launch: a block adds up the probabilities and counts the choices of a chunk of one sequence's tokens
// (moe_gate_balance.cu does the same from the logits). Second launch: a block adds up the chunks of one group
// of experts of one sequence, which is all that a term's share of the group depends on; the block that
// finishes last adds up the shares. Every sum of floats is taken in an order that shapes alone decide.
#include <algorithm>

#include "core/dtype.h"
#include "core/launch.h"
#include "core/overlap.h"
#include "core/warp.h"
#include "moe/moe_balance.cuh"

namespace dsc {
namespace balance {
namespace {

constexpr int kNumThreads = 256;
constexpr int kFinishThreads = 512;  // at most: few blocks, each with many chunks to add up
constexpr int kMaxExperts = kMoeGateMaxExperts;
constexpr int kNumTerms = 3;

// A block as a table of threads, a column an expert, so that neighbours read neighbours: the most rows of
// `width` columns that fit. A wider row is taken in several passes.
struct Table {
    int num_columns, num_rows, row, column;
    bool has_place;

    __device__ __forceinline__ explicit Table(int width)
        : num_columns(min(width, static_cast<int>(blockDim.x))),
          num_rows(static_cast<int>(blockDim.x) / num_columns),
          row(static_cast<int>(threadIdx.x) / num_columns),
          column(static_cast<int>(threadIdx.x) % num_columns),
          has_place(row < num_rows) {}
};

// Adds up a column of the block's table in the order of its rows; the result is the first row's.
template <typename T>
__device__ __forceinline__ T column_sum(const Table& table, T value, T* values) {
    values[threadIdx.x] = value;
    __syncthreads();
    T sum{};
    if (table.row == 0) {
        for (int row = 0; row < table.num_rows; ++row) sum += values[row * table.num_columns + table.column];
    }
    __syncthreads();  // the next sum takes the same place
    return sum;
}

// ---- first launch ----

// Each choice of the chunk's tokens counts for its expert, and for its group unless an earlier one of the
// same token did.
__device__ __forceinline__ void count_choices(const int32_t* idx, const MoeBalanceParams& p,
                                              const Chunk& chunk, int* count) {
    const int group_width = p.num_experts / p.num_groups;
    const int64_t end = chunk.end * p.num_topk;
    for (int64_t i = chunk.first * p.num_topk + threadIdx.x; i < end; i += blockDim.x) {
        const int expert = idx[i];
        if (expert < 0 or expert >= p.num_experts) continue;
        const int group = expert / group_width;
        bool is_first = true;
        for (int64_t earlier = i - i % p.num_topk; earlier < i; ++earlier) {
            const int other = idx[earlier];
            if (other >= 0 and other < p.num_experts and other / group_width == group) is_first = false;
        }
        atomicAdd(&count[expert], 1);
        if (is_first) atomicAdd(&count[p.num_experts + group], 1);
    }
}

template <typename Float>
__global__ void __launch_bounds__(kNumThreads)
    moe_balance_tally_kernel(const Float* probs, const int32_t* idx, const MoeBalanceParams p) {
    DSC_SHARED(int[2 * kMaxExperts], count);
    DSC_SHARED(float[kNumThreads], values);
    const Chunk chunk = chunk_of_block(p);
    const Table table(p.num_experts);
    const int num_counts = p.num_experts + p.num_groups;
    for (int i = threadIdx.x; i < num_counts; i += kNumThreads) count[i] = 0;
    __syncthreads();

    wait_for_previous_kernel();
    let_next_kernel_start();
    if (blockIdx.x == 0 and threadIdx.x == 0) *p.num_finished = 0;
    count_choices(idx, p, chunk, count);
    for (int first = 0; first < p.num_experts; first += table.num_columns) {
        const int expert = first + table.column;
        const bool is_expert = table.has_place and expert < p.num_experts;
        float sum = 0.0f;
        for (int64_t t = chunk.first + table.row; is_expert and t < chunk.end; t += table.num_rows) {
            sum += static_cast<float>(probs[t * p.num_experts + expert]);
        }
        sum = column_sum(table, sum, values);
        if (is_expert and table.row == 0) {
            p.prob_sum[static_cast<int64_t>(blockIdx.x) * p.num_experts + expert] = sum;
        }
    }
    for (int i = threadIdx.x; i < num_counts; i += kNumThreads) {  // column_sum has waited for all counts
        p.count[static_cast<int64_t>(blockIdx.x) * num_counts + i] = count[i];
    }
}

// ---- second launch ----

// What the tokens of one sequence add up to for one group of experts.
struct GroupTotals {
    float prob_sum[kMaxExperts];
    int count[kMaxExperts];
    int group_count, num_sent;
};

__device__ __forceinline__ void add_chunks(const MoeBalanceParams& p, int sequence, int group,
                                           GroupTotals& totals) {
    DSC_SHARED(float[kFinishThreads], values);
    DSC_SHARED(int[kFinishThreads], counts);
    const int width = p.num_experts / p.num_groups;
    const int num_counts = p.num_experts + p.num_groups;
    const int64_t first_chunk = static_cast<int64_t>(sequence) * p.num_chunks;
    const Table table(width);
    for (int first = 0; first < width; first += table.num_columns) {
        const int member = first + table.column;
        const int expert = group * width + member;
        const bool is_member = table.has_place and member < width;
        float sum = 0.0f;
        int count = 0;
        for (int c = table.row; is_member and c < p.num_chunks; c += table.num_rows) {
            sum += p.prob_sum[(first_chunk + c) * p.num_experts + expert];
            count += p.count[(first_chunk + c) * num_counts + expert];
        }
        sum = column_sum(table, sum, values);
        count = column_sum(table, count, counts);
        if (is_member and table.row == 0) {
            totals.prob_sum[member] = sum;
            totals.count[member] = count;
            atomicAdd(&totals.group_count, count);
        }
    }
    for (int c = threadIdx.x; c < p.num_chunks; c += blockDim.x) {
        atomicAdd(&totals.num_sent, p.count[(first_chunk + c) * num_counts + p.num_experts + group]);
    }
}

// The sum over the block's threads, in thread 0: over each warp, then over the warps in their order.
__device__ __forceinline__ float block_sum(float value, float* values) {
    value = row_sum<kWarpSize>(value);
    if (threadIdx.x % kWarpSize == 0) values[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; threadIdx.x == 0 and warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) {
        sum += values[warp];
    }
    __syncthreads();  // the next sum takes the same place
    return sum;
}

// Whether the calling block is the last one to have come here, with the writes of all others to be seen.
__device__ __forceinline__ bool is_last_block(int32_t* num_finished) {
    DSC_SHARED(int, ticket);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        ticket = atomicAdd(num_finished, 1);
        __threadfence();
    }
    __syncthreads();
    return ticket == static_cast<int>(gridDim.x) - 1;
}

struct Factors {
    float expert, device, communication;  // from a count to the gradient of the term in a probability
};

__global__ void __launch_bounds__(kFinishThreads)
    moe_balance_finish_kernel(const MoeBalanceParams p, const Factors factors) {
    DSC_SHARED(GroupTotals, totals);
    DSC_SHARED(float[kFinishThreads / kWarpSize], values);
    const int sequence = blockIdx.x / p.num_groups;
    const int group = blockIdx.x % p.num_groups;
    const int width = p.num_experts / p.num_groups;
    if (threadIdx.x == 0) totals.group_count = totals.num_sent = 0;
    __syncthreads();

    wait_for_previous_kernel();
    let_next_kernel_start();
    add_chunks(p, sequence, group, totals);
    __syncthreads();

    const float device_load = static_cast<float>(totals.group_count) * factors.device;
    const float sent_load = static_cast<float>(totals.num_sent) * factors.communication;
    float term[kNumTerms] = {};
    for (int member = threadIdx.x; member < width; member += blockDim.x) {
        const float expert_load = static_cast<float>(totals.count[member]) * factors.expert;
        const float load[kNumTerms] = {expert_load, device_load, sent_load};
        DSC_UNROLL
        for (int c = 0; c < kNumTerms; ++c) {
            const int64_t row = static_cast<int64_t>(c) * p.num_sequences + sequence;
            p.load[row * p.num_experts + group * width + member] = load[c];
            term[c] += load[c] * totals.prob_sum[member];
        }
    }
    DSC_UNROLL
    for (int c = 0; c < kNumTerms; ++c) {
        const float sum = block_sum(term[c], values);
        if (threadIdx.x == 0) p.group_terms[static_cast<int64_t>(blockIdx.x) * kNumTerms + c] = sum;
    }
    if (not is_last_block(p.num_finished)) return;
    const volatile float* const group_terms = p.group_terms;  // other SMs wrote it: past this one's L1
    float total[kNumTerms] = {};
    for (int64_t i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
        DSC_UNROLL
        for (int c = 0; c < kNumTerms; ++c) total[c] += group_terms[i * kNumTerms + c];
    }
    DSC_UNROLL
    for (int c = 0; c < kNumTerms; ++c) {
        const float sum = block_sum(total[c], values);
        if (threadIdx.x == 0) p.terms[c] = sum;
    }
}

// ---- gradient ----

// A row's gradient is the same for all tokens of a sequence.
template <typename Float>
__global__ void __launch_bounds__(kNumThreads) moe_balance_backward_kernel(const MoeBalanceBackwardParams p) {
    const Chunk chunk = chunk_of_block(p);
    const Table table(p.num_experts);
    auto* const grad_probs = static_cast<Float*>(p.grad_probs);
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (int expert = table.column; table.has_place and expert < p.num_experts; expert += table.num_columns) {
        const auto grad = static_cast<Float>(grad_of_prob(p, chunk.sequence, expert));
        for (int64_t t = chunk.first + table.row; t < chunk.end; t += table.num_rows) {
            grad_probs[t * p.num_experts + expert] = grad;
        }
    }
}

// ---- host ----

template <typename Params>
void check_limits(const Params& p) {
    DSC_CHECK(p.num_experts <= kMaxExperts, "moe_balance_loss: num_experts must be <= ", kMaxExperts,
              ", got ", p.num_experts);
}

Factors factors_of(const MoeBalanceParams& p) {
    const double num_tokens = static_cast<double>(std::max<int64_t>(p.num_tokens, 1));
    const double length = static_cast<double>(std::max<int64_t>(p.num_tokens / p.num_sequences, 1));
    const double expert = p.num_experts / (p.num_topk * length * num_tokens);
    const double communication = p.num_groups / (p.num_groups_kept * length * num_tokens);
    return {.expert = static_cast<float>(expert),
            .device = static_cast<float>(expert * p.num_groups / p.num_experts),
            .communication = static_cast<float>(communication)};
}

}  // namespace
}  // namespace balance

int moe_balance_num_chunks(int64_t num_tokens, int num_sequences) {
    // Of 16 tokens, which a block routes at once; at most 512 in all, unless there are more sequences.
    constexpr int kTokensPerChunk = 16, kMaxChunks = 512;
    const int64_t length = num_tokens / num_sequences;
    const int64_t wanted = std::min(ceil_div<int64_t>(length, kTokensPerChunk),
                                    static_cast<int64_t>(kMaxChunks / num_sequences));
    return static_cast<int>(std::max<int64_t>(wanted, 1));
}

void launch_moe_balance(const void* probs, FloatType dtype, const int32_t* idx, const MoeBalanceParams& p,
                        cudaStream_t stream) {
    balance::check_limits(p);
    with_float_type(dtype, [&]<typename Float>() {
        launch_overlapped(balance::moe_balance_tally_kernel<Float>, balance::grid_of(p),
                          dim3(balance::kNumThreads), 0, stream, static_cast<const Float*>(probs), idx, p);
    });
    launch_moe_balance_finish(p, stream);
}

void launch_moe_balance_finish(const MoeBalanceParams& p, cudaStream_t stream) {
    // A thread for each number that a block adds up, and enough for the last block to add up the others'
    // terms.
    constexpr int64_t kTermsPerWarp = 4096;
    const int64_t num_blocks = static_cast<int64_t>(p.num_sequences) * p.num_groups;
    const int64_t num_numbers = static_cast<int64_t>(p.num_chunks) * (p.num_experts / p.num_groups);
    const int64_t num_warps =
        std::min<int64_t>(std::max(ceil_div<int64_t>(num_numbers, kWarpSize), num_blocks / kTermsPerWarp),
                          balance::kFinishThreads / kWarpSize);
    launch_overlapped(balance::moe_balance_finish_kernel, dim3(static_cast<unsigned>(num_blocks)),
                      dim3(static_cast<unsigned>(num_warps * kWarpSize)), 0, stream, p,
                      balance::factors_of(p));
}

void launch_moe_balance_backward(const MoeBalanceBackwardParams& p, cudaStream_t stream) {
    balance::check_limits(p);
    if (p.num_tokens == 0) return;
    with_float_type(p.dtype, [&]<typename Float>() {
        launch_overlapped(balance::moe_balance_backward_kernel<Float>, balance::grid_of(p),
                          dim3(balance::kNumThreads), 0, stream, p);
    });
}

}  // namespace dsc
