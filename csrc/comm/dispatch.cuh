// dispatch_send and dispatch_receive, the device's side, for either way of moving rows (comm_rows.cuh).
#pragma once

#include "comm/comm_launch.cuh"
#include "comm/comm_rows.cuh"
#include "comm/comm_slots.cuh"
#include "comm/comm_sync.cuh"

namespace dsc::comm {

using DispatchSendStep = CommStep<CommWay::kDispatch, CommRole::kSend>;
using DispatchReceiveStep = CommStep<CommWay::kDispatch, CommRole::kReceive>;

// ---- sending ----

// A token's row goes to its slot at each rank, K indices and K floats beside it. Lane r knows the slot at
// rank r, lane k the index and the float k; what the next token needs is loaded while this one travels.
struct SentRows {
    const DispatchSendStep& step;
    const DispatchSendParams& p;
    int stride, lane;
    int next_slot = -1, next_idx = 0;
    float next_weight = 0.0f;
    uint32_t ranks = 0;  // a bit for each
    int slot = -1;

    __device__ __forceinline__ SentRows(const DispatchSendStep& s, const DispatchSendParams& params,
                                        const RowRange& range)
        : step(s), p(params), stride(range.step), lane(threadIdx.x % kWarpSize) {
        look_up(range.first);
    }

    __device__ __forceinline__ const char* source(int token) const {
        return static_cast<const char*>(p.x) + token * step.group.row_bytes;
    }

    __device__ __forceinline__ void look_up(int token) {
        if (token >= p.num_tokens) return;
        const int num_ranks = step.group.shape.num_ranks, num_topk = step.group.shape.num_topk;
        if (lane < num_ranks) next_slot = p.slot[int64_t{token} * num_ranks + lane];
        if (lane < num_topk and p.idx != nullptr) next_idx = p.idx[int64_t{token} * num_topk + lane];
        if (lane < num_topk and p.weight != nullptr) next_weight = p.weight[int64_t{token} * num_topk + lane];
    }

    __device__ __forceinline__ void enter(int token) {
        const int idx = next_idx, own = step.place.rank, num_topk = step.group.shape.num_topk;
        const float weight = next_weight;
        slot = next_slot;
        // A slot that the buffer does not have is none.
        const bool has_slot =
            static_cast<uint32_t>(slot) < static_cast<uint32_t>(step.group.shape.max_tokens);
        ranks = __ballot_sync(kAllLanes, lane < step.group.shape.num_ranks and has_slot);
        look_up(token + stride);
        for (uint32_t rest = ranks; rest != 0; rest &= rest - 1) {
            const int rank = __ffs(static_cast<int>(rest)) - 1;
            const int position = __shfl_sync(kAllLanes, slot, rank);
            if (lane >= num_topk) continue;
            if (p.idx != nullptr) step.idx(rank, own, position)[lane] = idx;
            if (p.weight != nullptr) step.floats(rank, own, position)[lane] = weight;
        }
    }

    template <typename Visit>
    __device__ __forceinline__ void for_targets(const Visit& visit) const {
        for (uint32_t rest = ranks; rest != 0; rest &= rest - 1) {
            const int rank = __ffs(static_cast<int>(rest)) - 1;
            visit(step.row(rank, step.place.rank, __shfl_sync(kAllLanes, slot, rank)));
        }
    }
};

template <typename Mover>
__device__ __forceinline__ void send_dispatch(const CommGroup& group, const CommPlace& place,
                                              const DispatchSendParams& p, char* shared) {
    const DispatchSendStep step(group, place);
    if (not wait_until_freed(step)) return;
    Mover mover(shared);
    const RowRange range = own_rows(p.num_tokens);
    SentRows rows(step, p, range);
    mover.move(rows, range, group.row_bytes);
    mover.finish();
    end_step(step, [&](int peer) { return clamp_count(p.count[peer], group.shape.max_tokens); });
}

// ---- receiving ----

// From a source's slots to its rows.
struct ReceivedRows {
    const DispatchReceiveStep& step;
    const DispatchReceiveParams& p;
    const SlotMap& map;
    char* target = nullptr;

