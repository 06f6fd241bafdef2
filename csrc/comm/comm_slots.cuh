// The slots of all sources as one list of rows, for kernels that read them or send them back.
#pragma once

#include "comm/comm_rows.cuh"
#include "comm/comm_sync.cuh"

namespace dsc::comm {

// A rank that rows came from, or go back to, and which of its rows.
struct Slot {
    int peer, position;
};

__device__ __forceinline__ int clamp_count(int count, int most) {
    return min(max(count, 0), most);
}

// The warp's share of so many rows.
__device__ __forceinline__ RowRange own_rows(int num_rows) {
    const int warp = threadIdx.x / kWarpSize;
    return {static_cast<int>(blockIdx.x) * kCommWarps + warp, static_cast<int>(gridDim.x) * kCommWarps,
            num_rows};
}

// In shared memory: how many slots of each source are in use, and how many of all before it.
struct SlotMap {
    int counts[kCommMaxRanks];
    int begins[kCommMaxRanks + 1];

    // All threads of the block arrive, after counts have been written and met over.
    __device__ __forceinline__ void add_up(int num_ranks) {
        if (threadIdx.x == 0) {
            begins[0] = 0;
            for (int r = 0; r < num_ranks; ++r) begins[r + 1] = begins[r] + counts[r];
        }
        __syncthreads();
    }
    __device__ __forceinline__ int count(int peer) const { return counts[peer]; }
    __device__ __forceinline__ int num_used(int num_ranks) const { return begins[num_ranks]; }
    // Of the used slots, number `item`.
    __device__ __forceinline__ Slot slot_of(int item) const {
        int peer = 0;
        while (item >= begins[peer + 1]) ++peer;
        return {peer, item - begins[peer]};
    }
};

struct TopkValue {
    int32_t idx;
    float weight;
};

// take(slot, k) and then put(row, k, value), for the K values of every row, threads side by side; several are
// taken before the first is put.
template <typename Take, typename Put>
__device__ __forceinline__ void for_each_topk(const CommGroup& group, const int32_t* row_begin,
                                              const Take& take, const Put& put) {
    constexpr int kInFlight = 4;
    const int num_topk = group.shape.num_topk, num_ranks = group.shape.num_ranks;
    const int num_values = row_begin[num_ranks] * num_topk;
    const int num_threads = static_cast<int>(gridDim.x) * kCommThreads;
    const int own = static_cast<int>(blockIdx.x) * kCommThreads + static_cast<int>(threadIdx.x);
    const auto slot_of = [&](int row) {
        int peer = 0;
        while (row >= row_begin[peer + 1]) ++peer;
        return Slot{peer, row - row_begin[peer]};
    };
    DSC_NO_UNROLL
    for (int first = own; first < num_values; first += kInFlight * num_threads) {
        TopkValue values[kInFlight];
        DSC_UNROLL
        for (int i = 0; i < kInFlight; ++i) {
            const int at = min(first + i * num_threads, num_values - 1);
            values[i] = take(slot_of(at / num_topk), at % num_topk);
        }
        DSC_UNROLL
        for (int i = 0; i < kInFlight; ++i) {
            const int at = first + i * num_threads;
            if (at < num_values) put(at / num_topk, at % num_topk, values[i]);
        }
    }
}

}  // namespace dsc::comm
