// combine_send and combine_receive, the device's side.
#pragma once

#include "comm/comm_launch.cuh"
#include "comm/comm_rows.cuh"
#include "comm/comm_slots.cuh"
#include "comm/comm_sync.cuh"

namespace dsc::comm {

using CombineSendStep = CommStep<CommWay::kCombine, CommRole::kSend>;
using CombineReceiveStep = CommStep<CommWay::kCombine, CommRole::kReceive>;

// ---- sending ----

// A source's rows go back to its return slots.
struct ReturnedRows {
    const CombineSendStep& step;
    const CombineSendParams& p;
    const SlotMap& map;
    char* target = nullptr;

    __device__ __forceinline__ const char* source(int item) const {
        const Slot slot = map.slot_of(item);
        return static_cast<const char*>(p.y) +
               (p.row_begin[slot.peer] + slot.position) * step.group.row_bytes;
    }
    __device__ __forceinline__ void enter(int item) {
        const Slot slot = map.slot_of(item);
        target = step.row(slot.peer, step.place.rank, slot.position);
    }
    template <typename Visit>
    __device__ __forceinline__ void for_targets(const Visit& visit) const {
        visit(target);
    }
};

__device__ __forceinline__ void return_floats(const CombineSendStep& step, const CombineSendParams& p,
                                              const SlotMap& map) {
    const int num_topk = step.group.shape.num_topk, own = step.place.rank;
    const int num_values = map.num_used(step.group.shape.num_ranks) * num_topk;
    const int num_threads = static_cast<int>(gridDim.x) * kCommThreads;
    for (int at = static_cast<int>(blockIdx.x * kCommThreads + threadIdx.x); at < num_values;
         at += num_threads) {
        const Slot slot = map.slot_of(at / num_topk);
        const int64_t row = p.row_begin[slot.peer] + slot.position;
        step.floats(slot.peer, own, slot.position)[at % num_topk] = p.weight[row * num_topk + at % num_topk];
    }
}

template <typename Mover>
__device__ __forceinline__ void send_combine(const CommGroup& group, const CommPlace& place,
                                             const CombineSendParams& p, char* shared) {
    DSC_SHARED(SlotMap, map);
    const CombineSendStep step(group, place);
    const int num_ranks = group.shape.num_ranks, peer = threadIdx.x;
    const auto room = [&](int r) { return min(p.row_begin[r + 1] - p.row_begin[r], group.shape.max_tokens); };
    if (peer < num_ranks) map.counts[peer] = clamp_count(p.count[peer], room(peer));
    if (not wait_until_freed(step)) return;
    map.add_up(num_ranks);
    Mover mover(shared);
    ReturnedRows rows{step, p, map};
    mover.move(rows, own_rows(map.num_used(num_ranks)), group.row_bytes);
    if (p.weight != nullptr) return_floats(step, p, map);
    mover.finish();
    end_step(step, [&](int r) { return map.count(r); });
}

// ---- receiving ----

// Where a token's rows came back to, rank by rank; null where nothing did.
struct TokenSlots {
    int slot;  // lane r: at rank r

