// The balance losses of DeepSeek-V2 (arXiv 2405.04434, eqs 23-31): for a gate of one's own, and the launch
// that ends both this op and moe_gate_with_balance.
//
// First launch: a block adds up the probabilities and counts the choices of a chunk of one sequence's tokens
// (moe_gate_balance.cu does the same from the logits). Second launch: a block adds up the chunks of one slice
// of a group's experts of one sequence, and what the group's experts were chosen in all; that is all that the
// slice's share of each term depends on. The block that finishes last adds up the shares. Every sum of floats
// is taken in an order that shapes alone decide.
#include <algorithm>

#include "core/dtype.h"
#include "core/launch.h"
#include "core/overlap.h"
#include "core/warp.h"
#include "moe/moe_balance.cuh"

namespace dsc {
namespace balance {
namespace {

constexpr int kTokenThreads = 320;           // of a block that takes tokens: two rows of 160 experts
constexpr int kMaxThreads = kMoeMaxExperts;  // of any block: at least a row
constexpr int kMaxTerms = 3;

// A block as a table of threads, a column an expert, so that neighbours read neighbours.
struct Table {
    int num_columns, num_rows, row, column;
    bool has_place;

    __device__ __forceinline__ explicit Table(int width)
        : num_columns(width),
          num_rows(static_cast<int>(blockDim.x) / width),
          row(static_cast<int>(threadIdx.x) / width),
          column(static_cast<int>(threadIdx.x) % width),
          has_place(row < num_rows) {}
};

// The sum of column[i * stride] for i = first, first + step, ... below `end`, in that order, several loads in
// flight.
template <typename Sum, typename T>
__device__ __forceinline__ Sum sum_in_order(const T* column, int stride, int first, int end, int step) {
    constexpr int kInFlight = 8;  // past the end the first again, so that no load is conditional
    Sum sum{};
    for (; first < end; first += kInFlight * step) {
        T value[kInFlight];
        DSC_UNROLL
        for (int j = 0; j < kInFlight; ++j) {
            const int64_t i = first + j * step < end ? first + j * step : first;
            value[j] = column[i * stride];
        }
        DSC_UNROLL
        for (int j = 0; j < kInFlight; ++j) {
            sum += first + j * step < end ? static_cast<Sum>(value[j]) : Sum{};
        }
    }
    return sum;
}

// Adds up a column of the block's table in the order of its rows; the result is the first row's.
__device__ __forceinline__ float column_sum(const Table& table, float value) {
    DSC_SHARED(float[kMaxThreads], values);
    values[threadIdx.x] = value;
    __syncthreads();
    float sum = 0.0f;
    if (table.row == 0) {
        for (int row = 0; row < table.num_rows; ++row) sum += values[row * table.num_columns + table.column];
    }
    return sum;
}

// ---- first launch ----

// Each choice of the chunk's tokens counts for its expert and its group, and its token for the group unless
// an earlier choice of the token did.
__device__ __forceinline__ void count_choices(const MoeBalanceLossParams& p, const Chunk& chunk, int* count) {
    const int num_experts = p.balance.num_experts, num_groups = p.balance.num_groups;
    const int num_topk = p.balance.num_topk;
    const int group_width = num_experts / num_groups;
    const int64_t end = chunk.end * num_topk;
    for (int64_t i = chunk.first * num_topk + threadIdx.x; i < end; i += blockDim.x) {
        const int expert = p.idx[i];
        if (expert < 0 or expert >= num_experts) continue;
        const int group = expert / group_width;
        bool is_first = true;
        for (int64_t earlier = i - i % num_topk; earlier < i; ++earlier) {
            const int other = p.idx[earlier];
            if (other >= 0 and other < num_experts and other / group_width == group) is_first = false;
        }
        atomicAdd(&count[expert], 1);
        atomicAdd(&count[num_experts + group], 1);
        if (is_first) atomicAdd(&count[num_experts + num_groups + group], 1);
    }
}

template <typename Float>
__global__ void __launch_bounds__(kMaxThreads) moe_balance_tally_kernel(const MoeBalanceLossParams p) {
    DSC_SHARED(int[3 * kMoeMaxExperts], count);
    const auto* const probs = static_cast<const Float*>(p.probs);
    const MoeBalanceParams& b = p.balance;
    const Chunk chunk = chunk_of_block(b);
    const Table table(b.num_experts);
    for (int i = threadIdx.x; i < num_counts(b); i += blockDim.x) count[i] = 0;
    __syncthreads();

    wait_for_previous_kernel();
    let_next_kernel_start();
    if (blockIdx.x == 0 and threadIdx.x == 0) *b.num_finished = 0;
    count_choices(p, chunk, count);
    float sum = 0.0f;
    if (table.has_place) {
        sum = sum_in_order<float>(probs + chunk.first * b.num_experts + table.column, b.num_experts,
                                  table.row, static_cast<int>(chunk.end - chunk.first), table.num_rows);
    }
    sum = column_sum(table, sum);
    const int64_t row = blockIdx.x;
    if (table.row == 0) b.prob_sum[row * b.num_experts + table.column] = sum;
    // column_sum has waited for all counts.
    for (int i = threadIdx.x; i < num_counts(b); i += blockDim.x) b.count[row * num_counts(b) + i] = count[i];
}

// ---- second launch ----

// The experts of one block, of one group; none if the group has fewer experts than slices.
struct Slice {
    int sequence, group, first_expert, num_experts;
};

__device__ __forceinline__ Slice slice_of_block(const MoeBalanceParams& p, int slice_width) {
    const int slice = static_cast<int>(blockIdx.x) % p.num_slices;
    const int group = static_cast<int>(blockIdx.x) / p.num_slices % p.num_groups;
    const int sequence = static_cast<int>(blockIdx.x) / p.num_slices / p.num_groups;
    const int group_width = p.num_experts / p.num_groups;
    const int first = min(slice * slice_width, group_width);
    return {sequence, group, group * group_width + first, min(slice_width, group_width - first)};
}

// Choices of the tokens of one sequence.
struct SliceCounts {
    int of_expert[kMoeMaxExperts];
    int of_group, tokens_of_group;
};

// Counts the slice's choices; returns, to the first row of the table, the sums of the probabilities.
__device__ __forceinline__ float add_chunks(const MoeBalanceParams& p, const Slice& slice, const Table& table,
                                            SliceCounts& counts) {
    const int64_t first_chunk = static_cast<int64_t>(slice.sequence) * p.num_chunks;
    const float* const prob_sum = p.prob_sum + first_chunk * p.num_experts;
    const int32_t* const count = p.count + first_chunk * num_counts(p);
    float sum = 0.0f;
    if (table.has_place and table.column < slice.num_experts) {
        const int expert = slice.first_expert + table.column;
        sum = sum_in_order<float>(prob_sum + expert, p.num_experts, table.row, p.num_chunks, table.num_rows);
        const int num_choices =
            sum_in_order<int>(count + expert, num_counts(p), table.row, p.num_chunks, table.num_rows);
        atomicAdd(&counts.of_expert[table.column], num_choices);
    }
    int num_choices = 0, num_tokens = 0;
    for (int64_t c = threadIdx.x; c < p.num_chunks; c += blockDim.x) {
        const int32_t* const of_group = count + c * num_counts(p) + p.num_experts + slice.group;
        num_choices += of_group[0];
        num_tokens += of_group[p.num_groups];
    }
    num_choices = __reduce_add_sync(kAllLanes, num_choices);
    num_tokens = __reduce_add_sync(kAllLanes, num_tokens);
    if (threadIdx.x % kWarpSize == 0) {
        atomicAdd(&counts.of_group, num_choices);
        atomicAdd(&counts.tokens_of_group, num_tokens);
    }
    return column_sum(table, sum);
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

// From a count to the gradient of the term in a probability, times the term's weight where there is one.
struct Factors {
    float expert, device, communication;
};

// Adds up what the blocks have left in slice_terms. Called by the last of them.
__device__ __forceinline__ void add_slices(const MoeBalanceParams& p, float* values) {
    const volatile float* const slice_terms = p.slice_terms;  // other SMs wrote it: past this one's L1
    float total[kMaxTerms] = {};
    for (int64_t i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
        DSC_UNROLL
        for (int c = 0; c < kMaxTerms; ++c) {
            if (c < p.num_terms) total[c] += slice_terms[i * p.num_terms + c];
        }
    }
    DSC_UNROLL
    for (int c = 0; c < kMaxTerms; ++c) {
        const float sum = block_sum(total[c], values);
        if (threadIdx.x == 0 and c < p.num_terms) p.terms[c] = sum;
    }
}

__global__ void __launch_bounds__(kMaxThreads, 1)  // few blocks: registers before residents
    moe_balance_finish_kernel(const MoeBalanceParams p, const Factors factors, int slice_width) {
    DSC_SHARED(SliceCounts, counts);
    DSC_SHARED(float[kMaxThreads / kWarpSize], values);
    const Slice slice = slice_of_block(p, slice_width);
    const Table table(slice_width);
    if (table.row == 0) counts.of_expert[table.column] = 0;
    if (threadIdx.x == 0) counts.of_group = counts.tokens_of_group = 0;
    __syncthreads();

    wait_for_previous_kernel();
    let_next_kernel_start();
    const float prob_sum = add_chunks(p, slice, table, counts);  // has waited for all counts
    float term[kMaxTerms] = {};
    if (table.row == 0 and table.column < slice.num_experts) {
        float load[kMaxTerms] = {static_cast<float>(counts.of_expert[table.column]) * factors.expert,
                                 static_cast<float>(counts.of_group) * factors.device,
                                 static_cast<float>(counts.tokens_of_group) * factors.communication};
        if (p.num_terms == 1) load[0] += load[1] + load[2];
        DSC_UNROLL
        for (int c = 0; c < kMaxTerms; ++c) {
            if (c >= p.num_terms) break;
            const int64_t row = static_cast<int64_t>(c) * p.num_sequences + slice.sequence;
            p.load[row * p.num_experts + slice.first_expert + table.column] = load[c];
            term[c] = load[c] * prob_sum;
        }
    }
    DSC_UNROLL
    for (int c = 0; c < kMaxTerms; ++c) {
        const float sum = block_sum(term[c], values);
        if (threadIdx.x == 0 and c < p.num_terms) {
            p.slice_terms[static_cast<int64_t>(blockIdx.x) * p.num_terms + c] = sum;
        }
    }
    if (is_last_block(p.num_finished)) add_slices(p, values);
}

// ---- gradient ----

// A row's gradient is the same for all tokens of a sequence.
template <typename Float>
__global__ void __launch_bounds__(kMaxThreads)
    moe_balance_backward_kernel(const MoeBalanceLossBackwardParams p) {
    const MoeBalanceBackwardParams& b = p.balance;
    const Chunk chunk = chunk_of_block(b);
    const Table table(b.num_experts);
    auto* const grad_probs = static_cast<Float*>(p.grad_probs);
    wait_for_previous_kernel();
    let_next_kernel_start();
    if (not table.has_place) return;
    const auto grad =
        static_cast<Float>(b.num_terms == 1 ? grad_of_prob<1>(b, chunk.sequence, table.column)
                                            : grad_of_prob<kMaxTerms>(b, chunk.sequence, table.column));
    for (int64_t t = chunk.first + table.row; t < chunk.end; t += table.num_rows) {
        grad_probs[t * b.num_experts + table.column] = grad;
    }
}

// ---- host ----

template <typename Params>
void check_limits(const Params& p) {
    DSC_CHECK(p.num_experts <= kMoeMaxExperts, "moe_balance_loss: num_experts must be <= ", kMoeMaxExperts,
              ", got ", p.num_experts);
}

// Whole rows of the table, in whole warps.
dim3 token_threads(int num_experts) {
    const int num_rows = std::max(kTokenThreads / num_experts, 1);
    return dim3(static_cast<unsigned>(ceil_div(num_rows * num_experts, kWarpSize) * kWarpSize));
}

Factors factors_of(const MoeBalanceParams& p) {
    const double num_tokens = static_cast<double>(std::max<int64_t>(p.num_tokens, 1));
    const double length = static_cast<double>(std::max<int64_t>(p.num_tokens / p.num_sequences, 1));
    const double expert = p.num_experts / (p.num_topk * length * num_tokens);
    const double communication = p.num_groups / (p.num_groups_kept * length * num_tokens);
    const auto weighted = [&](double factor, float weight) {
        return static_cast<float>(p.num_terms == 1 ? factor * weight : factor);
    };
    return {.expert = weighted(expert, p.weight[0]),
            .device = weighted(expert * p.num_groups / p.num_experts, p.weight[1]),
            .communication = weighted(communication, p.weight[2])};
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

int moe_balance_num_slices(int num_sequences, int num_experts, int num_groups) {
    // Of 8 experts, which are one sector of every chunk; at most 256 in all, unless there are more groups.
    constexpr int kExpertsPerSlice = 8, kMaxSlices = 256;
    const int64_t num_groups_of_all = static_cast<int64_t>(num_sequences) * num_groups;
    const int64_t wanted = std::min<int64_t>(ceil_div(num_experts / num_groups, kExpertsPerSlice),
                                             kMaxSlices / num_groups_of_all);
    return static_cast<int>(std::max<int64_t>(wanted, 1));
}

void launch_moe_balance(const MoeBalanceLossParams& p, cudaStream_t stream) {
    balance::check_limits(p.balance);
    with_float_type(p.dtype, [&]<typename Float>() {
        launch_overlapped(balance::moe_balance_tally_kernel<Float>, balance::grid_of(p.balance),
                          balance::token_threads(p.balance.num_experts), 0, stream, p);
    });
    launch_moe_balance_finish(p.balance, stream);
}

void launch_moe_balance_finish(const MoeBalanceParams& p, cudaStream_t stream) {
    // A thread for each number that a block adds up, and enough for the last block to add up the others'
    // terms.
    constexpr int64_t kTermsPerWarp = 4096;
    const int64_t num_blocks = static_cast<int64_t>(p.num_sequences) * p.num_groups * p.num_slices;
    const int slice_width = ceil_div(p.num_experts / p.num_groups, p.num_slices);
    const int64_t num_numbers = static_cast<int64_t>(p.num_chunks) * slice_width;
    const int64_t num_warps =
        std::min<int64_t>(std::max(ceil_div<int64_t>(num_numbers, kWarpSize), num_blocks / kTermsPerWarp),
                          balance::kMaxThreads / kWarpSize);
    launch_overlapped(balance::moe_balance_finish_kernel, dim3(static_cast<unsigned>(num_blocks)),
                      dim3(static_cast<unsigned>(num_warps * kWarpSize)), 0, stream, p,
                      balance::factors_of(p), slice_width);
}

void launch_moe_balance_backward(const MoeBalanceLossBackwardParams& p, cudaStream_t stream) {
    balance::check_limits(p.balance);
    if (p.balance.num_tokens == 0) return;
    with_float_type(p.dtype, [&]<typename Float>() {
        launch_overlapped(balance::moe_balance_backward_kernel<Float>, balance::grid_of(p.balance),
                          balance::token_threads(p.balance.num_experts), 0, stream, p);
    });
}

}  // namespace dsc