    __device__ __forceinline__ const char* source(int item) const {
        const Slot slot = map.slot_of(item);
        return step.row(step.place.rank, slot.peer, slot.position);
    }
    __device__ __forceinline__ void enter(int item) {
        const Slot slot = map.slot_of(item);
        target = static_cast<char*>(p.x) + (p.row_begin[slot.peer] + slot.position) * step.group.row_bytes;
    }
    template <typename Visit>
    __device__ __forceinline__ void for_targets(const Visit& visit) const {
        visit(target);
    }
};

// Indices and floats of all rows, the unused ones too.
__device__ __forceinline__ void receive_topk(const DispatchReceiveStep& step, const DispatchReceiveParams& p,
                                             const SlotMap& map) {
    const int num_topk = step.group.shape.num_topk, own = step.place.rank;
    const int first_expert = own * p.num_local_experts;
    for_each_topk(
        step.group, p.row_begin,
        [&](const Slot& slot, int k) {
            const bool is_used = slot.position < map.count(slot.peer);
            TopkValue value{-1, 0.0f};
            if (is_used and p.idx != nullptr) {
                const int expert = step.idx(own, slot.peer, slot.position)[k];
                const bool is_local = expert >= first_expert and expert < first_expert + p.num_local_experts;
                value.idx = is_local ? expert - first_expert : -1;
            }
            if (is_used and p.weight != nullptr) value.weight = step.floats(own, slot.peer, slot.position)[k];
            return value;
        },
        [&](int64_t row, int k, const TopkValue& value) {
            if (p.idx != nullptr) p.idx[row * num_topk + k] = value.idx;
            if (p.weight != nullptr) p.weight[row * num_topk + k] = value.weight;
        });
}

__device__ __forceinline__ void fail_dispatch(const CommGroup& group, const DispatchReceiveParams& p) {
    const int num_ranks = group.shape.num_ranks;
    const int64_t num_rows = p.row_begin[num_ranks];
    fill_nan_rows(p.x, num_rows * group.row_bytes);
    fill_all(p.count, num_ranks, 0);
    fill_all(p.idx, num_rows * group.shape.num_topk, -1);
    fill_all(p.weight, num_rows * group.shape.num_topk, comm_nan());
}

template <typename Mover>
__device__ __forceinline__ void receive_dispatch(const CommGroup& group, const CommPlace& place,
                                                 const DispatchReceiveParams& p, char* shared) {
    DSC_SHARED(SlotMap, map);
    const DispatchReceiveStep step(group, place);
    const int num_ranks = group.shape.num_ranks, peer = threadIdx.x;
    if (not wait_for_rows(step, map.counts, [&](int r) { return p.row_begin[r + 1] - p.row_begin[r]; })) {
        return fail_dispatch(group, p);
    }
    map.add_up(num_ranks);
    if (blockIdx.x == 0 and peer < num_ranks) p.count[peer] = map.count(peer);
    Mover mover(shared);
    ReceivedRows rows{step, p, map};
    mover.move(rows, own_rows(map.num_used(num_ranks)), group.row_bytes);
    if (p.idx != nullptr or p.weight != nullptr) receive_topk(step, p, map);
    mover.finish();
    end_step(step, [](int) { return 0; });
}

// ---- kernels: blockIdx.y is the rank of the launch ----

template <typename Mover>
__global__ void __launch_bounds__(kCommThreads, kCommBlocksPerSm)
    dispatch_send_kernel(const __grid_constant__ CommLaunch<DispatchSendParams> launch) {
    DSC_SHARED_DYNAMIC(char, shared);
    send_dispatch<Mover>(launch.group, launch.places[blockIdx.y], launch.params[blockIdx.y], shared);
}

template <typename Mover>
__global__ void __launch_bounds__(kCommThreads, kCommBlocksPerSm)
    dispatch_receive_kernel(const __grid_constant__ CommLaunch<DispatchReceiveParams> launch) {
    DSC_SHARED_DYNAMIC(char, shared);
    receive_dispatch<Mover>(launch.group, launch.places[blockIdx.y], launch.params[blockIdx.y], shared);
}

// blockIdx.z: 0 sends, 1 receives.
template <typename Mover>
__global__ void __launch_bounds__(kCommThreads, kCommBlocksPerSm)
    dispatch_together_kernel(const __grid_constant__ DispatchTogether launch) {
    DSC_SHARED_DYNAMIC(char, shared);
    const CommPlace& place = launch.places[blockIdx.y];
    if (blockIdx.z == 0) {
        send_dispatch<Mover>(launch.group, place, launch.sends[blockIdx.y], shared);
    } else {
        receive_dispatch<Mover>(launch.group, place, launch.receives[blockIdx.y], shared);
    }
}

}  // namespace dsc::comm