    __device__ __forceinline__ TokenSlots(const CommGroup& group, const CombineReceiveParams& p,
                                          const SlotMap& map, int token) {
        const int lane = threadIdx.x % kWarpSize, num_ranks = group.shape.num_ranks;
        slot = lane < num_ranks ? p.slot[int64_t{token} * num_ranks + lane] : -1;
        if (lane < num_ranks and slot >= map.count(lane)) slot = -1;
    }
    __device__ __forceinline__ int at(int rank) const { return __shfl_sync(kAllLanes, slot, rank); }
};

// One token's sum, 16 bytes a lane: all ranks' words are under way before the first is added.
template <typename T>
__device__ __forceinline__ void sum_token(const CombineReceiveStep& step, const CombineReceiveParams& p,
                                          const TokenSlots& slots, int token) {
    const int lane = threadIdx.x % kWarpSize, num_ranks = step.group.shape.num_ranks;
    const int num_words = static_cast<int>(step.group.row_bytes / kWordBytes);
    const Word* rows[kCommMaxRanks];
    DSC_UNROLL
    for (int r = 0; r < kCommMaxRanks; ++r) {
        const int position = slots.at(r);
        const bool is_there = r < num_ranks and position >= 0;
        rows[r] = is_there ? reinterpret_cast<const Word*>(step.row(step.place.rank, r, position)) : nullptr;
    }
    Word* const out = reinterpret_cast<Word*>(static_cast<char*>(p.out) + token * step.group.row_bytes);
    DSC_NO_UNROLL
    for (int word = lane; word < num_words; word += kWarpSize) {
        Word words[kCommMaxRanks];
        DSC_UNROLL
        for (int r = 0; r < kCommMaxRanks; ++r) {
            if (rows[r] != nullptr) words[r] = rows[r][word];
        }
        float sum[kPerWord<T>] = {};
        DSC_UNROLL
        for (int r = 0; r < kCommMaxRanks; ++r) {
            if (rows[r] == nullptr) continue;
            float values[kPerWord<T>];
            unpack<T>(words[r], values);
            DSC_UNROLL
            for (int i = 0; i < kPerWord<T>; ++i) sum[i] += values[i];
        }
        out[word] = pack<T>(sum);
    }
}

__device__ __forceinline__ void sum_floats(const CombineReceiveStep& step, const CombineReceiveParams& p,
                                           const TokenSlots& slots, int token) {
    const int lane = threadIdx.x % kWarpSize, num_topk = step.group.shape.num_topk;
    float sum = 0.0f;
    DSC_UNROLL
    for (int r = 0; r < kCommMaxRanks; ++r) {
        const int position = slots.at(r);
        if (lane < num_topk and position >= 0) sum += step.floats(step.place.rank, r, position)[lane];
    }
    if (lane < num_topk) p.weight[int64_t{token} * num_topk + lane] = sum;
}

__device__ __forceinline__ void fail_combine(const CommGroup& group, const CombineReceiveParams& p) {
    fill_nan_rows(p.out, p.num_tokens * group.row_bytes);
    fill_all(p.weight, int64_t{p.num_tokens} * group.shape.num_topk, comm_nan());
}

template <typename T>
__device__ __forceinline__ void receive_combine(const CommGroup& group, const CommPlace& place,
                                                const CombineReceiveParams& p) {
    DSC_SHARED(SlotMap, map);
    const CombineReceiveStep step(group, place);
    // As many rows as went out must come back.
    const auto num_sent = [&](int r) { return clamp_count(p.count[r], group.shape.max_tokens); };
    if (not wait_for_rows(step, map.counts, num_sent)) return fail_combine(group, p);
    const RowRange range = own_rows(p.num_tokens);
    DSC_NO_UNROLL
    for (int token = range.first; token < range.end; token += range.step) {
        const TokenSlots slots(group, p, map, token);
        sum_token<T>(step, p, slots, token);
        if (p.weight != nullptr) sum_floats(step, p, slots, token);
    }
    end_step(step, [](int) { return 0; });
}

// ---- kernels: blockIdx.y is the rank of the launch ----

template <typename Mover>
__global__ void __launch_bounds__(kCommThreads, kCommBlocksPerSm)
    combine_send_kernel(const __grid_constant__ CommLaunch<CombineSendParams> launch) {
    DSC_SHARED_DYNAMIC(char, shared);
    send_combine<Mover>(launch.group, launch.places[blockIdx.y], launch.params[blockIdx.y], shared);
}

template <typename T>
__global__ void __launch_bounds__(kCommThreads, kCommBlocksPerSm)
    combine_receive_kernel(const __grid_constant__ CommLaunch<CombineReceiveParams> launch) {
    receive_combine<T>(launch.group, launch.places[blockIdx.y], launch.params[blockIdx.y]);
}

// blockIdx.z: 0 sends, 1 receives.
template <typename T, typename Mover>
__global__ void __launch_bounds__(kCommThreads, kCommBlocksPerSm)
    combine_together_kernel(const __grid_constant__ CombineTogether launch) {
    DSC_SHARED_DYNAMIC(char, shared);
    const CommPlace& place = launch.places[blockIdx.y];
    if (blockIdx.z == 0) {
        send_combine<Mover>(launch.group, place, launch.sends[blockIdx.y], shared);
    } else {
        receive_combine<T>(launch.group, place, launch.receives[blockIdx.y]);
    }
}

}  // namespace dsc::comm
