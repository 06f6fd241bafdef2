// moe_gate and moe_balance_loss in one pass over the logits (DeepSeek-V2, arXiv 2405.04434, eqs 20-31): the
// softmax that the weights need is the one whose probabilities the loss adds up.
//
// A block routes a chunk of a sequence's tokens, as many at a time as it has rows of lanes (moe_gate.cuh),
// and keeps the sums of the probabilities of each lane's experts in registers. Choices are counted in shared
// memory, in integers, which the order of additions does not change. The sums are added over the rows of a
// warp by shuffles and over the warps through shared memory, always in the same order. The partial sums of
// the chunks go to moe_balance.cu's second kernel.
#include "moe/moe_balance.cuh"
#include "moe/moe_gate.cuh"

namespace dsc {
namespace gate {
namespace {

constexpr int kNumWarps = kNumThreads / kWarpSize;

// What the warps of a block tell each other about its chunk.
template <typename L>
struct Tally {
    static constexpr int kNumExperts = L::kLanes * L::kPerLane;
    float prob_sum[kNumWarps][kNumExperts];
    int count[3 * kNumExperts];  // as a row of MoeBalanceParams::count
};

// Counts the row's choices, of experts and of groups, and a token once a group: at its first choice there.
template <typename L>
__device__ __forceinline__ void count_choices(const MoeGateParams& p, const Routed<L>& routed, bool is_token,
                                              int lane, Tally<L>& tally) {
    const int group_width = p.num_experts / p.num_groups;
    int group[L::kSlots];
    bool is_first[L::kSlots];
    DSC_UNROLL
    for (int i = 0; i < L::kSlots; ++i) {
        group[i] = routed.chosen[i].slot / group_width;
        is_first[i] = true;
    }
    DSC_UNROLL
    for (int source = 0; source < L::kSlots; ++source) {
        for (int k = source * L::kLanes; k < min(p.num_topk, (source + 1) * L::kLanes); ++k) {
            const int earlier = row_broadcast<L::kLanes>(group[source], k % L::kLanes);
            DSC_UNROLL
            for (int i = 0; i < L::kSlots; ++i) {
                if (k < lane + i * L::kLanes and earlier == group[i]) is_first[i] = false;
            }
        }
    }
    DSC_UNROLL
    for (int i = 0; i < L::kSlots; ++i) {
        if (not is_token or lane + i * L::kLanes >= p.num_topk) continue;
        atomicAdd(&tally.count[routed.chosen[i].slot], 1);
        atomicAdd(&tally.count[p.num_experts + group[i]], 1);
        if (is_first[i]) atomicAdd(&tally.count[p.num_experts + p.num_groups + group[i]], 1);
    }
}

// The chunk's sums, from the lanes of all warps to global memory.
template <typename L>
__device__ __forceinline__ void store_tally(const MoeBalanceParams& b, float (&prob_sum)[L::kPerLane],
                                            int lane, Tally<L>& tally) {
    DSC_UNROLL
    for (int j = 0; j < L::kPerLane; ++j) {
        DSC_UNROLL
        for (int offset = L::kLanes; offset < kWarpSize; offset *= 2) {
            prob_sum[j] += __shfl_xor_sync(kAllLanes, prob_sum[j], offset);
        }
    }
    if (threadIdx.x % kWarpSize < L::kLanes) {
        DSC_UNROLL
        for (int j = 0; j < L::kPerLane; ++j) {
            tally.prob_sum[threadIdx.x / kWarpSize][lane * L::kPerLane + j] = prob_sum[j];
        }
    }
    __syncthreads();
    const int64_t row = blockIdx.x;
    for (int e = threadIdx.x; e < b.num_experts; e += kNumThreads) {
        float sum = 0.0f;
        DSC_UNROLL
        for (int warp = 0; warp < kNumWarps; ++warp) sum += tally.prob_sum[warp][e];
        b.prob_sum[row * b.num_experts + e] = sum;
    }
    const int num_counts = balance::num_counts(b);
    for (int i = threadIdx.x; i < num_counts; i += kNumThreads)
        b.count[row * num_counts + i] = tally.count[i];
}

template <typename L>
__global__ void __launch_bounds__(kNumThreads)
    moe_gate_with_balance_kernel(const MoeGateParams p, const MoeBalanceParams b) {
    DSC_SHARED(Tally<L>, tally);
    const int lane = threadIdx.x % L::kLanes;
    const int row = threadIdx.x / L::kLanes;
    const balance::Chunk chunk = balance::chunk_of_block(b);
    for (int i = threadIdx.x; i < balance::num_counts(b); i += kNumThreads) tally.count[i] = 0;
    __syncthreads();

    wait_for_previous_kernel();
    let_next_kernel_start();
    if (blockIdx.x == 0 and threadIdx.x == 0) *b.num_finished = 0;
    float prob_sum[L::kPerLane] = {};
    for (int64_t first = chunk.first; first < chunk.end; first += L::kTokensPerBlock) {
        // A row past the end repeats the last token, stores nothing and counts for nothing.
        const bool is_token = first + row < chunk.end;
        const int64_t token = is_token ? first + row : chunk.end - 1;
        float prob[L::kPerLane];
        load_logits<L>(p.logits + token * p.num_experts, p.num_experts, lane, prob);
        const Routed<L> routed = route<L>(p, prob, lane);
        store_choices<L>(p, routed, token, is_token, lane);
        count_choices<L>(p, routed, is_token, lane, tally);
        const float factor = 1.0f / routed.sum;
        DSC_UNROLL
        for (int j = 0; j < L::kPerLane; ++j) prob_sum[j] += is_token ? prob[j] * factor : 0.0f;
        __syncwarp();  // the next token's groups take the same scratch
    }
    store_tally<L>(b, prob_sum, lane, tally);
}

}  // namespace
}  // namespace gate

void launch_moe_gate_with_balance(const MoeGateParams& gate, const MoeBalanceParams& balance,
                                  cudaStream_t stream) {
    gate::check_limits("moe_gate_with_balance", gate);
    gate::with_layout(gate, [&]<typename L>() {
        launch_overlapped(gate::moe_gate_with_balance_kernel<L>, balance::grid_of(balance),
                          dim3(gate::kNumThreads), 0, stream, gate, balance);
    });
    launch_moe_balance_finish(balance, stream);
}

}  // namespace dsc
