// One launch as the executor sees it: the blocks that are alive, their threads, what each waits for.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "host/bulk.h"
#include "host/copies.h"
#include "host/executor.h"
#include "host/fiber.h"

namespace dsc::host {

constexpr int kWarpSize = 32;

// The device limits of sm_90, which sm_80 shares but for the shared memory (163 KB there).
constexpr unsigned kMaxThreadsPerBlock = 1024;
constexpr unsigned kMaxBlockDepth = 64;         // blockDim.z
constexpr unsigned kMaxGridWidth = 0x7fffffff;  // gridDim.x
constexpr unsigned kMaxGridHeight = 65535;      // gridDim.y and gridDim.z
constexpr size_t kMaxStaticSharedBytes = 48 * 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;

// SplitMix64: small, and the same on every machine.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    size_t below(size_t limit) { return static_cast<size_t>(next() >> 32) * limit >> 32; }

  private:
    uint64_t state_;
};

// What a thread waits for, or has just arrived at.
struct Wait {
    const char* what = nullptr;
    Place where;
    unsigned mask = 0;  // 0 but for warp collectives
};

struct Block;

struct Thread {
    Fiber fiber;
    Stack stack;
    Block* block = nullptr;
    int rank = 0;  // in the block, x fastest
    uint3 idx{};
    bool is_waiting = false, has_exited = false, has_waited_for_previous = false;
    Wait wait;
    Vote vote{};
    Copies copies;
    BulkCopies bulk_copies;
    uint64_t clock = 0;  // nanoseconds, by its own looks
};

struct Warp {
    struct Pending {
        Wait wait;
        unsigned arrived;
    };
    unsigned live = 0;
    std::vector<Pending> pending;  // several only while the warp is divergent
    std::array<void*, kWarpSize> frames{};
};

// The threads that have arrived at a block's barrier, or at the grid's.
struct Barrier {
    Wait wait;
    int64_t num_arrived = 0;
    int num_true = 0;
};

struct AlignedDelete {
    size_t alignment;
    void operator()(void* bytes) const { ::operator delete(bytes, std::align_val_t(alignment)); }
};
using SharedBytes = std::unique_ptr<void, AlignedDelete>;

struct SharedVariable {
    const void* key;
    SharedBytes bytes;
    size_t num_bytes;
};

struct Block {
    uint3 idx{};
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barrier;
    int num_live = 0;
    std::vector<SharedVariable> shared;
    size_t num_shared_bytes = 0;
    SharedBytes shared_dynamic{nullptr, {1}};
};

class Grid {
  public:
    Grid(const LaunchShape& shape, const std::function<void()>& thread_main, uint64_t seed);
    ~Grid();
    Grid(const Grid&) = delete;
    Grid& operator=(const Grid&) = delete;

    void run();

    // ---- on the stack of the running thread ----
    [[noreturn]] void fail(const std::string& message);
    Vote wait_for_block(const Wait& wait, bool predicate);
    void wait_for_grid(const Wait& wait);
    void wait_for_warp(const Wait& wait, void* frame, Complete complete);
    void* find_shared(const void* key, size_t num_bytes, size_t alignment, const char* name);
    bool is_shared(const void* address, size_t num_bytes) const;  // the running block's
    void yield();
    void maybe_yield();
    Thread& running() { return *running_; }

  private:
    static void thread_entry(void* grid);
    void thread_exit();
    void start_block();
    void retire_blocks();
    Thread* take_ready(bool may_be_latest);
    void resume(Fiber& leaving, Thread& next);
    void switch_away();
    void release(Thread& thread);
    void arrive(Barrier& barrier, const Wait& wait, int64_t num_exited);
    void check_warp_arrival(const Warp& warp, const Wait& wait);
    void shuffle_latest(size_t num_threads);
    std::string waiting() const;

    const LaunchShape shape_;
    const std::function<void()>& thread_main_;
    Random random_;
    size_t depth_first_;                // of 8 choices, how many go to the thread that became ready last
    size_t max_blocks_;                 // alive at once
    std::vector<int64_t> block_order_;  // the blocks not yet started, last first
    std::vector<std::unique_ptr<Block>> alive_, spare_;
    std::vector<Thread*> ready_;
    Thread* running_ = nullptr;
    Fiber main_;
    Barrier grid_barrier_;
    int64_t num_exited_ = 0;  // threads of the whole grid
    int64_t num_idle_yields_ = 0;
    std::string fault_;
};

std::string to_hex(unsigned mask);
std::string to_text(const Wait& wait);
std::string to_text(const Thread& thread);
bool is_same(const Wait& a, const Wait& b);

}  // namespace dsc::host
