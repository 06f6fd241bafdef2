// Which thread goes on when one waits, and what it takes for a barrier or a warp collective to let its
// threads go. A switch goes straight from thread to thread; the main fiber is entered when a block is over
// (to start the next), when nobody is ready, and when the launch has failed.
#include "host/grid.h"

#include <algorithm>
#include <bit>
#include <exception>
#include <new>
#include <numeric>
#include <utility>

#include "core/check.h"

namespace dsc::host {
namespace {

constexpr size_t kMaxResidentBlocks = 4;
constexpr size_t kMaxPooledStacks = 4096;
constexpr size_t kMaxThreads =
    16384;  // alive at once: each stack takes two of the 65530 mappings of a process
constexpr int64_t kMaxIdleYieldsPerThread = 10'000;
constexpr size_t kSharedDynamicAlignment = 128;

// Stacks outlive a launch: mapping one costs more than running a small kernel on it.
std::vector<Stack>& stack_pool() {
    static std::vector<Stack> pool;
    return pool;
}

Stack take_stack() {
    auto& pool = stack_pool();
    if (pool.empty()) return Stack();
    Stack stack = std::move(pool.back());
    pool.pop_back();
    return stack;
}

// Every float, bfloat16, half and fp8 (e4m3) read from fresh shared memory is a NaN; every index is wild.
SharedBytes poisoned_bytes(size_t num_bytes, size_t alignment) {
    auto* const bytes = static_cast<unsigned char*>(::operator new(num_bytes, std::align_val_t(alignment)));
    for (size_t i = 0; i < num_bytes; ++i) bytes[i] = i % 2 == 0 ? 0xff : 0x7f;
    return SharedBytes(bytes, {alignment});
}

size_t num_threads_of(const dim3& shape) {
    return size_t{shape.x} * shape.y * shape.z;
}

void check_shape(const LaunchShape& shape) {
    const auto reject = [](const std::string& message) { throw Fault("host executor: launch: " + message); };
    const auto& [grid, block, shared_bytes, is_cooperative, is_overlapped] = shape;
    const size_t num_threads = num_threads_of(block);
    if (num_threads_of(grid) == 0 or num_threads == 0) reject("the grid or the block is empty");
    if (num_threads > kMaxThreadsPerBlock or block.z > kMaxBlockDepth) {
        reject(concat("the block has ", num_threads, " threads, ", block.z, " in z; at most ",
                      kMaxThreadsPerBlock, ", ", kMaxBlockDepth, " in z"));
    }
    if (grid.x > kMaxGridWidth or grid.y > kMaxGridHeight or grid.z > kMaxGridHeight)
        reject("the grid is too large");
    if (shared_bytes > kMaxSharedBytes) {
        reject(concat(shared_bytes, " bytes of shared memory, at most ", kMaxSharedBytes));
    }
    if (is_cooperative and num_threads_of(grid) * num_threads > kMaxThreads) {
        reject(concat("a cooperative grid of more than ", kMaxThreads, " threads is not run here"));
    }
}

uint3 unravel(int64_t rank, const dim3& shape) {
    const auto x = static_cast<int64_t>(shape.x), y = static_cast<int64_t>(shape.y);
    return {static_cast<unsigned>(rank % x), static_cast<unsigned>(rank / x % y),
            static_cast<unsigned>(rank / (x * y))};
}

}  // namespace

Grid::Grid(const LaunchShape& shape, const std::function<void()>& thread_main, uint64_t seed)
    : shape_(shape), thread_main_(thread_main), random_(seed) {
    check_shape(shape);
    const size_t num_blocks = num_threads_of(shape.grid);
    // Three kinds of order: every thread a step at a time, one warp as far as it can go, and a mixture.
    constexpr size_t kDepthFirst[] = {0, 7, 8};
    depth_first_ = kDepthFirst[random_.below(3)];
    max_blocks_ = shape.is_cooperative ? num_blocks : 1 + random_.below(kMaxResidentBlocks);
    block_order_.resize(num_blocks);
    std::iota(block_order_.begin(), block_order_.end(), 0);
    for (size_t i = num_blocks; i > 1; --i) std::swap(block_order_[i - 1], block_order_[random_.below(i)]);
    running::grid_dim = shape.grid;
    running::block_dim = shape.block;
}

Grid::~Grid() {
    auto& pool = stack_pool();
    for (auto* const blocks : {&alive_, &spare_}) {
        for (auto& block : *blocks) {
            for (Thread& thread : block->threads) {
                if (pool.size() < kMaxPooledStacks) pool.push_back(std::move(thread.stack));
            }
        }
    }
}

void Grid::run() {
    while (true) {
        while (alive_.size() < max_blocks_ and not block_order_.empty()) start_block();
        if (alive_.empty()) return;
        Thread* const next = take_ready(true);
        if (next == nullptr) throw Fault("host executor: deadlock: no thread can go on:" + waiting());
        resume(main_, *next);
        if (not fault_.empty()) throw Fault(fault_);
        retire_blocks();
    }
}

// ---- blocks ----

void Grid::start_block() {
    const size_t num_threads = num_threads_of(shape_.block);
    if (spare_.empty()) {
        spare_.push_back(std::make_unique<Block>());
        spare_.back()->threads.reserve(num_threads);
        for (size_t i = 0; i < num_threads; ++i) {
            Thread& thread = spare_.back()->threads.emplace_back(Fiber(), take_stack());
            thread.rank = static_cast<int>(i);
            thread.idx = unravel(thread.rank, shape_.block);
        }
    }
    alive_.push_back(std::move(spare_.back()));
    spare_.pop_back();
    Block& block = *alive_.back();
    block.idx = unravel(block_order_.back(), shape_.grid);
    block_order_.pop_back();
    block.barrier = {};
    block.num_live = static_cast<int>(num_threads);
    block.warps.assign((num_threads + kWarpSize - 1) / kWarpSize, {});
    block.num_shared_bytes = 0;
    block.shared_dynamic = poisoned_bytes(shape_.shared_bytes, kSharedDynamicAlignment);
    for (Thread& thread : block.threads) {
        thread.block = &block;
        thread.is_waiting = thread.has_exited = thread.has_waited_for_previous = false;
        thread.copies.clear();
        thread.bulk_copies.clear();
        thread.clock = 0;
        thread.fiber.start(thread.stack, &Grid::thread_entry, this);
        block.warps[thread.rank / kWarpSize].live |= 1u << thread.rank % kWarpSize;
        ready_.push_back(&thread);
    }
    shuffle_latest(num_threads);
}

void Grid::retire_blocks() {
    for (size_t i = alive_.size(); i-- > 0;) {
        if (alive_[i]->num_live > 0) continue;
        alive_[i]->shared.clear();
        spare_.push_back(std::move(alive_[i]));
        alive_.erase(alive_.begin() + static_cast<std::ptrdiff_t>(i));
    }
}

// A block has few shared variables: a search beats a map.
void* Grid::find_shared(const void* key, size_t num_bytes, size_t alignment, const char* name) {
    Block& block = *running_->block;
    for (const SharedVariable& variable : block.shared) {
        if (variable.key == key) return variable.bytes.get();
    }
    block.num_shared_bytes += num_bytes;
    if (block.num_shared_bytes > kMaxStaticSharedBytes or
        block.num_shared_bytes + shape_.shared_bytes > kMaxSharedBytes) {
        fail(concat("shared memory: with ", name, " the block declares ", block.num_shared_bytes,
                    " bytes and was launched with ", shape_.shared_bytes, " dynamic ones; the limits are ",
                    kMaxStaticSharedBytes, " declared, ", kMaxSharedBytes, " in all"));
    }
    block.shared.push_back({key, poisoned_bytes(num_bytes, alignment), num_bytes});
    return block.shared.back().bytes.get();
}

bool Grid::is_shared(const void* address, size_t num_bytes) const {
    const auto lies_in = [&](const void* begin, size_t size) {
        const auto first = reinterpret_cast<uintptr_t>(begin), at = reinterpret_cast<uintptr_t>(address);
        return at >= first and at + num_bytes <= first + size;
    };
    const Block& block = *running_->block;
    if (lies_in(block.shared_dynamic.get(), shape_.shared_bytes)) return true;
    return std::any_of(block.shared.begin(), block.shared.end(),
                       [&](const SharedVariable& v) { return lies_in(v.bytes.get(), v.num_bytes); });
}

// ---- who runs next ----

// Null when no thread is ready.
Thread* Grid::take_ready(bool may_be_latest) {
    if (ready_.empty()) return nullptr;
    const bool takes_latest = may_be_latest and random_.below(8) < depth_first_;
    if (not takes_latest) std::swap(ready_.back(), ready_[random_.below(ready_.size())]);
    Thread* const next = ready_.back();
    ready_.pop_back();
    return next;
}

void Grid::resume(Fiber& leaving, Thread& next) {
    running_ = &next;
    running::thread_idx = next.idx;
    running::block_idx = next.block->idx;
    if (&leaving != &next.fiber) leaving.switch_to(next.fiber);
}

// The running thread waits, or has ended: another goes on, or the main fiber when there is none or a block is
// over.
void Grid::switch_away() {
    Thread& self = *running_;
    const bool is_block_over = self.block->num_live == 0;
    Thread* const next = is_block_over ? nullptr : take_ready(true);
    if (next == nullptr) {
        self.fiber.switch_to(main_);
    } else {
        resume(self.fiber, *next);
    }
}

void Grid::release(Thread& thread) {
    thread.is_waiting = false;
    ready_.push_back(&thread);
}

// The lanes of a warp, or the threads of a block, that became ready together go on in any order.
void Grid::shuffle_latest(size_t num_threads) {
    Thread** const latest = ready_.data() + ready_.size() - num_threads;
    for (size_t i = num_threads; i > 1; --i) std::swap(latest[i - 1], latest[random_.below(i)]);
}

void Grid::yield() {
    if (++num_idle_yields_ > kMaxIdleYieldsPerThread * static_cast<int64_t>(1 + ready_.size())) {
        fail(concat("livelock: ", to_text(*running_), " and others only yield;", waiting()));
    }
    Thread* const next = take_ready(false);
    if (next == nullptr) return;
    ready_.push_back(running_);
    resume(running_->fiber, *next);
}

void Grid::maybe_yield() {
    if (random_.below(8) == 0) yield();
}

void Grid::fail(const std::string& message) {
    fault_ = "host executor: " + message;
    running_->fiber.switch_to(main_);
    std::abort();  // nobody resumes a thread of a failed grid
}

void Grid::thread_entry(void* grid) {
    auto& self = *static_cast<Grid*>(grid);
    std::string error;
    try {
        self.thread_main_();
    } catch (const std::exception& exception) {
        error = exception.what();
    }
    if (not error.empty()) self.fail(concat(to_text(*self.running_), " threw: ", error));
    self.thread_exit();
}

void Grid::thread_exit() {
    Thread& self = *running_;
    Block& block = *self.block;
    Warp& warp = block.warps[self.rank / kWarpSize];
    const unsigned bit = 1u << self.rank % kWarpSize;
    if (shape_.is_overlapped and not self.has_waited_for_previous) {
        fail(concat(to_text(self), " ends an overlapped launch without wait_for_previous_kernel()"));
    }
    if (self.bulk_copies.has_unread()) {
        fail(concat(to_text(self), " ends while the copy engine works on its shared memory"));
    }
    self.bulk_copies.write_all();
    for (const Barrier* const barrier : {&block.barrier, &grid_barrier_}) {
        if (barrier->num_arrived == 0) continue;
        fail(concat("divergent barrier: ", to_text(self), " exits while ", barrier->num_arrived,
                    " threads wait at ", to_text(barrier->wait)));
    }
    for (const Warp::Pending& pending : warp.pending) {
        if (pending.wait.mask & bit) {
            fail(concat("divergent warp: ", to_text(self), " exits while ", std::popcount(pending.arrived),
                        " lanes wait for it at ", to_text(pending.wait)));
        }
    }
    warp.live &= ~bit;
    self.has_exited = true;
    --block.num_live;
    ++num_exited_;
    num_idle_yields_ = 0;
    switch_away();
}

// ---- barriers ----

// Counts the running thread in; a barrier that others cannot reach, or wait for elsewhere, is an error.
void Grid::arrive(Barrier& barrier, const Wait& wait, int64_t num_exited) {
    Thread& self = *running_;
    if (num_exited > 0) {
        fail(concat("divergent barrier: ", to_text(self), " waits at ", to_text(wait), " but ", num_exited,
                    " threads have exited"));
    }
    if (barrier.num_arrived == 0) barrier = {.wait = wait, .num_arrived = 0, .num_true = 0};
    if (not is_same(barrier.wait, wait)) {
        fail(concat("divergent barrier: ", to_text(self), " waits at ", to_text(wait), " while ",
                    barrier.num_arrived, " threads wait at ", to_text(barrier.wait)));
    }
    ++barrier.num_arrived;
    self.is_waiting = true;
    self.wait = wait;
}

Vote Grid::wait_for_block(const Wait& wait, bool predicate) {
    Thread& self = *running_;
    Block& block = *self.block;
    const int num_threads = static_cast<int>(block.threads.size());
    arrive(block.barrier, wait, num_threads - block.num_live);
    block.barrier.num_true += predicate;
    if (block.barrier.num_arrived == num_threads) {
        for (Thread& thread : block.threads) {
            thread.vote = {block.barrier.num_true, num_threads};
            release(thread);
        }
        shuffle_latest(block.threads.size());
        block.barrier.num_arrived = 0;
        num_idle_yields_ = 0;
    }
    switch_away();
    return self.vote;
}

void Grid::wait_for_grid(const Wait& wait) {
    if (not shape_.is_cooperative)
        fail("this_grid().sync() in a grid that was not launched with launch_cooperative");
    arrive(grid_barrier_, wait, num_exited_);
    const size_t num_threads = num_threads_of(shape_.grid) * num_threads_of(shape_.block);
    if (grid_barrier_.num_arrived == static_cast<int64_t>(num_threads)) {
        for (const auto& block : alive_) {
            for (Thread& thread : block->threads) release(thread);
        }
        shuffle_latest(num_threads);
        grid_barrier_.num_arrived = 0;
        num_idle_yields_ = 0;
    }
    switch_away();
}

// ---- warps ----

void Grid::check_warp_arrival(const Warp& warp, const Wait& wait) {
    const Thread& self = *running_;
    const unsigned bit = 1u << self.rank % kWarpSize;
    if ((wait.mask & bit) == 0)
        fail(concat("wrong mask: ", to_text(self), " is not in its own mask at ", to_text(wait)));
    if ((wait.mask & ~warp.live) != 0) {
        fail(concat("wrong mask: ", to_text(self), " names lanes that have exited or do not exist at ",
                    to_text(wait), "; the live lanes are ", to_hex(warp.live)));
    }
    for (const auto& [other, arrived] : warp.pending) {
        // Lanes that wait for each other at different places, or under different masks, wait for ever.
        const bool waits_for_me = (other.mask & bit) != 0, named_by_me = (arrived & wait.mask) != 0;
        if (waits_for_me and named_by_me and not is_same(other, wait)) {
            fail(concat("divergent warp: ", to_text(self), " arrives at ", to_text(wait), " while lanes ",
                        to_hex(arrived), " of its warp wait at ", to_text(other)));
        }
    }
}

void Grid::wait_for_warp(const Wait& wait, void* frame, Complete complete) {
    Thread& self = *running_;
    Block& block = *self.block;
    Warp& warp = block.warps[self.rank / kWarpSize];
    const int lane = self.rank % kWarpSize;
    check_warp_arrival(warp, wait);
    auto pending = std::find_if(warp.pending.begin(), warp.pending.end(),
                                [&](const Warp::Pending& other) { return is_same(other.wait, wait); });
    if (pending == warp.pending.end()) pending = warp.pending.insert(pending, {wait, 0});
    pending->arrived |= 1u << lane;
    warp.frames[lane] = frame;
    self.is_waiting = true;
    self.wait = wait;
    if (pending->arrived == wait.mask) {
        warp.pending.erase(pending);
        std::array<void*, kWarpSize> frames{};
        Thread* const lanes = &self - lane;
        for (int i = 0; i < kWarpSize; ++i) {
            if ((wait.mask >> i & 1) == 0) continue;
            frames[i] = warp.frames[i];
            release(lanes[i]);
        }
        complete(wait.mask, frames.data());
        shuffle_latest(static_cast<size_t>(std::popcount(wait.mask)));
        num_idle_yields_ = 0;
    }
    switch_away();
}

}  // namespace dsc::host
