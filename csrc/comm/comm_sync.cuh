// One launch's step of the protocol of comm.h, for the blocks of one rank: which epoch it is, the waits for
// peers, what happens when one does not come, and the flags at the end.
#pragma once

#include "comm/comm.h"
#include "core/system_scope.cuh"
#include "core/vec.h"
#include "core/warp.h"

namespace dsc {

constexpr int kCommThreads = 256;
constexpr int kCommWarps = kCommThreads / kWarpSize;

__device__ __forceinline__ uint64_t comm_flag(uint32_t epoch, uint32_t count) {
    return uint64_t{epoch} << 32 | count;
}
__device__ __forceinline__ uint32_t epoch_of(uint64_t flag) {
    return static_cast<uint32_t>(flag >> 32);
}
__device__ __forceinline__ uint32_t count_of(uint64_t flag) {
    return static_cast<uint32_t>(flag);
}

template <CommWay kWay, CommRole kRole>
struct CommStep {
    static constexpr int kWayIdx = static_cast<int>(kWay), kRoleIdx = static_cast<int>(kRole);

    const CommGroup& group;
    const CommPlace& place;
    uint32_t epoch;  // of this launch

    __device__ __forceinline__ CommStep(const CommGroup& g, const CommPlace& p) : group(g), place(p) {
        // Written by the launch before, at the end of its last block: a plain load sees it.
        epoch = control()->epoch[kWayIdx][kRoleIdx] + 1;
    }

    __device__ __forceinline__ CommControl* control_of(int rank) const {
        return reinterpret_cast<CommControl*>(place.buffers[rank]);
    }
    __device__ __forceinline__ CommControl* control() const { return control_of(place.rank); }

