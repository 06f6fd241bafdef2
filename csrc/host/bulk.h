// core/bulk_sm90.cuh on the host executor: copies of the copy engine that land as late as they may. A load's
// target holds NaNs until the barrier is waited for; a store reads shared memory when its group's reads are
// waited for, and writes when all stores are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "host/executor.h"

namespace dsc {

// Phases that are over, in shared memory like the mbarrier it stands for.
using BulkBarrier = uint64_t;

namespace host {

class BulkCopies {
  public:
    void start_load(void* target, const void* source, size_t num_bytes, BulkBarrier* barrier);
    bool wait_load(BulkBarrier* barrier, uint32_t parity);  // false: nothing would ever end that phase
    void start_store(void* target, const void* source, size_t num_bytes);
    void commit() { ++num_groups_; }
    void read_all_but(int num_groups);  // the newest still read
    void write_all();
    bool has_unread() const;  // of what was loaded, or stored
    void clear();

  private:
    struct Load {
        void* target;
        const void* source;
        size_t num_bytes;
        BulkBarrier* barrier;
    };
    struct Store {
        void* target;
        const void* source;
        std::vector<unsigned char> bytes;  // once read
        size_t num_bytes;
        int group;
        bool is_read;
    };
    static void read(Store& store);
    std::vector<Load> loads_;
    std::vector<Store> stores_;
    int num_groups_ = 0;
};

void start_bulk_load(void* shared, const void* global, uint32_t num_bytes, BulkBarrier* barrier,
                     const Place& where);
void wait_bulk_load(BulkBarrier* barrier, uint32_t parity, const Place& where);
void start_bulk_store(void* global, const void* shared, uint32_t num_bytes, const Place& where);
BulkCopies& running_bulk_copies();

}  // namespace host

#define DSC_HERE const host::Place where = host::Place::current()

inline void init_bulk_barrier(BulkBarrier* barrier) {
    *barrier = 0;
}
inline void order_before_bulk_copies() {}
inline void start_bulk_load(void* shared, const void* global, uint32_t num_bytes, BulkBarrier* barrier,
                            DSC_HERE) {
    host::start_bulk_load(shared, global, num_bytes, barrier, where);
}
inline void wait_bulk_load(BulkBarrier* barrier, uint32_t parity, DSC_HERE) {
    host::wait_bulk_load(barrier, parity, where);
}
inline void start_bulk_store(void* global, const void* shared, uint32_t num_bytes, DSC_HERE) {
    host::start_bulk_store(global, shared, num_bytes, where);
}
inline void commit_bulk_stores() {
    host::running_bulk_copies().commit();
}
template <int kNumPending>
void wait_bulk_reads() {
    host::running_bulk_copies().read_all_but(kNumPending);
}
inline void wait_bulk_stores() {
    host::running_bulk_copies().write_all();
}

#undef DSC_HERE

}  // namespace dsc
