// Barriers and fences of a block and of a cooperative grid. All threads must arrive at the same barrier.
#pragma once

#include "host/executor.h"

inline void __syncthreads(const dsc::host::Place where = dsc::host::Place::current()) {
    dsc::host::wait_for_block("__syncthreads", false, where);
}

inline int __syncthreads_count(int predicate, const dsc::host::Place where = dsc::host::Place::current()) {
    return dsc::host::wait_for_block("__syncthreads_count", predicate != 0, where).num_true;
}

inline int __syncthreads_and(int predicate, const dsc::host::Place where = dsc::host::Place::current()) {
    const auto [num_true, num_threads] =
        dsc::host::wait_for_block("__syncthreads_and", predicate != 0, where);
    return num_true == num_threads;
}

inline int __syncthreads_or(int predicate, const dsc::host::Place where = dsc::host::Place::current()) {
    return dsc::host::wait_for_block("__syncthreads_or", predicate != 0, where).num_true > 0;
}

// Memory is sequentially consistent here: a missing fence goes unseen. A thread that fences or sleeps is
// about to signal or to look again, so others get their turn.
inline void __threadfence_block() {
    dsc::host::yield();
}
inline void __threadfence() {
    dsc::host::yield();
}
inline void __threadfence_system() {
    dsc::host::yield();
}
inline void __nanosleep(unsigned) {
    dsc::host::yield();
}

namespace cooperative_groups {

class grid_group {
  public:
    void sync(const dsc::host::Place where = dsc::host::Place::current()) const {
        dsc::host::wait_for_grid(where);
    }
    unsigned long long num_blocks() const { return 1ull * gridDim.x * gridDim.y * gridDim.z; }
    unsigned long long block_rank() const {
        return (1ull * blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    }
    unsigned long long num_threads() const { return num_blocks() * threads_per_block(); }
    unsigned long long thread_rank() const {
        const auto rank = (1ull * threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
        return block_rank() * threads_per_block() + rank;
    }

  private:
    static unsigned long long threads_per_block() { return 1ull * blockDim.x * blockDim.y * blockDim.z; }
};

inline grid_group this_grid() {
    return {};
}

}  // namespace cooperative_groups