    // Slot `position` of `peer` in the buffer of `owner`.
    __device__ __forceinline__ char* row(int owner, int peer, int position) const {
        const int64_t slot = int64_t{peer} * group.shape.max_tokens + position;
        return place.buffers[owner] + group.layout.rows[kWayIdx] + slot * group.shape.row_bytes;
    }
    __device__ __forceinline__ float* floats(int owner, int peer, int position) const {
        const int64_t slot = int64_t{peer} * group.shape.max_tokens + position;
        float* const all = reinterpret_cast<float*>(place.buffers[owner] + group.layout.floats[kWayIdx]);
        return all + slot * group.shape.num_topk;
    }
    __device__ __forceinline__ int32_t* idx(int owner, int peer, int position) const {
        const int64_t slot = int64_t{peer} * group.shape.max_tokens + position;
        return reinterpret_cast<int32_t*>(place.buffers[owner] + group.layout.idx) +
               slot * group.shape.num_topk;
    }
};

// ---- waiting ----

// The first wait to end tells the host; later ones, and those of other blocks, are its consequences.
template <typename Step>
__device__ __forceinline__ void report_failure(const Step& step, int peer, CommPhase phase, uint64_t expected,
                                               uint64_t seen) {
    if (atomicCAS(&step.control()->is_failed, 0u, 1u) != 0) return;
    CommStatus* const status = step.place.status;
    status->rank = step.place.rank;
    status->peer = peer;
    status->phase = phase;
    status->expected = expected;
    status->seen = seen;
    store_release_system(&status->is_written, 1u);
}

struct Awaited {
    bool is_there;
    uint32_t count;
};

// Until `flag`, in this rank's own memory, shows `epoch`.
template <typename Step>
__device__ __forceinline__ Awaited wait_for_flag(const Step& step, const uint64_t* flag, uint32_t epoch,
                                                 int peer, CommPhase phase) {
    const uint32_t* const is_failed = &step.control()->is_failed;
    const uint64_t start = global_time();
    while (load_relaxed_system(is_failed) == 0) {
        const uint64_t seen = load_acquire_system(flag);
        if (epoch_of(seen) == epoch) return {true, count_of(seen)};
        if (global_time() - start > step.group.timeout_ns) {
            report_failure(step, peer, phase, epoch, epoch_of(seen));
            break;
        }
        __nanosleep(20);
    }
    return {false, 0};
}

// For a sender: until every peer has read what was sent last. All threads of the block arrive; false when it
// ended otherwise.
template <CommWay kWay>
__device__ __forceinline__ bool wait_until_freed(const CommStep<kWay, CommRole::kSend>& step) {
    constexpr CommPhase kPhase =
        kWay == CommWay::kDispatch ? CommPhase::kDispatchFree : CommPhase::kCombineFree;
    const int peer = threadIdx.x;
    bool is_free = true;
    if (peer < step.group.shape.num_ranks) {
        const uint64_t* const flag = &step.control()->freed[step.kWayIdx][peer];
        is_free = wait_for_flag(step, flag, step.epoch - 1, peer, kPhase).is_there;
    }
    return __syncthreads_and(is_free);
}

// For a receiver: until the rows of every peer are there, whose numbers go to `counts`. `expect(peer)` is how
// many may come at the most, or must come. All threads of the block arrive.
template <CommWay kWay, typename Expect>
__device__ __forceinline__ bool wait_for_rows(const CommStep<kWay, CommRole::kReceive>& step, int* counts,
                                              const Expect& expect) {
    constexpr bool kIsDispatch = kWay == CommWay::kDispatch;
    const int peer = threadIdx.x;
    bool is_there = true;
    if (peer < step.group.shape.num_ranks) {
        const uint64_t* const flag = &step.control()->arrived[step.kWayIdx][peer];
        const auto came =
            wait_for_flag(step, flag, step.epoch, peer,
                          kIsDispatch ? CommPhase::kDispatchArrival : CommPhase::kCombineArrival);
        const auto expected = static_cast<uint32_t>(expect(peer));
        const bool fits = kIsDispatch ? came.count <= expected : came.count == expected;
        if (came.is_there and not fits) {
            report_failure(step, peer, kIsDispatch ? CommPhase::kDispatchCount : CommPhase::kCombineCount,
                           expected, came.count);
        }
        is_there = came.is_there and fits;
        counts[peer] = static_cast<int>(came.count);
    }
    return __syncthreads_and(is_there);
}

// ---- ending ----

// All threads of a block that has not failed arrive, done with the peers' memory (bulk copies too). The last
// block moves the epoch on and tells every peer; `count(peer)` goes with it.
template <CommWay kWay, CommRole kRole, typename Count>
__device__ __forceinline__ void end_step(const CommStep<kWay, kRole>& step, const Count& count) {
    constexpr int kWayIdx = static_cast<int>(kWay), kRoleIdx = static_cast<int>(kRole);
    CommControl* const control = step.control();
    __syncthreads();
    if (threadIdx.x >= kWarpSize) return;
    uint32_t* const num_done = &control->num_done[kWayIdx][kRoleIdx];
    uint32_t num_before = 0;
    if (threadIdx.x == 0) num_before = add_acquire_release_system(num_done, 1);
    num_before = __shfl_sync(kAllLanes, num_before, 0);
    __syncwarp();  // what the first lane has acquired, all lanes have
    if (num_before + 1 != gridDim.x) return;
    if (threadIdx.x == 0) {
        *num_done = 0;
        control->epoch[kWayIdx][kRoleIdx] = step.epoch;
    }
    const int peer = threadIdx.x, own = step.place.rank;
    if (peer >= step.group.shape.num_ranks) return;
    CommControl* const theirs = step.control_of(peer);
    uint64_t* const flags = kRole == CommRole::kSend ? theirs->arrived[kWayIdx] : theirs->freed[kWayIdx];
    store_release_system(flags + own, comm_flag(step.epoch, static_cast<uint32_t>(count(peer))));
}

// ---- outputs of a step that failed ----

// Every float of the 16 bytes is a NaN: float32, bfloat16 and float16 alike.
__device__ __forceinline__ void fill_nan_rows(void* rows, int64_t num_bytes) {
    constexpr uint32_t kNan = 0x7fff7fff;
    Word* const words = static_cast<Word*>(rows);
    const int64_t first = int64_t{blockIdx.x} * kCommThreads + threadIdx.x,
                  step = int64_t{gridDim.x} * kCommThreads;
    for (int64_t i = first; i < num_bytes / kWordBytes; i += step)
        words[i] = make_uint4(kNan, kNan, kNan, kNan);
}

template <typename T>
__device__ __forceinline__ void fill_all(T* values, int64_t num_values, T value) {
    if (values == nullptr) return;
    const int64_t first = int64_t{blockIdx.x} * kCommThreads + threadIdx.x,
                  step = int64_t{gridDim.x} * kCommThreads;
    for (int64_t i = first; i < num_values; i += step) values[i] = value;
}

__device__ __forceinline__ float comm_nan() {
    return __uint_as_float(0x7fffffffu);
}

}  // namespace dsc
